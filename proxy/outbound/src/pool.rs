// SPDX-License-Identifier: Apache-2.0
//! Tunnels of one pod, shared by its connections to the same destination.
//!
//! No lock is held while a tunnel is made: the first connection that needs one starts a task, the others wait for that
//! task's outcome, and connections to other destinations notice nothing.

use podveil_hbone::NoSlot;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What the pool needs of a tunnel. Clones are the same tunnel.
pub(crate) trait Carrier: Clone + Send + Sync + 'static {
    type Slot: Send + 'static;

    fn try_reserve(&self) -> Result<Self::Slot, NoSlot>;

    /// Waits while the peer has not yet said how many streams it takes.
    fn reserve(&self) -> impl Future<Output = Result<Self::Slot, NoSlot>> + Send;

    fn streams(&self) -> usize;

    /// It will never take a stream again.
    fn is_spent(&self) -> bool;

    /// Cancelled: the tunnel ends, and has ended. Holding it does not keep the tunnel.
    fn end(&self) -> CancellationToken;
}

/// Makes tunnels.
pub(crate) trait Connect: Send + Sync + 'static {
    type Key: Clone + Eq + fmt::Debug + Hash + Send + Sync + 'static;
    type Tunnel: Carrier;
    type Error: Send + Sync + 'static;

    fn connect(
        &self,
        key: &Self::Key,
    ) -> impl Future<Output = Result<Self::Tunnel, Self::Error>> + Send;
}

/// What becomes of a tunnel that something has changed for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fate {
    Keep,
    /// Takes no new stream; ends with its last one.
    Retire,
    /// Ends now, by reset.
    Terminate,
}

#[derive(Debug)]
pub(crate) enum LeaseError<E> {
    /// This pod has as many tunnels as it may, and all of them are in use.
    Limit,
    /// The tunnel could not be made. The same failure is told to all that waited for it.
    Failed(Arc<E>),
    Stopped,
}

/// The outcome of making a tunnel, told to all that wait for it.
type Outcome<E> = Option<Result<(), Arc<E>>>;

pub(crate) struct Pool<C: Connect> {
    connector: C,
    max_tunnels: usize,
    idle: Duration,
    tasks: TaskTracker,
    stop: CancellationToken,
    table: Mutex<Table<C>>,
}

struct Table<C: Connect> {
    tunnels: HashMap<C::Key, Vec<Member<C::Tunnel>>>,
    making: HashMap<C::Key, watch::Receiver<Outcome<C::Error>>>,
    /// Tunnels that take no new stream and still carry some.
    retired: Vec<(C::Key, CancellationToken)>,
}

struct Member<T> {
    tunnel: T,
    /// Since when it is seen without a stream.
    idle_since: Option<Instant>,
}

impl<C: Connect> fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("tunnels", &self.len())
            .finish_non_exhaustive()
    }
}

/// What a connection does next.
enum Step<C: Connect> {
    Take(C::Tunnel, <C::Tunnel as Carrier>::Slot),
    /// The tunnel is new; its peer has not yet said how many streams it takes.
    Settle(C::Tunnel),
    Await(watch::Receiver<Outcome<C::Error>>),
}

impl<C: Connect> Pool<C> {
    pub fn new(
        connector: C,
        max_tunnels: usize,
        idle: Duration,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            connector,
            max_tunnels,
            idle,
            tasks,
            stop,
            table: Mutex::new(Table {
                tunnels: HashMap::new(),
                making: HashMap::new(),
                retired: Vec::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Table<C>> {
        // No statement leaves the table half changed, so a panic elsewhere cannot have broken it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tunnel with a place for one stream: one that is there, or a new one.
    ///
    /// CANCEL: a tunnel that is being made is still made, and serves whoever comes next.
    pub async fn lease(
        self: &Arc<Self>,
        key: &C::Key,
    ) -> Result<(C::Tunnel, <C::Tunnel as Carrier>::Slot), LeaseError<C::Error>> {
        loop {
            match self.step(key)? {
                Step::Take(tunnel, slot) => return Ok((tunnel, slot)),
                Step::Settle(tunnel) => {
                    if let Ok(slot) = tunnel.reserve().await {
                        return Ok((tunnel, slot));
                    }
                }
                Step::Await(mut outcome) => match outcome.wait_for(Option::is_some).await {
                    Ok(told) => {
                        if let Some(Err(error)) = &*told {
                            return Err(LeaseError::Failed(error.clone()));
                        }
                    }
                    Err(_) => return Err(LeaseError::Stopped),
                },
            }
        }
    }

    fn step(self: &Arc<Self>, key: &C::Key) -> Result<Step<C>, LeaseError<C::Error>> {
        let mut table = self.lock();
        if let Some(step) = table.take(key) {
            return Ok(step);
        }
        if self.stop.is_cancelled() {
            return Err(LeaseError::Stopped);
        }
        // A closed channel is of a task that died before it could say anything.
        if let Some(outcome) = table
            .making
            .get(key)
            .filter(|one| one.has_changed().is_ok())
        {
            return Ok(Step::Await(outcome.clone()));
        }
        if table.len() >= self.max_tunnels && !table.drop_one_idle() {
            return Err(LeaseError::Limit);
        }
        let (tell, outcome) = watch::channel(None);
        table.making.insert(key.clone(), outcome.clone());
        self.tasks.spawn(self.clone().make(key.clone(), tell));
        Ok(Step::Await(outcome))
    }

    async fn make(self: Arc<Self>, key: C::Key, tell: watch::Sender<Outcome<C::Error>>) {
        // However this task ends, nobody waits for it afterwards.
        let made = self
            .stop
            .run_until_cancelled(self.connector.connect(&key))
            .await;
        let mut table = self.lock();
        table.making.remove(&key);
        let outcome = match made {
            Some(Ok(tunnel)) => {
                let member = Member {
                    tunnel,
                    idle_since: None,
                };
                table.tunnels.entry(key).or_default().push(member);
                Ok(())
            }
            Some(Err(error)) => Err(Arc::new(error)),
            None => return,
        };
        drop(table);
        tell.send_replace(Some(outcome));
    }

    /// Decides about every tunnel anew, because something has changed.
    pub fn review(&self, fate: impl Fn(&C::Key) -> Fate) {
        let mut table = self.lock();
        let Table {
            tunnels, retired, ..
        } = &mut *table;
        tunnels.retain(|key, members| match fate(key) {
            Fate::Keep => true,
            Fate::Retire => {
                retired.extend(
                    members
                        .iter()
                        .map(|member| (key.clone(), member.tunnel.end())),
                );
                false
            }
            Fate::Terminate => {
                for member in members {
                    member.tunnel.end().cancel();
                }
                false
            }
        });
        retired.retain(|(key, end)| {
            if fate(key) == Fate::Terminate {
                end.cancel();
            }
            !end.is_cancelled()
        });
    }

    /// Lets go of tunnels that have ended or were idle for long.
    pub fn sweep(&self, now: Instant) {
        let mut table = self.lock();
        let Table {
            tunnels, retired, ..
        } = &mut *table;
        tunnels.retain(|key, members| {
            members.retain_mut(|member| {
                if member.tunnel.is_spent() {
                    // It may still carry some.
                    retired.push((key.clone(), member.tunnel.end()));
                    return false;
                }
                if member.tunnel.streams() > 0 {
                    member.idle_since = None;
                } else if member.idle_since.is_none() {
                    member.idle_since = Some(now);
                }
                let idle_for = member.idle_since.map(|since| now.duration_since(since));
                idle_for.is_none_or(|idle| idle < self.idle)
            });
            !members.is_empty()
        });
        retired.retain(|(_, end)| !end.is_cancelled());
    }

    /// Tunnels open, retired, or being made.
    pub fn len(&self) -> usize {
        self.lock().len()
    }
}

impl<C: Connect> Table<C> {
    fn len(&self) -> usize {
        let open: usize = self.tunnels.values().map(Vec::len).sum();
        open + self.making.len() + self.retired.len()
    }

    /// A place on a tunnel that is there. Tunnels found spent are let go.
    fn take(&mut self, key: &C::Key) -> Option<Step<C>> {
        let Entry::Occupied(mut entry) = self.tunnels.entry(key.clone()) else {
            return None;
        };
        let mut settling = None;
        let mut taken = None;
        entry.get_mut().retain_mut(|member| {
            if taken.is_some() {
                return true;
            }
            if member.tunnel.is_spent() {
                self.retired.push((key.clone(), member.tunnel.end()));
                return false;
            }
            match member.tunnel.try_reserve() {
                Ok(slot) => {
                    member.idle_since = None;
                    taken = Some(Step::Take(member.tunnel.clone(), slot));
                }
                Err(NoSlot::Settling) => settling = Some(Step::Settle(member.tunnel.clone())),
                Err(NoSlot::Full) => {}
                Err(NoSlot::Closing) => {
                    self.retired.push((key.clone(), member.tunnel.end()));
                    return false;
                }
            }
            true
        });
        if entry.get().is_empty() {
            entry.remove();
        }
        taken.or(settling)
    }

    /// Makes room by closing one tunnel that carries nothing.
    fn drop_one_idle(&mut self) -> bool {
        self.retired.retain(|(_, end)| !end.is_cancelled());
        for members in self.tunnels.values_mut() {
            if let Some(idle) = members
                .iter()
                .position(|member| member.tunnel.streams() == 0)
            {
                members.swap_remove(idle);
                self.tunnels.retain(|_, members| !members.is_empty());
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
