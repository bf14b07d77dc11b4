// SPDX-License-Identifier: Apache-2.0
use podveil_model::{Service, ServiceKey, Uid};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Services whose endpoint one pod has kept. When there are more, the one used longest ago is forgotten.
const SERVICES: usize = 1024;

/// The endpoints that one pod keeps, of services with session affinity.
#[derive(Debug, Default)]
pub struct Affinity {
    kept: Mutex<HashMap<ServiceKey, Kept>>,
}

#[derive(Debug)]
struct Kept {
    uid: Uid,
    at: Instant,
}

impl Affinity {
    /// The endpoint that was used last, if that is recent enough.
    pub(crate) fn endpoint(&self, service: &Service) -> Option<Uid> {
        let time = service.balancing.affinity?;
        let kept = self.lock();
        let kept = kept.get(&service.key)?;
        is_recent(kept, time).then(|| kept.uid.clone())
    }

    /// A connection to this endpoint of the service was made now.
    pub fn keep(&self, service: &Service, uid: &Uid) {
        let Some(time) = service.balancing.affinity else {
            return;
        };
        let mut kept = self.lock();
        if kept.len() >= SERVICES && !kept.contains_key(&service.key) {
            kept.retain(|_, one| is_recent(one, time));
            let oldest = kept.iter().min_by_key(|(_, one)| one.at);
            if let Some(key) = oldest.map(|(key, _)| key.clone())
                && kept.len() >= SERVICES
            {
                kept.remove(&key);
            }
        }
        let at = Instant::now();
        let uid = uid.clone();
        kept.insert(service.key.clone(), Kept { uid, at });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ServiceKey, Kept>> {
        // The table is whole between any two statements, so a panic elsewhere cannot have broken it.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_recent(kept: &Kept, time: Duration) -> bool {
    kept.at.elapsed() < time
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_testing::service;

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_is_kept_as_long_as_it_is_used() {
        let web = service("web").affinity(Duration::from_secs(10)).build();
        let affinity = Affinity::default();
        affinity.keep(&web, &"a".into());
        for _ in 0..3 {
            tokio::time::advance(Duration::from_secs(9)).await;
            assert_eq!(affinity.endpoint(&web), Some("a".into()));
            affinity.keep(&web, &"a".into());
        }
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(affinity.endpoint(&web), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded_and_forgets_the_oldest() {
        let affinity = Affinity::default();
        let service = |number: usize| {
            service(&format!("s{number}"))
                .affinity(Duration::from_secs(10_000))
                .build()
        };
        for number in 0..=SERVICES {
            affinity.keep(&service(number), &"a".into());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert_eq!(affinity.lock().len(), SERVICES);
        assert_eq!(affinity.endpoint(&service(0)), None);
        assert_eq!(affinity.endpoint(&service(SERVICES)), Some("a".into()));
    }
}
