// SPDX-License-Identifier: Apache-2.0
use podveil_bpf::layout::{ENROLLED, Ip, MANDATORY, Pod};
use podveil_bpf::{Node, Table, TableError};
use podveil_plan::{Fence, FenceChange};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// The fence of each pod, by its namespace's cookie, and what the node's one map holds of them: an address as long as
/// any pod has it.
#[derive(Debug, Default)]
pub struct Fences {
    pods: BTreeMap<u64, Arc<Fence>>,
    standing: BTreeMap<IpAddr, u32>,
}

impl Fences {
    /// What a process before this one has left: each pod keeps all of it until it is told otherwise.
    pub fn inherit(node: &Node) -> Result<Self, TableError> {
        let mut fences = Self::default();
        let mut inherited = Fence::default();
        for key in node.fence.keys()? {
            let kinds = node.fence.find(&key)?.unwrap_or_default();
            fences.standing.insert(key.into(), kinds);
            for (set, kind) in [
                (&mut inherited.enrolled, ENROLLED),
                (&mut inherited.mandatory, MANDATORY),
            ] {
                if kinds & kind != 0 {
                    set.insert(key.into());
                }
            }
        }
        let inherited = Arc::new(inherited);
        for cookie in node.pods.keys()? {
            let pod = node.pods.find(&cookie)?.unwrap_or_default();
            if pod.flags & Pod::FENCED != 0 {
                fences.pods.insert(cookie, inherited.clone());
            }
        }
        Ok(fences)
    }

    /// A pod's fence after a change.
    pub fn changed(&self, cookie: u64, change: &FenceChange) -> Fence {
        let Some(held) = self.pods.get(&cookie) else {
            return change.add.clone();
        };
        Fence {
            enrolled: &(&held.enrolled - &change.remove.enrolled) | &change.add.enrolled,
            mandatory: &(&held.mandatory - &change.remove.mandatory) | &change.add.mandatory,
        }
    }

    /// Gives a pod another fence, or none, and makes the map follow: additions first.
    pub fn set(
        &mut self,
        map: &Table<Ip, u32>,
        cookie: u64,
        fence: Option<Fence>,
    ) -> Result<(), TableError> {
        match fence {
            Some(fence) => {
                // Pods have the same fence but for moments, so that one copy serves all.
                let same = self.pods.values().find(|held| ***held == fence).cloned();
                self.pods.insert(cookie, same.unwrap_or(Arc::new(fence)));
            }
            None => {
                self.pods.remove(&cookie);
            }
        }
        let wanted = self.union();
        for (ip, kinds) in &wanted {
            if self.standing.get(ip) != Some(kinds) {
                map.set(&Ip::from(*ip), kinds)?;
                self.standing.insert(*ip, *kinds);
            }
        }
        let gone: Vec<IpAddr> = (self.standing.keys().copied())
            .filter(|ip| !wanted.contains_key(ip))
            .collect();
        for ip in gone {
            map.remove(&Ip::from(ip))?;
            self.standing.remove(&ip);
        }
        Ok(())
    }

    fn union(&self) -> BTreeMap<IpAddr, u32> {
        let mut distinct: Vec<&Arc<Fence>> = Vec::new();
        for fence in self.pods.values() {
            if !distinct.iter().any(|held| Arc::ptr_eq(held, fence)) {
                distinct.push(fence);
            }
        }
        let mut union = BTreeMap::new();
        for fence in distinct {
            for (set, kind) in [(&fence.enrolled, ENROLLED), (&fence.mandatory, MANDATORY)] {
                for ip in set {
                    *union.entry(*ip).or_default() |= kind;
                }
            }
        }
        union
    }
}
