// SPDX-License-Identifier: Apache-2.0
use crate::rotation::{Acknowledged, Presence};
use podveil_identity::ProgramIdentity;
use podveil_proto::podveil::node::v1 as wire;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// A program that has been away this long is forgotten.
const FORGET: Duration = Duration::from_secs(3600);
/// Three processes on each of more nodes than any cluster has. Beyond it a new one is turned away.
const MAX_CONSUMERS: usize = 30_000;
/// Of one consumer: two processes, and what a broken network has left of one of them. Beyond it the oldest gives way.
const MAX_STREAMS: usize = 3;

/// Which process acknowledges: two of one node have one identity and each its own certificate.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Name {
    pub program: ProgramIdentity,
    pub module: Module,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Module {
    /// A program without modules.
    None,
    Proxy,
    Redirect,
}

/// What a consumer says it has in use.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct InUse {
    pub sequence: u64,
    pub generation: u64,
}

/// Everybody who takes the trust bundle, and what each has acknowledged.
#[derive(Debug)]
pub struct Consumers {
    table: Mutex<Table>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Table {
    streams: u64,
    entries: BTreeMap<Name, Entry>,
}

/// The streams of one consumer: of two processes while one of them is to follow the other.
#[derive(Debug)]
struct Entry {
    /// What each has in use.
    streams: BTreeMap<u64, InUse>,
    /// What the last one that ended had, and when it ended.
    left: (InUse, Instant),
}

impl Entry {
    fn in_use(&self) -> InUse {
        let of = |part: fn(&InUse) -> u64| self.streams.values().map(part).min();
        match (of(|one| one.sequence), of(|one| one.generation)) {
            (Some(sequence), Some(generation)) => InUse {
                sequence,
                generation,
            },
            _ => self.left.0,
        }
    }

    fn presence(&self) -> Presence {
        match self.streams.is_empty() {
            true => Presence::Gone { since: self.left.1 },
            false => Presence::Connected,
        }
    }
}

/// The table is full.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the CA serves no more than {MAX_CONSUMERS} consumers of the trust bundle")]
pub struct Full;

/// A consumer's stream; the consumer is gone when its last one is dropped.
#[derive(Debug)]
pub struct Connection {
    consumers: Arc<Consumers>,
    name: Name,
    stream: u64,
}

impl Consumers {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::default(),
            changed: watch::Sender::new(()),
        })
    }

    /// # Errors
    /// [`Full`]
    pub fn connect(self: &Arc<Self>, name: Name, now: Instant) -> Result<Connection, Full> {
        let stream = {
            let mut table = self.lock();
            table.forget_old(now);
            if table.entries.len() >= MAX_CONSUMERS && !table.entries.contains_key(&name) {
                return Err(Full);
            }
            table.streams += 1;
            let stream = table.streams;
            let entry = table.entries.entry(name.clone()).or_insert_with(|| Entry {
                streams: BTreeMap::new(),
                left: (InUse::default(), now),
            });
            if entry.streams.len() >= MAX_STREAMS {
                entry.streams.pop_first();
            }
            // A process that connects anew has acknowledged nothing: it may have been restarted.
            entry.streams.insert(stream, InUse::default());
            stream
        };
        self.changed.send_replace(());
        Ok(Connection {
            consumers: self.clone(),
            name,
            stream,
        })
    }

    /// Notices of any change; the state itself is [`list`](Self::list).
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub fn list(&self) -> Vec<(Name, InUse, Presence)> {
        self.lock()
            .entries
            .iter()
            .map(|(name, entry)| (name.clone(), entry.in_use(), entry.presence()))
            .collect()
    }

    /// As the rotation wants them.
    pub fn acknowledged(&self) -> Vec<Acknowledged> {
        self.list()
            .into_iter()
            .map(|(name, in_use, presence)| Acknowledged {
                name: name.to_string(),
                sequence: in_use.sequence,
                generation: in_use.generation,
                presence,
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn forget_old(&mut self, now: Instant) {
        self.entries.retain(|_, entry| match entry.presence() {
            Presence::Connected => true,
            Presence::Gone { since } => now.saturating_duration_since(since) < FORGET,
        });
    }
}

impl Connection {
    /// False when newer streams of the same consumer have taken its place: then this one is to end.
    pub fn acknowledge(&self, in_use: InUse) -> bool {
        let mut table = self.consumers.lock();
        let entry = table.entries.get_mut(&self.name);
        let current = match entry.and_then(|entry| entry.streams.get_mut(&self.stream)) {
            Some(held) => {
                *held = in_use;
                true
            }
            None => false,
        };
        drop(table);
        if current {
            self.consumers.changed.send_replace(());
        }
        current
    }

    pub fn is_current(&self) -> bool {
        self.consumers
            .lock()
            .entries
            .get(&self.name)
            .is_some_and(|entry| entry.streams.contains_key(&self.stream))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(entry) = self.consumers.lock().entries.get_mut(&self.name)
            && let Some(in_use) = entry.streams.remove(&self.stream)
        {
            // tokio's clock, as everywhere here, so that tests can pause it.
            entry.left = (in_use, tokio::time::Instant::now().into_std());
        }
        self.consumers.changed.send_replace(());
    }
}

impl Module {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Proxy => "proxy",
            Self::Redirect => "redirect",
        }
    }
}

impl From<wire::Module> for Module {
    fn from(module: wire::Module) -> Self {
        match module {
            wire::Module::Unspecified => Self::None,
            wire::Module::Proxy => Self::Proxy,
            wire::Module::Redirect => Self::Redirect,
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.module {
            Module::None => self.program.fmt(f),
            module => write!(f, "{} ({})", self.program, module.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> Name {
        Name {
            program: ProgramIdentity::Node("n1".parse().unwrap()),
            module: Module::Proxy,
        }
    }

    const ACKNOWLEDGED: InUse = InUse {
        sequence: 3,
        generation: 2,
    };

    #[test]
    fn what_was_acknowledged_is_remembered_after_the_stream() {
        let consumers = Consumers::new();
        let connection = consumers.connect(name(), Instant::now()).unwrap();
        assert!(connection.acknowledge(ACKNOWLEDGED));
        assert_eq!(
            consumers.list(),
            [(name(), ACKNOWLEDGED, Presence::Connected)]
        );
        drop(connection);
        let list = consumers.list();
        assert_eq!(list[0].1, ACKNOWLEDGED);
        assert!(matches!(list[0].2, Presence::Gone { .. }));
    }

    #[test]
    fn a_process_that_follows_another_counts_beside_it() {
        let consumers = Consumers::new();
        let first = consumers.connect(name(), Instant::now()).unwrap();
        assert!(first.acknowledge(ACKNOWLEDGED));
        let next = consumers.connect(name(), Instant::now()).unwrap();
        let in_use = || consumers.list()[0].1;
        assert_eq!(in_use(), InUse::default());
        assert!(next.acknowledge(InUse {
            sequence: 4,
            generation: 1,
        }));
        // Neither has what the other one lacks.
        let both = InUse {
            sequence: 3,
            generation: 1,
        };
        assert_eq!(in_use(), both);
        drop(next);
        assert_eq!(
            consumers.list(),
            [(name(), ACKNOWLEDGED, Presence::Connected)]
        );
        assert!(first.acknowledge(ACKNOWLEDGED));
    }

    #[test]
    fn of_too_many_streams_the_oldest_ends() {
        let consumers = Consumers::new();
        let connect = || consumers.connect(name(), Instant::now()).unwrap();
        let streams: Vec<_> = (0..=MAX_STREAMS).map(|_| connect()).collect();
        assert!(!streams[0].is_current() && !streams[0].acknowledge(ACKNOWLEDGED));
        assert!(streams[1..].iter().all(Connection::is_current));
    }

    #[test]
    fn two_modules_of_a_node_are_two_consumers() {
        let consumers = Consumers::new();
        let _proxy = consumers.connect(name(), Instant::now()).unwrap();
        let redirect = Name {
            module: Module::Redirect,
            ..name()
        };
        let _redirect = consumers.connect(redirect, Instant::now()).unwrap();
        assert_eq!(consumers.list().len(), 2);
    }

    #[test]
    fn who_is_long_gone_is_forgotten() {
        let consumers = Consumers::new();
        drop(consumers.connect(name(), Instant::now()).unwrap());
        let other = Name {
            program: ProgramIdentity::Controller,
            module: Module::None,
        };
        let _other = consumers
            .connect(other.clone(), Instant::now() + 2 * FORGET)
            .unwrap();
        assert_eq!(consumers.list().len(), 1);
        assert_eq!(consumers.list()[0].0, other);
    }
}
