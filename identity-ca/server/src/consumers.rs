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

#[derive(Debug)]
struct Entry {
    in_use: InUse,
    /// The newest stream of this consumer; only it may acknowledge.
    stream: u64,
    presence: Presence,
}

/// The table is full.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("the CA serves no more than {MAX_CONSUMERS} consumers of the trust bundle")]
pub struct Full;

/// A consumer's stream; the consumer is gone when it is dropped, unless a newer one has taken over.
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
            // A process that connects anew has acknowledged nothing: it may have been restarted.
            table.entries.insert(
                name.clone(),
                Entry {
                    in_use: InUse::default(),
                    stream,
                    presence: Presence::Connected,
                },
            );
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
            .map(|(name, entry)| (name.clone(), entry.in_use, entry.presence))
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
        self.entries.retain(|_, entry| match entry.presence {
            Presence::Connected => true,
            Presence::Gone { since } => now.saturating_duration_since(since) < FORGET,
        });
    }
}

impl Connection {
    /// False when a newer stream of the same consumer has taken over: then this one is to end.
    pub fn acknowledge(&self, in_use: InUse) -> bool {
        let current = match self.consumers.lock().entries.get_mut(&self.name) {
            Some(entry) if entry.stream == self.stream => {
                entry.in_use = in_use;
                true
            }
            _ => false,
        };
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
            .is_some_and(|entry| entry.stream == self.stream)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(entry) = self.consumers.lock().entries.get_mut(&self.name)
            && entry.stream == self.stream
        {
            entry.presence = Presence::Gone {
                // tokio's clock, as everywhere here, so that tests can pause it.
                since: tokio::time::Instant::now().into_std(),
            };
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
    fn a_newer_stream_takes_over() {
        let consumers = Consumers::new();
        let old = consumers.connect(name(), Instant::now()).unwrap();
        let new = consumers.connect(name(), Instant::now()).unwrap();
        assert!(!old.acknowledge(ACKNOWLEDGED) && !old.is_current());
        drop(old);
        assert_eq!(
            consumers.list(),
            [(name(), InUse::default(), Presence::Connected)]
        );
        assert!(new.acknowledge(ACKNOWLEDGED));
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
