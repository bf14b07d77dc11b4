// SPDX-License-Identifier: Apache-2.0
use podveil_bpf::layout::{ENROLLED, Ip, MANDATORY, Pod};
use podveil_bpf::{Node, Table, TableError};
use podveil_plan::{Fence, FenceStep};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// What the programs read.
pub trait FenceMap {
    fn set(&self, ip: IpAddr, kinds: u32) -> Result<(), TableError>;
    fn remove(&self, ip: IpAddr) -> Result<(), TableError>;
}

impl FenceMap for Table<Ip, u32> {
    fn set(&self, ip: IpAddr, kinds: u32) -> Result<(), TableError> {
        Self::set(self, &ip.into(), &kinds)
    }

    fn remove(&self, ip: IpAddr) -> Result<(), TableError> {
        Self::remove(self, &ip.into())
    }
}

/// The fence of each pod, by its namespace's cookie, and what the node's one map holds of them: an address as long as
/// any pod has it.
///
/// Pods share fences, and step from one to the next at moments of their own: few are in use at once. A step costs what
/// it changes, for the first pod that takes it and for the last; a cluster of ten thousands of addresses may change often.
#[derive(Debug, Default)]
pub struct Fences {
    pods: BTreeMap<u64, Arc<Fence>>,
    /// Each fence in use once, with the number of pods that have it.
    in_use: Vec<(Arc<Fence>, usize)>,
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
        match fences.pods.len() {
            // It ended on the way out of the last pod's.
            0 => fences.lower(&node.fence, &inherited)?,
            pods => fences.in_use.push((inherited, pods)),
        }
        Ok(fences)
    }

    /// Gives a pod a fence, whatever it has.
    pub fn set(
        &mut self,
        map: &impl FenceMap,
        cookie: u64,
        fence: &Arc<Fence>,
    ) -> Result<(), TableError> {
        if !self.is_in_use(fence) {
            self.raise(map, fence)?;
        }
        let before = self.exchange(cookie, Some(fence));
        match before {
            Some(before) => self.lower(map, &before),
            None => Ok(()),
        }
    }

    /// Takes a pod from the fence that it has to the next one.
    pub fn step(
        &mut self,
        map: &impl FenceMap,
        cookie: u64,
        step: &FenceStep,
    ) -> Result<(), TableError> {
        let held = self.pods.get(&cookie);
        if !held.is_some_and(|held| Arc::ptr_eq(held, &step.stands)) {
            return self.set(map, cookie, &step.next);
        }
        if !self.is_in_use(&step.next) {
            self.raise(map, &step.change.add)?;
        }
        match self.exchange(cookie, Some(&step.next)) {
            Some(_last) => self.lower(map, &step.change.remove),
            None => Ok(()),
        }
    }

    pub fn remove(&mut self, map: &impl FenceMap, cookie: u64) -> Result<(), TableError> {
        match self.exchange(cookie, None) {
            Some(before) => self.lower(map, &before),
            None => Ok(()),
        }
    }

    fn is_in_use(&self, fence: &Arc<Fence>) -> bool {
        (self.in_use.iter()).any(|(held, _)| Arc::ptr_eq(held, fence))
    }

    /// Answers the fence that the pod had, if no pod has it any more.
    fn exchange(&mut self, cookie: u64, next: Option<&Arc<Fence>>) -> Option<Arc<Fence>> {
        let before = match next {
            Some(next) => {
                match (self.in_use.iter_mut()).find(|(held, _)| Arc::ptr_eq(held, next)) {
                    Some((_, pods)) => *pods += 1,
                    None => self.in_use.push((next.clone(), 1)),
                }
                self.pods.insert(cookie, next.clone())
            }
            None => self.pods.remove(&cookie),
        }?;
        let at = (self.in_use.iter()).position(|(held, _)| Arc::ptr_eq(held, &before))?;
        self.in_use[at].1 -= 1;
        (self.in_use[at].1 == 0).then(|| self.in_use.swap_remove(at).0)
    }

    /// Makes all of these stand.
    fn raise(&mut self, map: &impl FenceMap, fence: &Fence) -> Result<(), TableError> {
        for (ip, kind) in kinds(fence) {
            let found = self.standing.get(&ip).copied().unwrap_or_default();
            if found & kind == 0 {
                map.set(ip, found | kind)?;
                self.standing.insert(ip, found | kind);
            }
        }
        Ok(())
    }

    /// Takes away what no fence in use has of these.
    fn lower(&mut self, map: &impl FenceMap, fence: &Fence) -> Result<(), TableError> {
        for ip in &fence.enrolled | &fence.mandatory {
            let wanted = (self.in_use.iter()).fold(0, |wanted, (held, _)| {
                let enrolled = u32::from(held.enrolled.contains(&ip)) * ENROLLED;
                let mandatory = u32::from(held.mandatory.contains(&ip)) * MANDATORY;
                wanted | enrolled | mandatory
            });
            if self.standing.get(&ip).copied().unwrap_or_default() == wanted {
                continue;
            }
            match wanted {
                0 => {
                    map.remove(ip)?;
                    self.standing.remove(&ip);
                }
                _ => {
                    map.set(ip, wanted)?;
                    self.standing.insert(ip, wanted);
                }
            }
        }
        Ok(())
    }
}

fn kinds(fence: &Fence) -> impl Iterator<Item = (IpAddr, u32)> {
    let enrolled = fence.enrolled.iter().map(|ip| (*ip, ENROLLED));
    enrolled.chain(fence.mandatory.iter().map(|ip| (*ip, MANDATORY)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    #[derive(Default)]
    struct Written {
        map: RefCell<BTreeMap<IpAddr, u32>>,
        writes: Cell<usize>,
    }

    impl FenceMap for Written {
        fn set(&self, ip: IpAddr, kinds: u32) -> Result<(), TableError> {
            self.writes.set(self.writes.get() + 1);
            self.map.borrow_mut().insert(ip, kinds);
            Ok(())
        }

        fn remove(&self, ip: IpAddr) -> Result<(), TableError> {
            self.writes.set(self.writes.get() + 1);
            self.map.borrow_mut().remove(&ip);
            Ok(())
        }
    }

    fn fence(enrolled: std::ops::Range<u32>, mandatory: std::ops::Range<u32>) -> Arc<Fence> {
        let ips = |range: std::ops::Range<u32>| {
            (range.map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes()))).collect()
        };
        Arc::new(Fence {
            enrolled: ips(enrolled),
            mandatory: ips(mandatory),
        })
    }

    /// By the definition: an address stands as long as any pod has it, as all that any pod has it as.
    fn expected(fences: &Fences) -> BTreeMap<IpAddr, u32> {
        let mut union = BTreeMap::new();
        for (ip, kind) in fences.pods.values().flat_map(|fence| kinds(fence)) {
            *union.entry(ip).or_default() |= kind;
        }
        union
    }

    #[test]
    fn an_address_stands_as_long_as_any_pod_has_it() {
        let (mut fences, map) = (Fences::default(), Written::default());
        let generations = [
            fence(0..4, 0..2),
            fence(1..5, 0..3),
            fence(0..0, 2..4),
            fence(0..6, 0..6),
            fence(3..3, 0..0),
        ];
        // Any order of pods, each ahead of or behind the others.
        for (turn, at) in (0..200usize).map(|n| (n, n * 7 + n / 3)) {
            let cookie = (at % 5) as u64;
            let next = &generations[(at * 3 + turn) % generations.len()];
            match (turn % 4, fences.pods.get(&cookie).cloned()) {
                (0, _) => fences.set(&map, cookie, next).unwrap(),
                (1, Some(_)) if turn % 3 == 0 => fences.remove(&map, cookie).unwrap(),
                (_, Some(held)) => {
                    let step = FenceStep::between(&held, next);
                    fences.step(&map, cookie, &step).unwrap();
                }
                // It is not where it was believed to be.
                (_, None) => {
                    let step = FenceStep::between(&generations[0], next);
                    fences.step(&map, cookie, &step).unwrap();
                }
            }
            assert_eq!(*map.map.borrow(), expected(&fences), "turn {turn}");
        }
        for cookie in 0..5 {
            fences.remove(&map, cookie).unwrap();
        }
        assert!(map.map.borrow().is_empty() && fences.in_use.is_empty());
    }

    #[test]
    fn a_step_writes_what_it_changes_once_for_all_pods() {
        let (mut fences, map) = (Fences::default(), Written::default());
        let (one, next) = (fence(0..20_000, 0..20_000), fence(1..20_001, 1..20_001));
        for cookie in 0..100 {
            fences.set(&map, cookie, &one).unwrap();
        }
        map.writes.set(0);
        let step = FenceStep::between(&one, &next);
        for cookie in 0..100 {
            fences.step(&map, cookie, &step).unwrap();
        }
        assert_eq!(map.writes.get(), 3, "enrolled, mandatory, removed");
        assert_eq!(*map.map.borrow(), expected(&fences));
    }
}
