// SPDX-License-Identifier: Apache-2.0
use crate::View;
use crate::uses::{Pin, Uses};
use arc_swap::ArcSwap;
use podveil_model::{Lookup, Uid};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

/// Words waiting for the writer. When full an address is not asked for; its connection asks again, or waits for a push.
const QUESTIONS: usize = 1024;

/// What readers have to say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Word {
    /// A workload's own addresses are these, as long as the control plane tells none.
    Local { uid: Uid, addresses: Vec<IpAddr> },
    /// This is needed, and goes on being needed for `Need`.
    Wanted { lookup: Lookup, need: Need },
}

/// For how long something asked for is needed, the longer the greater. It has a meaning only where the state is held on demand.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Need {
    /// For one look at it.
    Once,
    /// A connection needs it, and the next one may.
    Used,
}

/// Makes the two ends of the state: one writer, any number of readers, and the words of the readers. `on_demand`: it will
/// hold no more than is asked for.
pub fn channel(on_demand: bool) -> (StateWriter, StateHandle, mpsc::Receiver<Word>) {
    let view = match on_demand {
        true => View::on_demand(),
        false => View::default(),
    };
    let view = Arc::new(ArcSwap::from_pointee(view));
    let (changes, changed) = watch::channel(0);
    let (words, said) = mpsc::channel(QUESTIONS);
    let uses = Arc::<Uses>::default();
    let handle = StateHandle {
        view: view.clone(),
        changed,
        words,
        uses: uses.clone(),
    };
    let writer = StateWriter {
        view,
        changes,
        uses,
    };
    (writer, handle, said)
}

/// The reading end. Clones share the state.
#[derive(Clone, Debug)]
pub struct StateHandle {
    view: Arc<ArcSwap<View>>,
    changed: watch::Receiver<u64>,
    words: mpsc::Sender<Word>,
    uses: Arc<Uses>,
}

impl StateHandle {
    /// The newest state; it does not change while it is held.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Tells of each change. Take it before [`Self::view`], or a change in between is missed.
    pub fn changed(&self) -> watch::Receiver<u64> {
        let mut changed = self.changed.clone();
        changed.mark_unchanged();
        changed
    }

    /// Asks the control plane who has this address, unless it has been told. The answer arrives as a change, if it arrives.
    pub fn ask(&self, ip: IpAddr) {
        let view = self.view();
        if view.is_on_demand() {
            self.use_all(view.lookup_of_peer(ip));
        } else if !view.is_negative(ip) {
            let _full_or_stopping = self.say(Lookup::Address(ip), Need::Used);
        }
    }

    /// Where the state is held on demand: a connection needs [these](View::lookups). They are asked for, and go on being
    /// held while connections come back to them.
    pub fn use_all(&self, lookups: Vec<Lookup>) {
        for lookup in lookups {
            self.want(lookup, Need::Used);
        }
    }

    /// Where the state is held on demand: asks for it, unless that has been said lately. If too many words wait it has not, and
    /// the next one who needs it says so again.
    pub fn want(&self, lookup: Lookup, need: Need) {
        if self.uses.note(&lookup, need) && !self.say(lookup.clone(), need) {
            self.uses.forget([&lookup]);
        }
    }

    fn say(&self, lookup: Lookup, need: Need) -> bool {
        self.words.try_send(Word::Wanted { lookup, need }).is_ok()
    }

    /// As long as the answer lives, this workload is held although nobody asks for it.
    pub fn pin(&self, uid: &Uid) -> Option<Pin> {
        (self.view().is_on_demand()).then(|| Uses::pin(&self.uses, uid))
    }

    /// Tells what the node says of a workload of its own that the control plane has no address of yet.
    pub async fn tell_local(&self, uid: Uid, addresses: Vec<IpAddr>) {
        let _stopping = self.words.send(Word::Local { uid, addresses }).await;
    }

    /// Waits until `look` finds what it wants in the state; `None` when the deadline passes first.
    pub async fn wait<T>(
        &self,
        deadline: Instant,
        mut look: impl FnMut(&View) -> Option<T>,
    ) -> Option<T> {
        let mut changed = self.changed();
        loop {
            if let Some(found) = look(&self.view()) {
                return Some(found);
            }
            match timeout_at(deadline, changed.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return look(&self.view()),
            }
        }
    }
}

/// The writing end: one per process.
#[derive(Debug)]
pub struct StateWriter {
    view: Arc<ArcSwap<View>>,
    changes: watch::Sender<u64>,
    pub(crate) uses: Arc<Uses>,
}

impl StateWriter {
    pub(crate) fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Makes `change` visible to every reader at once.
    pub fn update(&self, change: impl FnOnce(&mut View)) {
        let mut view = View::clone(&self.view.load());
        change(&mut view);
        self.view.store(Arc::new(view));
        self.changes.send_modify(|number| *number += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_the_change_it_waits_for() {
        let (writer, handle, _asked) = channel(false);
        let deadline = Instant::now() + Duration::from_secs(5);
        let waiting = tokio::spawn({
            let handle = handle.clone();
            async move {
                handle
                    .wait(deadline, |view| view.is_synced().then_some(()))
                    .await
            }
        });
        tokio::task::yield_now().await;
        writer.update(|_| {});
        tokio::task::yield_now().await;
        writer.update(View::set_synced);
        assert_eq!(waiting.await.unwrap(), Some(()));
        assert!(Instant::now() < deadline);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_its_deadline() {
        let (_writer, handle, _asked) = channel(false);
        let deadline = Instant::now() + Duration::from_secs(5);
        assert_eq!(handle.wait(deadline, |_| None::<()>).await, None);
        assert_eq!(Instant::now(), deadline);
    }
}
