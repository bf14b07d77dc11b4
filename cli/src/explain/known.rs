// SPDX-License-Identifier: Apache-2.0
//! What a node knows, from its `/resources`.

use anyhow::Context;
use podveil_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use podveil_state::View;
use podveil_xds_client::ResourceType;
use podveil_xds_client::parse::{self, Address, Malformed};
use prost::Message;
use std::sync::Arc;

/// # Errors
/// If anything in it is not understood: an explanation from half of what the node knows would be wrong.
pub fn view(mut bytes: &[u8]) -> anyhow::Result<View> {
    const VERSION: &str = "the node's state is not understood; is podveilctl of its version?";
    let mut view = View::default();
    while !bytes.is_empty() {
        let response =
            DeltaDiscoveryResponse::decode_length_delimited(&mut bytes).context(VERSION)?;
        let kind = ResourceType::from_type_url(&response.type_url).context(VERSION)?;
        for resource in &response.resources {
            insert(&mut view, kind, resource)
                .with_context(|| format!("{}: {VERSION}", resource.name))?;
        }
        if kind == ResourceType::Address {
            view.set_synced();
        }
    }
    Ok(view)
}

fn insert(view: &mut View, kind: ResourceType, resource: &Resource) -> Result<(), Malformed> {
    let bytes = resource.resource.as_ref().map_or(&[][..], |any| &any.value);
    match kind {
        ResourceType::Address => match parse::address(&resource.name, bytes)? {
            Address::Service(service) => view.insert_service(service),
            Address::Workload(workload) => {
                view.insert_workload(workload);
            }
        },
        ResourceType::Authorization => {
            let policy = Arc::new(parse::authorization(bytes)?);
            view.insert_policy(resource.name.as_str().into(), policy);
        }
        ResourceType::MeshConfig => {
            view.insert_mesh(Arc::new(parse::mesh_config(bytes)?));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_testing::{mesh, policy, service, workload};
    use podveil_xds_server::Snapshot;

    #[test]
    fn what_a_node_tells_is_what_it_knows() {
        let web = service("web").address("10.96.0.80").port(80, 8080).build();
        let one = workload("w").address("10.0.0.2").behind(&web, &[]).build();
        let allow = policy("allow").port(8080).build();
        let snapshot = Snapshot {
            workloads: vec![one.clone()],
            services: vec![web.clone()],
            policies: vec![allow.clone()],
            mesh: Some(mesh().into()),
        };
        let bytes: Vec<u8> = (snapshot.into_responses().iter())
            .flat_map(DeltaDiscoveryResponse::encode_length_delimited_to_vec)
            .collect();
        let view = view(&bytes).unwrap();
        assert!(view.is_synced());
        assert_eq!(view.by_uid(&one.uid), Some(&one));
        assert_eq!(view.service(&web.key), Some(&web));
        assert_eq!(view.policies().iter().next().unwrap().1, &allow);
        assert_eq!(**view.mesh().unwrap(), mesh());
        assert!(super::view(&bytes[..bytes.len() - 1]).is_err(), "cut off");
    }
}
