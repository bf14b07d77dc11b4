// SPDX-License-Identifier: Apache-2.0
use crate::config::LimitsConfig;
use podveil_identity::ProgramIdentity;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A bucket holds this many seconds' worth of requests, so that a node's start is not slowed down.
const BURST_SECONDS: f64 = 2.0;
/// Above this many, full buckets are forgotten: a full one says nothing.
const MAX_PROGRAMS: usize = 10_000;

/// Token buckets: one for all, one for each program, one for all first contacts. Checked before anything costly.
#[derive(Debug)]
pub struct Admission {
    buckets: Mutex<Buckets>,
    per_program: f64,
}

#[derive(Debug)]
struct Buckets {
    all: Bucket,
    first_contacts: Bucket,
    programs: HashMap<ProgramIdentity, Bucket>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_second: f64,
    level: f64,
    at: Instant,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub enum Caller<'a> {
    FirstContact,
    Program(&'a ProgramIdentity),
}

/// Too many requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Exhausted {
    pub retry_after: Duration,
}

impl Admission {
    pub fn new(limits: LimitsConfig, now: Instant) -> Self {
        Self {
            buckets: Mutex::new(Buckets {
                all: Bucket::full(limits.requests_per_second.into(), now),
                first_contacts: Bucket::full(limits.first_contacts_per_second.into(), now),
                programs: HashMap::new(),
            }),
            per_program: limits.requests_per_second_per_program.into(),
        }
    }

    /// # Errors
    /// [`Exhausted`] with the time until there is room again.
    pub fn admit(&self, caller: Caller<'_>, now: Instant) -> Result<(), Exhausted> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = &mut *buckets;
        // The caller's own bucket first: one that asks too much takes nothing from the others.
        match caller {
            Caller::FirstContact => buckets.first_contacts.take(now)?,
            Caller::Program(program) => {
                if !buckets.programs.contains_key(program) {
                    if buckets.programs.len() >= MAX_PROGRAMS {
                        buckets.programs.retain(|_, bucket| !bucket.is_full(now));
                    }
                    buckets
                        .programs
                        .insert(program.clone(), Bucket::full(self.per_program, now));
                }
                buckets
                    .programs
                    .get_mut(program)
                    .expect("inserted just above")
                    .take(now)?;
            }
        }
        buckets.all.take(now)
    }
}

impl Bucket {
    fn full(per_second: f64, now: Instant) -> Self {
        Self {
            per_second,
            level: (per_second * BURST_SECONDS).max(1.0),
            at: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        self.level = (self.level + gained).min((self.per_second * BURST_SECONDS).max(1.0));
        self.at = now;
    }

    fn is_full(mut self, now: Instant) -> bool {
        self.refill(now);
        self.level >= self.per_second * BURST_SECONDS
    }

    fn take(&mut self, now: Instant) -> Result<(), Exhausted> {
        self.refill(now);
        if self.level >= 1.0 {
            self.level -= 1.0;
            return Ok(());
        }
        let missing = (1.0 - self.level) / self.per_second.max(0.001);
        Err(Exhausted {
            retry_after: Duration::from_secs_f64(missing),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: LimitsConfig = LimitsConfig {
        requests_per_second: 10,
        requests_per_second_per_program: 4,
        first_contacts_per_second: 1,
    };

    fn node(name: &str) -> ProgramIdentity {
        ProgramIdentity::Node(name.parse().unwrap())
    }

    fn admitted(admission: &Admission, caller: Caller<'_>, now: Instant) -> usize {
        (0..100)
            .filter(|_| admission.admit(caller, now).is_ok())
            .count()
    }

    #[test]
    fn one_program_cannot_starve_another() {
        let now = Instant::now();
        let admission = Admission::new(LIMITS, now);
        assert_eq!(admitted(&admission, Caller::Program(&node("n1")), now), 8);
        assert_eq!(admitted(&admission, Caller::Program(&node("n2")), now), 8);
        assert_eq!(admitted(&admission, Caller::FirstContact, now), 2);
        assert_eq!(
            admitted(&admission, Caller::Program(&node("n3")), now),
            2,
            "what is left of 20 for all"
        );
    }

    #[test]
    fn room_comes_back_when_it_was_promised() {
        let now = Instant::now();
        let admission = Admission::new(LIMITS, now);
        let caller = Caller::FirstContact;
        admitted(&admission, caller, now);
        let Exhausted { retry_after } = admission.admit(caller, now).unwrap_err();
        assert_eq!(retry_after, Duration::from_secs(1));
        assert!(admission.admit(caller, now + retry_after).is_ok());
        assert!(admission.admit(caller, now + retry_after).is_err());
    }
}
