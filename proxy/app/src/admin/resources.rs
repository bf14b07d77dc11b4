// SPDX-License-Identifier: Apache-2.0
//! `/resources`: the whole view as the responses of a control plane would bring it.

use podveil_program::http::Answer;
use podveil_proto::type_url;
use podveil_state::View;
use podveil_xds_server::{Snapshot, delimited};

pub(super) fn answer(view: &View) -> Answer {
    Answer::protobuf(encode(view))
}

/// Before the first full state of addresses there is no response of that type: nothing is known, not "nobody is there".
fn encode(view: &View) -> Vec<u8> {
    let snapshot = Snapshot {
        workloads: view.workloads().cloned().collect(),
        services: view.services().cloned().collect(),
        policies: (view.policies().iter())
            .map(|(_, policy)| policy.clone())
            .collect(),
        mesh: view.mesh().cloned(),
    };
    let responses = snapshot.into_responses().into_iter();
    delimited(
        responses.filter(|response| view.is_synced() || response.type_url != type_url::ADDRESS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_proto::envoy::service::discovery::v3::DeltaDiscoveryResponse;
    use podveil_testing::{mesh, policy, service, workload};
    use prost::Message;

    /// The names in what is encoded, each behind the last word of its type.
    fn told(view: &View) -> Vec<String> {
        let bytes = encode(view);
        let mut rest = bytes.as_slice();
        let mut told = Vec::new();
        while !rest.is_empty() {
            let response = DeltaDiscoveryResponse::decode_length_delimited(&mut rest).unwrap();
            let kind = response.type_url.rsplit('.').next().unwrap().to_owned();
            let names = response.resources.into_iter().map(|one| one.name);
            told.push(
                [kind]
                    .into_iter()
                    .chain(names)
                    .collect::<Vec<_>>()
                    .join(" "),
            );
        }
        told
    }

    #[test]
    fn everything_known_is_told_and_nothing_about_addresses_before_all_are_known() {
        let mut view = View::default();
        view.insert_mesh(mesh().into());
        view.insert_policy("shop/allow".into(), policy("allow").build());
        view.insert_service(service("web").build());
        view.insert_workload(workload("w").build());
        assert_eq!(told(&view), ["MeshConfig mesh", "Authorization shop/allow"]);
        view.set_synced();
        assert_eq!(
            told(&view)[2..],
            ["Address shop/web.shop.svc.cluster.local w"]
        );
    }
}
