// SPDX-License-Identifier: Apache-2.0
use rand::Rng;
use std::time::Duration;

/// Pauses between streams: doubled each time, and each drawn from the upper half of its length, so that the nodes of
/// a cluster do not come back in step.
#[derive(Debug)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            next: min,
        }
    }

    pub(super) fn reset(&mut self) {
        self.next = self.min;
    }

    pub(super) fn draw(&mut self, random: &mut impl Rng) -> Duration {
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(self.max);
        pause.mul_f64(random.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn pauses_double_up_to_the_longest_and_start_again_after_a_reset() {
        let (min, max) = (Duration::from_millis(10), Duration::from_secs(15));
        let mut random = StdRng::seed_from_u64(7);
        let mut backoff = Backoff::new(min, max);
        let mut whole = min;
        for _ in 0..20 {
            let pause = backoff.draw(&mut random);
            assert!(
                pause >= whole / 2 && pause <= whole,
                "{pause:?} of {whole:?}"
            );
            whole = (whole * 2).min(max);
        }
        backoff.reset();
        assert!(backoff.draw(&mut random) <= min);
    }
}
