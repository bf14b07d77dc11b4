// SPDX-License-Identifier: Apache-2.0
use podveil_ca_client::{Held, WorkloadCertificates};
use podveil_identity::{KubernetesName, WorkloadIdentity};
use podveil_state::{StateHandle, View};
use std::collections::{BTreeMap, BTreeSet};
use tokio_util::sync::CancellationToken;

/// Holds the certificates of this node's workloads from the moment xDS tells of them, so that none waits for its first
/// connection. A pod that the agent hands over holds its own beside this.
pub async fn run(
    node: KubernetesName,
    state: StateHandle,
    certificates: WorkloadCertificates,
    stop: CancellationToken,
) {
    let mut held: BTreeMap<WorkloadIdentity, Held> = BTreeMap::new();
    let mut changed = state.changed();
    let hold = async {
        loop {
            let wanted = wanted(&state.view(), &node);
            held.retain(|identity, _| wanted.contains(identity));
            for identity in wanted {
                held.entry(identity)
                    .or_insert_with_key(|identity| certificates.hold(identity));
            }
            if changed.changed().await.is_err() {
                // The state is frozen: what is held stays held.
                std::future::pending::<()>().await;
            }
        }
    };
    let _stopped: Option<()> = stop.run_until_cancelled(hold).await;
}

fn wanted(view: &View, node: &KubernetesName) -> BTreeSet<WorkloadIdentity> {
    view.workloads()
        .filter(|workload| &workload.node == node)
        .filter(|workload| workload.stage.wants_certificate() && !workload.host_network)
        .map(|workload| workload.identity.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_model::{Stage, Workload};
    use std::sync::Arc;

    #[test]
    fn only_enrolled_workloads_of_this_node_are_wanted() {
        let base = crate::testing::workload("web-1", "web", "10.244.1.10");
        let mut view = View::default();
        let mut insert = |uid: &str, change: &dyn Fn(&mut Workload)| {
            let mut workload = Workload::clone(&base);
            workload.uid = uid.into();
            workload.identity.service_account = uid.parse().unwrap();
            workload.addresses.clear();
            change(&mut workload);
            let _newest = view.insert_workload(Arc::new(workload));
        };
        insert("here", &|_| {});
        insert("draining", &|workload| workload.stage = Stage::Draining);
        insert("elsewhere", &|workload| {
            workload.node = "n2".parse().unwrap()
        });
        insert("plain", &|workload| workload.stage = Stage::None);
        insert("host", &|workload| workload.host_network = true);
        let wanted = wanted(&view, &"n1".parse().unwrap());
        let accounts: Vec<&str> = wanted
            .iter()
            .map(|identity| identity.service_account.as_str())
            .collect();
        assert_eq!(accounts, ["draining", "here"]);
    }
}
