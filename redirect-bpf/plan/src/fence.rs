// SPDX-License-Identifier: Apache-2.0
use podveil_model::Workload;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

/// The addresses that stand behind the fence of every captured pod.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Fence {
    /// Peers that have been announced: only the proxy's own sockets reach them.
    pub enrolled: BTreeSet<IpAddr>,
    /// Peers from which a mandatory pod takes tunnels only.
    pub mandatory: BTreeSet<IpAddr>,
}

impl Fence {
    pub fn of<'a>(workloads: impl IntoIterator<Item = &'a Workload>) -> Self {
        let mut fence = Self::default();
        for workload in workloads {
            if workload.host_network {
                continue;
            }
            if workload.stage.is_announced() {
                fence.enrolled.extend(&workload.addresses);
            }
            if workload.stage.is_mandatory() {
                fence.mandatory.extend(&workload.addresses);
            }
        }
        fence
    }

    /// What turns `self` into `next`.
    pub fn change_to(&self, next: &Self) -> FenceChange {
        FenceChange {
            add: Self {
                enrolled: &next.enrolled - &self.enrolled,
                mandatory: &next.mandatory - &self.mandatory,
            },
            remove: Self {
                enrolled: &self.enrolled - &next.enrolled,
                mandatory: &self.mandatory - &next.mandatory,
            },
        }
    }

    pub fn is_empty(&self) -> bool {
        self.enrolled.is_empty() && self.mandatory.is_empty()
    }
}

#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FenceChange {
    pub add: Fence,
    pub remove: Fence,
}

impl FenceChange {
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }
}

/// From the fence that stands around a pod to the next one. Pods share fences, and the steps between them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FenceStep {
    pub stands: Arc<Fence>,
    pub change: FenceChange,
    pub next: Arc<Fence>,
}

impl FenceStep {
    pub fn between(stands: &Arc<Fence>, next: &Arc<Fence>) -> Self {
        Self {
            stands: stands.clone(),
            change: stands.change_to(next),
            next: next.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(enrolled: &[&str], mandatory: &[&str]) -> Fence {
        let set = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect();
        Fence {
            enrolled: set(enrolled),
            mandatory: set(mandatory),
        }
    }

    #[test]
    fn a_change_holds_only_what_differs() {
        let old = fence(&["10.0.0.1", "10.0.0.2"], &["10.0.0.1"]);
        let new = fence(&["10.0.0.2", "fd00::3"], &["10.0.0.1"]);
        let change = old.change_to(&new);
        assert_eq!(change.add, fence(&["fd00::3"], &[]));
        assert_eq!(change.remove, fence(&["10.0.0.1"], &[]));
        assert!(new.change_to(&new).is_empty());
    }
}
