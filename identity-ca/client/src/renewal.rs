// SPDX-License-Identifier: Apache-2.0
//! When to ask for which certificate. No I/O, no clock and no randomness of its own: every entry that needs time takes
//! `now`, every one that needs chance takes a `draw` uniform in `0.0..1.0`.
//!
//! ```text
//!           want              poll                    on_issued
//!  (absent) ────▶ waiting(due) ────▶ asking ──────────────────────────▶ waiting(renewal point)
//!                  ▲    ▲              │ on_failed: waiting(backoff)             │
//!                  │    └──────────────┘                                        │
//!                  └── renewal point reached, or a newer generation required ◀──┘
//! ```
//!
//! A certificate stays in use while its successor is asked for, until it expires. `forget` is possible in every state.
//! Time is the wall clock, since certificates are: after a suspended machine wakes, what is overdue is asked for at
//! once. A clock that was set back delays nothing by more than the longest backoff: a certificate that does not hold yet
//! is replaced at once.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, SystemTime};

/// The renewal point lies between these fractions of a certificate's life, drawn once per certificate: with the 24 h of
/// the default, at least 13 h are left whenever an outage of the CA begins, and a fleet never renews in step.
const RENEW_FROM: f64 = 0.35;
const RENEW_TO: f64 = 0.45;
/// A certificate that arrives old or short is not asked for again at once.
const LEAST_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct RenewalLimits {
    /// Certificates asked for at once.
    pub at_once: usize,
    /// Wait after the first failure; doubles with each further one.
    pub first_backoff: Duration,
    pub longest_backoff: Duration,
    /// A required re-issue begins within this time, at random, so that nodes do not ask in step.
    pub spread: Duration,
}

impl Default for RenewalLimits {
    fn default() -> Self {
        Self {
            at_once: 8,
            first_backoff: Duration::from_millis(200),
            longest_backoff: Duration::from_secs(30),
            spread: Duration::from_secs(1),
        }
    }
}

/// What the machine needs to know of a certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub generation: u64,
}

/// Ask the CA for this certificate now, and answer with [`Renewals::on_issued`] or [`Renewals::on_failed`] exactly once.
#[derive(Clone, Debug, Eq, PartialEq)]
#[must_use]
pub struct Attempt<K> {
    pub key: K,
    /// Failures since the last success.
    pub failures: u32,
    number: u64,
}

/// The certificates of one process, by key (whose certificate it is).
#[derive(Debug)]
pub struct Renewals<K> {
    limits: RenewalLimits,
    entries: HashMap<K, Entry>,
    required_generation: u64,
    asking: usize,
    attempts: u64,
}

#[derive(Debug)]
struct Entry {
    held: Option<Validity>,
    due: SystemTime,
    failures: u32,
    asking: Option<u64>,
}

impl<K: Clone + Eq + Hash> Renewals<K> {
    pub fn new(limits: RenewalLimits) -> Self {
        Self {
            limits,
            entries: HashMap::new(),
            required_generation: 0,
            asking: 0,
            attempts: 0,
        }
    }

    /// Asks at once for a certificate that is not held, even during the backoff after a failure: a new workload is
    /// news that may turn a refusal into a certificate.
    pub fn want(&mut self, key: K, now: SystemTime) {
        let entry = self.entries.entry(key).or_insert(Entry {
            held: None,
            due: now,
            failures: 0,
            asking: None,
        });
        if entry.held.is_none() {
            entry.due = entry.due.min(now);
        }
    }

    /// An attempt under way goes on; what it brings is then dropped.
    pub fn forget(&mut self, key: &K) {
        self.entries.remove(key);
    }

    /// Certificates older than `generation` are replaced now, spread by `draw`.
    pub fn require_generation(
        &mut self,
        generation: u64,
        now: SystemTime,
        mut draw: impl FnMut() -> f64,
    ) {
        if generation <= self.required_generation {
            return;
        }
        self.required_generation = generation;
        for entry in self.entries.values_mut() {
            if entry.held.is_some_and(|held| held.generation < generation) {
                entry.due = entry.due.min(now + self.limits.spread.mul_f64(draw()));
            }
        }
    }

    /// The most urgent attempt that is due: who has no certificate first, then whose expires first.
    pub fn poll(&mut self, now: SystemTime) -> Option<Attempt<K>> {
        if self.asking >= self.limits.at_once {
            return None;
        }
        let longest_backoff = self.limits.longest_backoff;
        let (key, entry) = self
            .entries
            .iter_mut()
            .filter(|(_, entry)| entry.asking.is_none() && entry.is_due(now, longest_backoff))
            .min_by_key(|(_, entry)| (entry.held.map(|held| held.not_after), entry.due))?;
        self.attempts += 1;
        self.asking += 1;
        entry.asking = Some(self.attempts);
        Some(Attempt {
            key: key.clone(),
            failures: entry.failures,
            number: self.attempts,
        })
    }

    /// False if the certificate is not wanted any more (forgotten meanwhile).
    #[must_use]
    pub fn on_issued(
        &mut self,
        attempt: &Attempt<K>,
        certificate: Validity,
        now: SystemTime,
        draw: f64,
    ) -> bool {
        let required_generation = self.required_generation;
        let limits = self.limits.clone();
        let Some(entry) = self.answered(attempt) else {
            return false;
        };
        entry.held = Some(certificate);
        if certificate.generation < required_generation {
            // Issued before the rotation reached the CA that answered: used, and asked for again.
            entry.back_off(&limits, now, draw);
        } else {
            entry.failures = 0;
            entry.due = certificate.renewal_point(now, draw);
        }
        true
    }

    pub fn on_failed(&mut self, attempt: &Attempt<K>, now: SystemTime, draw: f64) {
        let limits = self.limits.clone();
        if let Some(entry) = self.answered(attempt) {
            entry.back_off(&limits, now, draw);
        }
    }

    /// Whose certificates have expired since the last call. They count as not held from now on.
    pub fn expire(&mut self, now: SystemTime) -> Vec<K> {
        let mut expired = Vec::new();
        for (key, entry) in &mut self.entries {
            if entry.held.is_some_and(|held| held.not_after <= now) {
                entry.held = None;
                expired.push(key.clone());
            }
        }
        expired
    }

    /// When to call [`Renewals::expire`] and [`Renewals::poll`] again if nothing else happens before.
    pub fn next_wakeup(&self) -> Option<SystemTime> {
        let free = self.asking < self.limits.at_once;
        self.entries
            .values()
            .flat_map(|entry| {
                let due = (free && entry.asking.is_none()).then_some(entry.due);
                [due, entry.held.map(|held| held.not_after)]
            })
            .flatten()
            .min()
    }

    /// When the certificate is asked for next; `None` while it is being asked for, or if it is not wanted.
    pub fn due(&self, key: &K) -> Option<SystemTime> {
        let entry = self.entries.get(key)?;
        entry.asking.is_none().then_some(entry.due)
    }

    /// The lowest generation among the certificates held; `None` if there are none.
    pub fn lowest_generation(&self) -> Option<u64> {
        self.entries
            .values()
            .filter_map(|entry| Some(entry.held?.generation))
            .min()
    }

    fn answered(&mut self, attempt: &Attempt<K>) -> Option<&mut Entry> {
        self.asking = self.asking.saturating_sub(1);
        let entry = self.entries.get_mut(&attempt.key)?;
        // The key may have been forgotten and wanted again: then another attempt is the one that counts.
        if entry.asking != Some(attempt.number) {
            return None;
        }
        entry.asking = None;
        Some(entry)
    }
}

impl Entry {
    fn is_due(&self, now: SystemTime, longest_backoff: Duration) -> bool {
        let clock_was_set_back = match self.failures {
            0 => self.held.is_some_and(|held| held.not_before > now),
            _ => self.due > now + longest_backoff,
        };
        self.due <= now || clock_was_set_back
    }

    fn back_off(&mut self, limits: &RenewalLimits, now: SystemTime, draw: f64) {
        let doublings = self.failures.min(20);
        let backoff = limits
            .first_backoff
            .saturating_mul(1 << doublings)
            .min(limits.longest_backoff);
        self.failures = self.failures.saturating_add(1);
        self.due = now + backoff.mul_f64(0.5 + draw / 2.0);
    }
}

impl Validity {
    fn renewal_point(&self, now: SystemTime, draw: f64) -> SystemTime {
        let life = self
            .not_after
            .duration_since(self.not_before)
            .unwrap_or_default();
        let point = self.not_before + life.mul_f64(RENEW_FROM + (RENEW_TO - RENEW_FROM) * draw);
        let left = self.not_after.duration_since(now).unwrap_or_default();
        point.max(now + (left / 10).max(LEAST_INTERVAL))
    }
}

#[cfg(test)]
mod tests;
