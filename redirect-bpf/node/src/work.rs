// SPDX-License-Identifier: Apache-2.0
//! The pieces of work that pods ask for. Each runs as a task of its own and ends with a [`Done`].

use crate::Obstacle;
use crate::fence_steps::FenceSteps;
use crate::finder::{By, FindError, Finder, Found, Sandbox};
use crate::listeners::{ListenersError, PodListeners};
use crate::pod::Event;
use podveil_apply::{Addresses, ApplyError, Backend, Connection, ListError, VerifyError};
use podveil_model::{Uid, Workload};
use podveil_netns::NetNs;
use podveil_netns::cgroup::Membership;
use podveil_netns::seqpacket::Peer;
use podveil_plan::{Capture, Fence};
use std::collections::BTreeSet;
use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// What a piece of work leaves behind, beside what the pod is told.
#[derive(Debug)]
pub struct Done {
    pub event: Event,
    pub found: Option<Found>,
    pub listeners: Option<Arc<PodListeners>>,
    pub older: Option<BTreeSet<Connection>>,
    pub fence: Option<Arc<Fence>>,
}

impl From<Event> for Done {
    fn from(event: Event) -> Self {
        Self {
            event,
            found: None,
            listeners: None,
            older: None,
            fence: None,
        }
    }
}

impl From<ApplyError> for Done {
    fn from(error: ApplyError) -> Self {
        failed(&error)
    }
}

fn failed(error: &dyn Error) -> Done {
    Event::Failed {
        reason: chain(error),
    }
    .into()
}

/// An error and its causes in one sentence.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// What a pod's namespace is found by.
#[derive(Clone, Debug)]
pub struct Sought {
    /// What its kubelet knows it by.
    pub uid: Uid,
    /// Where that is only said to be the pod.
    pub proof: Option<Proof>,
    /// It is to be captured, and not only to be let go.
    pub wanted: bool,
}

/// That a namespace is the pod's: the runtime itself calls it so, or it has one of the pod's addresses, which nobody but a
/// kubelet can tell the cluster.
#[derive(Clone, Debug)]
pub struct Proof {
    addresses: Vec<IpAddr>,
    namespace: String,
    pod: String,
}

impl Sought {
    pub fn of(workload: &Workload, wanted: bool) -> Self {
        let on_node = workload.node_uid.as_ref();
        Self {
            uid: on_node.unwrap_or(&workload.uid).clone(),
            proof: on_node.map(|_| Proof {
                addresses: workload.addresses.clone(),
                namespace: workload.identity.namespace.as_str().to_owned(),
                pod: workload.name.to_string(),
            }),
            wanted,
        }
    }

    /// Why the namespace is not, or not yet, to be taken for the pod's.
    /// `given`: the sandbox that the CNI plugin has handed over for it.
    fn objection(
        &self,
        netns: &NetNs,
        given: Option<&Sandbox>,
    ) -> Result<Option<String>, ListError> {
        let there = Addresses::of(netns)?;
        let uid = &self.uid;
        let is_proven = |proof: &Proof| {
            let by_runtime = given.is_some_and(|given| {
                given.netns.id() == netns.id() && given.is_of(&proof.namespace, &proof.pod)
            });
            by_runtime || proof.addresses.iter().any(|address| there.has(*address))
        };
        Ok(match &self.proof {
            Some(proof) if !is_proven(proof) => {
                Some(format!("pod {uid} of this node has none of its addresses"))
            }
            // Some runtimes start a sandbox first and connect it to the network then. Capture would not know its addresses.
            _ if self.wanted && !there.are_given() => {
                Some("its network namespace has no address yet".to_owned())
            }
            _ => None,
        })
    }
}

/// `places`: where the work begins that is done in a namespace, once that is found.
pub async fn look_for<B: Backend>(
    backend: Arc<B>,
    finder: Arc<Finder>,
    sought: Sought,
    places: &Semaphore,
) -> Done {
    let found = match finder.find(&sought.uid).await {
        Ok(found) => found,
        Err(FindError::Missing { what, obstacle }) => {
            return Event::Missing {
                reason: what,
                obstacle,
            }
            .into();
        }
        Err(error) => return failed(&error),
    };
    let _place = places.acquire().await;
    let given = finder.given.of(&sought.uid);
    match sought.objection(&found.netns, given.as_ref()) {
        Ok(None) => {}
        Ok(Some(reason)) => {
            let obstacle = Obstacle::NotFound;
            return Event::Missing { reason, obstacle }.into();
        }
        Err(error) => return failed(&error),
    }
    match backend.stands(&found.netns).await {
        Ok(stands) => Done {
            found: Some(found),
            ..Event::Found { stands }.into()
        },
        Err(error) => error.into(),
    }
}

pub async fn listen(
    netns: Arc<NetNs>,
    backlog: u32,
    proxy: Option<Arc<Peer>>,
    cgroup: Membership,
) -> Done {
    let open = move || PodListeners::open(&netns, backlog, proxy.as_deref(), &cgroup);
    match tokio::task::spawn_blocking(open).await {
        Ok(Ok(listeners)) => Done {
            listeners: Some(Arc::new(listeners)),
            ..Event::Listening.into()
        },
        Ok(Err(error @ ListenersError::Taken { .. })) => Event::Taken {
            reason: chain(&error),
        }
        .into(),
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}

pub async fn apply<B: Backend>(
    backend: Arc<B>,
    netns: Arc<NetNs>,
    capture: Capture,
    fence: (u64, Arc<Fence>),
) -> Done {
    let (generation, fence) = fence;
    match backend.apply(&netns, &capture, &fence).await {
        Ok(older) => Done {
            older: Some(older),
            fence: Some(fence),
            ..Event::Applied {
                capture,
                fence: generation,
            }
            .into()
        },
        Err(error) => error.into(),
    }
}

pub async fn change_fence<B: Backend>(
    backend: Arc<B>,
    netns: Arc<NetNs>,
    stands: Arc<Fence>,
    fence: (u64, Arc<Fence>),
    steps: &FenceSteps,
) -> Done {
    let (generation, fence) = fence;
    let step = steps.between(&stands, &fence);
    match backend.change_fence(&netns, &step).await {
        Ok(()) => Done {
            fence: Some(fence),
            ..Event::FenceChanged { fence: generation }.into()
        },
        Err(error) => error.into(),
    }
}

/// Looks at what stands and what is open in the namespace that the pod is believed to have.
pub async fn check<B: Backend>(
    backend: Arc<B>,
    finder: Arc<Finder>,
    uid: Uid,
    held: Found,
    mut older: BTreeSet<Connection>,
    verify: Option<Capture>,
) -> Done {
    let mut again = None;
    let given = finder.given.of(&uid);
    if given.is_some_and(|given| given.netns.id() != held.netns.id()) {
        return Event::Replaced.into();
    }
    if !held.is_certain() && (held.anchor.is_some() || verify.is_some()) {
        again = match finder.find(&uid).await {
            // Both are open, so that the number of neither can have been used again.
            Ok(found) if found.netns.id() == held.netns.id() => {
                (found.by != By::Cni).then_some(found)
            }
            Ok(_) => return Event::Replaced.into(),
            Err(FindError::Missing { .. }) if held.anchor.is_some() || held.by == By::Cni => {
                return Event::Replaced.into();
            }
            Err(_) => None,
        };
    }
    let netns = &held.netns;
    if let Some(capture) = &verify
        && let Err(error) = backend.verify(netns, capture).await
    {
        let reason = chain(&error);
        return match error {
            // Nothing is known to be wrong with what stands.
            VerifyError::Apply(_) => Event::Failed { reason }.into(),
            _ => Event::Drifted { reason }.into(),
        };
    }
    let verified = verify.is_some();
    match backend.observe(netns, &mut older).await {
        Ok(observed) => Done {
            found: again,
            older: Some(older),
            ..Event::Checked { observed, verified }.into()
        },
        Err(error) => error.into(),
    }
}

pub async fn remove<B: Backend>(backend: Arc<B>, netns: Arc<NetNs>) -> Done {
    match backend.remove(&netns).await {
        Ok(()) => Event::Removed.into(),
        Err(error) => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finder::Given;
    use nix::sched::{CloneFlags, unshare};
    use podveil_cni::wire::{About, Request};
    use podveil_testing::workload;
    use std::process::Command;

    #[test]
    fn a_namespace_that_is_only_said_to_be_the_pods_must_have_its_address() {
        let here = NetNs::current().unwrap();
        let mut workload = Workload::clone(&workload("web-1").address("127.0.0.1").build());
        let sought = Sought::of(&workload, false);
        assert_eq!(sought.uid, "web-1".into());
        // That nobody but the API server gives: no more is asked.
        workload.addresses.clear();
        let sought = Sought::of(&workload, false);
        assert_eq!(sought.objection(&here, None).unwrap(), None);
        let hash = "0123456789abcdef0123456789abcdef";
        workload.node_uid = Some(hash.into());
        for (addresses, taken) in [
            (vec![], false),
            (vec!["192.0.2.7"], false),
            (vec!["192.0.2.7", "127.0.0.1"], true),
        ] {
            workload.addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
            let sought = Sought::of(&workload, false);
            assert_eq!(sought.uid, hash.into());
            let objection = sought.objection(&here, None).unwrap();
            assert_eq!(objection.is_none(), taken, "{addresses:?}");
        }
        // Or the runtime must call it by the pod's name.
        workload.addresses.clear();
        let sought = Sought::of(&workload, false);
        let proof = sought.proof.clone().unwrap();
        for (pod, taken) in [(proof.pod.as_str(), true), ("another", false)] {
            let given = Given::default();
            let request = Request {
                about: About::Start,
                namespace: proof.namespace.clone(),
                pod: pod.into(),
                uid: hash.into(),
                sandbox: "s".into(),
                addresses: Vec::new(),
            };
            given.starts(&request, Arc::new(NetNs::current().unwrap()));
            let objection = sought.objection(&here, given.of(&hash.into()).as_ref());
            assert_eq!(objection.unwrap().is_none(), taken, "{pod}");
        }
    }

    #[test]
    #[ignore = "netns"]
    fn a_namespace_without_an_address_is_not_captured_yet() {
        let empty = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            for command in ["link set lo up", "link add veth0 type veth peer name veth1"] {
                let status = Command::new("ip").args(command.split(' ')).status();
                assert!(status.unwrap().success(), "{command}");
            }
            NetNs::current().unwrap()
        });
        let netns = empty.join().unwrap();
        let workload = workload("web-1").address("10.0.0.7").build();
        let objection = |wanted| {
            Sought::of(&workload, wanted)
                .objection(&netns, None)
                .unwrap()
        };
        assert!(objection(true).unwrap().contains("no address yet"));
        // What is to be let go is found all the same.
        assert_eq!(objection(false), None);
        let add = ["address", "add", "10.0.0.7/32", "dev", "veth0"];
        let added = netns.run(|| Command::new("ip").args(add).status()).unwrap();
        assert!(added.unwrap().success());
        assert_eq!(objection(true), None);
    }
}
