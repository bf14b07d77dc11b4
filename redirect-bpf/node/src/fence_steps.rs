// SPDX-License-Identifier: Apache-2.0
use podveil_plan::{Fence, FenceStep};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Fences that pods are on the way from and to at once: more are only slower.
const KEPT: usize = 16;

/// The steps that pods have taken lately. All pods of a node take the same ones, and to find out what changed takes a look
/// at every address of the cluster.
#[derive(Debug, Default)]
pub(crate) struct FenceSteps(Mutex<VecDeque<Arc<FenceStep>>>);

impl FenceSteps {
    pub fn between(&self, stands: &Arc<Fence>, next: &Arc<Fence>) -> Arc<FenceStep> {
        // Held meanwhile, so that others wait for it instead of doing the same.
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = (steps.iter())
            .find(|step| Arc::ptr_eq(&step.stands, stands) && Arc::ptr_eq(&step.next, next));
        if let Some(step) = known {
            return step.clone();
        }
        let step = Arc::new(FenceStep::between(stands, next));
        steps.truncate(KEPT - 1);
        steps.push_front(step.clone());
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_another_pod_has_taken_is_the_same_one() {
        let steps = FenceSteps::default();
        let fence = |ip: &str| {
            Arc::new(Fence {
                enrolled: [ip.parse().unwrap()].into(),
                ..Fence::default()
            })
        };
        let (one, other) = (fence("10.0.0.1"), fence("10.0.0.2"));
        let first = steps.between(&one, &other);
        assert_eq!(first.change.add, *other);
        assert_eq!(first.change.remove, *one);
        assert!(Arc::ptr_eq(&first, &steps.between(&one, &other)));
        assert!(!Arc::ptr_eq(&first, &steps.between(&other, &one)));
        for _ in 0..2 * KEPT {
            steps.between(&fence("10.0.0.3"), &one);
        }
        assert_eq!(*steps.between(&one, &other), *first);
    }
}
