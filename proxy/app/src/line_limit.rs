// SPDX-License-Identifier: Apache-2.0
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Refusals logged one by one in a burst, and again after a second without any.
const BURST: u32 = 200;
/// Refusals logged one by one in each second after that.
const PER_SECOND: u32 = 100;

/// Bounds the log lines about refused connections. A peer can cause as many refusals as it can open connections; each is
/// counted in the metric whatever this says, and a later line says how many had none of their own.
#[derive(Debug)]
pub struct LineLimit(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
    left_out: u64,
}

impl LineLimit {
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(Bucket {
            tokens: f64::from(BURST),
            filled: now,
            left_out: 0,
        }))
    }

    /// May this line be written? `Some` holds how many before it may not have been.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed: Duration = now.saturating_duration_since(bucket.filled);
        bucket.filled = bucket.filled.max(now);
        let refill = elapsed.as_secs_f64() * f64::from(PER_SECOND);
        bucket.tokens = (bucket.tokens + refill).min(f64::from(BURST));
        if bucket.tokens < 1.0 {
            bucket.left_out += 1;
            return None;
        }
        bucket.tokens -= 1.0;
        Some(std::mem::take(&mut bucket.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_in_part_and_what_was_left_out_is_told() {
        let start = Instant::now();
        let limit = LineLimit::new(start);
        let written = (0..1000).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(written, BURST as usize);
        let later = start + Duration::from_secs(1);
        assert_eq!(limit.admit(later), Some(800));
        assert_eq!(limit.admit(later), Some(0));
    }
}
