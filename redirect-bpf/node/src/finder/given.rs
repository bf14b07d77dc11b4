// SPDX-License-Identifier: Apache-2.0
use super::{By, Found};
use podveil_cni::wire::Request;
use podveil_model::Uid;
use podveil_netns::NetNs;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A pod has one of each family; a few more fit a packet to the proxy.
const MAX_ADDRESSES: usize = 8;

/// Namespaces that the CNI plugin has handed over, each until the pod has a process that leads there too: while a sandbox
/// starts it has none. Bounded by the sandboxes of this node.
#[derive(Debug, Default)]
pub struct Given(Mutex<BTreeMap<Uid, Sandbox>>);

#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The runtime's name for it.
    id: Arc<str>,
    pub netns: Arc<NetNs>,
    addresses: Arc<[IpAddr]>,
    namespace: String,
    pod: String,
    /// The plugin waits for our word: no process can be there yet.
    pub starts: bool,
}

impl Sandbox {
    /// Does the runtime call its pod this?
    pub fn is_of(&self, namespace: &str, pod: &str) -> bool {
        self.namespace == namespace && self.pod == pod
    }

    pub fn found(&self) -> Found {
        Found {
            netns: self.netns.clone(),
            anchor: None,
            by: By::Cni,
            addresses: self.addresses.clone(),
        }
    }
}

impl Given {
    /// A new sandbox of the pod; the one before it counts no more.
    pub fn starts(&self, request: &Request, netns: Arc<NetNs>) {
        let addresses = request.addresses.iter().copied();
        let sandbox = Sandbox {
            id: request.sandbox.as_str().into(),
            netns,
            addresses: addresses.take(MAX_ADDRESSES).collect(),
            namespace: request.namespace.clone(),
            pod: request.pod.clone(),
            starts: true,
        };
        self.table().insert(request.uid.as_str().into(), sandbox);
    }

    /// The plugin has its word: processes may follow.
    pub fn has_started(&self, uid: &Uid, id: &str) {
        if let Some(sandbox) = self
            .table()
            .get_mut(uid)
            .filter(|sandbox| *sandbox.id == *id)
        {
            sandbox.starts = false;
        }
    }

    pub fn ends(&self, uid: &Uid, id: &str) {
        let mut table = self.table();
        if table.get(uid).is_some_and(|sandbox| *sandbox.id == *id) {
            table.remove(uid);
        }
    }

    /// What was handed over is known by other means, or not needed any more.
    pub fn forget(&self, uid: &Uid) {
        let mut table = self.table();
        if table.get(uid).is_some_and(|sandbox| !sandbox.starts) {
            table.remove(uid);
        }
    }

    pub fn of(&self, uid: &Uid) -> Option<Sandbox> {
        self.table().get(uid).cloned()
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Uid, Sandbox>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Find;
    use crate::finder::{FindError, Finder};
    use podveil_cni::wire::About;

    /// As a way to find pods that finds none, and a sandbox that is handed over.
    #[tokio::test]
    async fn what_is_handed_over_counts_until_its_sandbox_ends_or_the_next_one_starts() {
        let folder = tempfile::tempdir().unwrap();
        let finder = Finder::new(&Find::Directory(folder.path().to_owned()));
        let uid = Uid::from("u");
        let netns = || Arc::new(NetNs::current().unwrap());
        let address = ["10.0.0.1".parse().unwrap()];
        let request = |sandbox: &str, addresses: &[IpAddr]| Request {
            about: About::Start,
            namespace: "shop".into(),
            pod: "web".into(),
            uid: "u".into(),
            sandbox: sandbox.into(),
            addresses: addresses.to_vec(),
        };
        let missing = async || matches!(finder.find(&uid).await, Err(FindError::Missing { .. }));
        assert!(missing().await);
        finder.given.starts(&request("first", &address), netns());
        // Its plugin waits: not to be forgotten yet.
        finder.given.forget(&uid);
        let found = finder.find(&uid).await.unwrap();
        assert_eq!((found.by, &*found.addresses), (By::Cni, &address[..]));
        finder.given.has_started(&uid, "first");
        assert_eq!(finder.find(&uid).await.unwrap().by, By::Cni);
        let second = netns();
        finder.given.starts(&request("second", &[]), second.clone());
        // Late words about the one before change nothing.
        finder.given.has_started(&uid, "first");
        finder.given.ends(&uid, "first");
        let now = finder.given.of(&uid).unwrap();
        assert!(now.starts && Arc::ptr_eq(&now.netns, &second));
        assert!(now.is_of("shop", "web") && !now.is_of("shop", "other"));
        finder.given.ends(&uid, "second");
        assert!(missing().await);
    }
}
