// SPDX-License-Identifier: Apache-2.0
use podveil_identity::KubernetesName;
use podveil_model::{EndpointPorts, ServiceKey, Workload};
use std::collections::{BTreeMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

/// Fewer values than this are not worth looking through.
const MIN_SWEEP: usize = 1024;

/// Lets equal parts of workloads be one in memory: all pods of a Deployment differ in little more than name and address.
#[derive(Debug, Default)]
pub(super) struct Interner {
    texts: Pool<Arc<str>>,
    names: Pool<KubernetesName>,
    services: Pool<Arc<BTreeMap<ServiceKey, EndpointPorts>>>,
}

impl Interner {
    /// Of one that nobody else holds yet.
    pub(super) fn share(&mut self, workload: &mut Arc<Workload>) {
        let Some(workload) = Arc::get_mut(workload) else {
            return;
        };
        for text in [
            &mut workload.workload_name,
            &mut workload.canonical_name,
            &mut workload.canonical_revision,
            &mut workload.cluster,
            &mut workload.locality.region,
            &mut workload.locality.zone,
            &mut workload.locality.subzone,
        ] {
            self.texts.share(text);
        }
        for name in [
            &mut workload.node,
            &mut workload.identity.namespace,
            &mut workload.identity.service_account,
        ] {
            self.names.share(name);
        }
        self.services.share(&mut workload.services);
    }
}

/// Is this value held by anybody else?
trait Shared {
    fn is_shared(&self) -> bool;
}

impl<T: ?Sized> Shared for Arc<T> {
    fn is_shared(&self) -> bool {
        Arc::strong_count(self) > 1
    }
}

impl Shared for KubernetesName {
    fn is_shared(&self) -> bool {
        Self::is_shared(self)
    }
}

/// Values that are in use, each once. Those that no longer are go when there are twice as many as were in use before.
#[derive(Debug)]
struct Pool<T> {
    values: HashSet<T>,
    sweep_at: usize,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self {
            values: HashSet::new(),
            sweep_at: MIN_SWEEP,
        }
    }
}

impl<T: Clone + Eq + Hash + Shared> Pool<T> {
    fn share(&mut self, value: &mut T) {
        if let Some(held) = self.values.get(value) {
            *value = held.clone();
            return;
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(T::is_shared);
            self.sweep_at = MIN_SWEEP.max(2 * self.values.len());
        }
        self.values.insert(value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_go_when_nobody_has_them() {
        let mut pool = Pool::default();
        let (mut one, mut other): (Arc<str>, Arc<str>) = ("same".into(), "same".into());
        pool.share(&mut one);
        pool.share(&mut other);
        assert!(Arc::ptr_eq(&one, &other));
        for number in 0..10 * MIN_SWEEP {
            pool.share(&mut Arc::from(number.to_string()));
            assert!(pool.values.len() <= MIN_SWEEP);
        }
        let mut again: Arc<str> = "same".into();
        pool.share(&mut again);
        assert!(Arc::ptr_eq(&one, &again), "one that is in use stays");
    }
}
