// SPDX-License-Identifier: Apache-2.0
//! What the loop holds of one pod, and what others are told of it: the proxy by an offer, the CNI plugin by facts.

use crate::PodCondition;
use crate::cni::{Ask, Facts, Namespaces};
use crate::finder::Found;
use crate::listeners::PodListeners;
use crate::pod::Pod;
use crate::zds::{Offer, Taking};
use podveil_apply::Connection;
use podveil_cni::wire::About;
use podveil_model::Workload;
use podveil_plan::Fence;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// A pod and what is held for it.
pub(crate) struct Entry {
    pub pod: Pod,
    /// Tells work for this entry from work for one before it.
    pub id: u64,
    pub workload: Arc<Workload>,
    pub place: Option<Place>,
    pub listeners: Option<(Arc<PodListeners>, CancellationToken)>,
    /// It is to be captured from the first moment that it is heard of, or was before in another sandbox.
    pub awaited: bool,
    /// Its containers may have run in this sandbox before it was captured.
    pub started_uncaptured: bool,
    /// Of the offer to the proxy.
    pub offer: u64,
    pub older: BTreeSet<Connection>,
    pub fence: Arc<Fence>,
}

/// The pod's namespace, and who waits for the end of the process that it was found by.
pub(crate) struct Place {
    pub found: Found,
    pub watch: Option<AbortHandle>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.close_listeners();
    }
}

impl Entry {
    /// What the proxy is told of it; `None`: that it is gone.
    pub fn offer(&self) -> Option<Offer> {
        if !self.pod.is_offered() {
            // Never offered by this process: the proxy may have it from one before.
            let keep = self.offer == 0 && self.pod.is_kept();
            return keep.then_some(Offer::Keep);
        }
        let identity = &self.workload.identity;
        Some(Offer::Take(Taking {
            name: self.workload.name.clone(),
            namespace: identity.namespace.as_str().into(),
            service_account: identity.service_account.as_str().into(),
            netns: self.place.as_ref()?.found.netns.clone(),
            addresses: self.place.as_ref()?.found.addresses.clone(),
            generation: self.offer,
        }))
    }

    pub fn close_listeners(&mut self) {
        if let Some((_, stop)) = self.listeners.take() {
            stop.cancel();
        }
    }
}

/// What is known of a pod that the CNI plugin asks about.
pub(crate) fn facts(
    namespaces: &Namespaces,
    workload: Option<&Arc<Workload>>,
    entry: Option<&Entry>,
    ask: &Ask,
) -> Facts {
    let pending = |reason: &str| Facts::Pending(reason.into());
    let Some(workload) = workload else {
        return match namespaces.are_without(&ask.request.namespace) {
            true => Facts::OtherNamespace,
            false => Facts::Unknown("the controller has not told of this pod yet".into()),
        };
    };
    if workload.host_network || ask.request.about == About::End {
        return Facts::NotEnrolled;
    }
    let Some(entry) = entry else {
        return Facts::Unknown("it runs on another node, as far as the controller has told".into());
    };
    if !entry.pod.is_wanted() {
        return Facts::NotEnrolled;
    }
    let place = entry.place.as_ref().map(|place| place.found.netns.id());
    let given = ask.netns.as_ref().map(|netns| netns.id());
    if given.is_some() && place != given {
        return pending("its new network namespace is not captured yet");
    }
    match entry.pod.condition() {
        // Peers learn its address only after this, so that none of them sends to it in plain.
        (PodCondition::Ready, _) if entry.workload.stage.is_announced() => Facts::Captured,
        (PodCondition::Ready, _) => {
            pending("it is captured, and the controller has not announced it yet")
        }
        (_, reason) => Facts::Pending(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_cni::wire::Request;
    use podveil_model::MeshConfig;
    use podveil_testing::workload;

    #[test]
    fn a_pod_that_nobody_tells_of_is_judged_by_its_namespace() {
        let mut namespaces = Namespaces::default();
        namespaces.take(&MeshConfig {
            not_enrolled: ["plain".parse().unwrap()].into(),
            ..podveil_testing::mesh()
        });
        let ask = |namespace: &str| Ask {
            request: Request {
                about: About::Start,
                namespace: namespace.into(),
                pod: "web".into(),
                uid: "u".into(),
                sandbox: "s".into(),
                addresses: Vec::new(),
            },
            netns: None,
            reply: tokio::sync::oneshot::channel().0,
        };
        let plain = facts(&namespaces, None, None, &ask("plain"));
        assert_eq!(plain, Facts::OtherNamespace);
        for namespace in ["shop", "made-since", "no name"] {
            let other = facts(&namespaces, None, None, &ask(namespace));
            assert!(matches!(other, Facts::Unknown(_)), "{namespace}");
        }
        // One that is told of is not: it may be enrolled by then.
        let told = workload("u").build();
        let told = facts(&namespaces, Some(&told), None, &ask("plain"));
        assert!(matches!(told, Facts::Unknown(_)));
    }
}
