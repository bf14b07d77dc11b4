// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::Semaphore;

/// A tunnel that only counts.
#[derive(Clone)]
struct Counted(Arc<State>);

struct State {
    max: usize,
    streams: AtomicUsize,
    spent: AtomicBool,
    end: CancellationToken,
}

struct Place(Arc<State>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Carrier for Counted {
    type Slot = Place;

    fn try_reserve(&self) -> Result<Place, NoSlot> {
        if self.is_spent() {
            return Err(NoSlot::Closing);
        }
        if self.streams() == self.0.max {
            return Err(NoSlot::Full);
        }
        self.0.streams.fetch_add(1, Ordering::Relaxed);
        Ok(Place(self.0.clone()))
    }

    async fn reserve(&self) -> Result<Place, NoSlot> {
        self.try_reserve()
    }

    fn streams(&self) -> usize {
        self.0.streams.load(Ordering::Relaxed)
    }

    fn is_spent(&self) -> bool {
        self.0.spent.load(Ordering::Relaxed)
    }

    fn end(&self) -> CancellationToken {
        self.0.end.clone()
    }
}

/// Destination and generation of the certificate.
type Key = (&'static str, u32);

/// Makes tunnels when it is let, and fails for the destination "dead".
struct Scripted {
    max: usize,
    handshakes: Arc<AtomicUsize>,
    let_go: Arc<Semaphore>,
}

impl Connect for Scripted {
    type Key = Key;
    type Tunnel = Counted;
    type Error = &'static str;

    async fn connect(&self, key: &Key) -> Result<Counted, &'static str> {
        self.handshakes.fetch_add(1, Ordering::Relaxed);
        if key.0 == "slow" {
            self.let_go.acquire().await.unwrap().forget();
        }
        if key.0 == "dead" {
            return Err("no route");
        }
        Ok(Counted(Arc::new(State {
            max: self.max,
            streams: AtomicUsize::new(0),
            spent: AtomicBool::new(false),
            end: CancellationToken::new(),
        })))
    }
}

const IDLE: Duration = Duration::from_secs(60);

struct Rig {
    pool: Arc<Pool<Scripted>>,
    handshakes: Arc<AtomicUsize>,
    let_go: Arc<Semaphore>,
    stop: CancellationToken,
}

fn rig(max_streams: usize, max_tunnels: usize) -> Rig {
    let handshakes = Arc::new(AtomicUsize::new(0));
    let let_go = Arc::new(Semaphore::new(0));
    let stop = CancellationToken::new();
    let connector = Scripted {
        max: max_streams,
        handshakes: handshakes.clone(),
        let_go: let_go.clone(),
    };
    Rig {
        pool: Pool::new(
            connector,
            max_tunnels,
            IDLE,
            TaskTracker::new(),
            stop.clone(),
        ),
        handshakes,
        let_go,
        stop,
    }
}

impl Rig {
    fn handshakes(&self) -> usize {
        self.handshakes.load(Ordering::Relaxed)
    }

    async fn lease(&self, key: Key) -> (Counted, Place) {
        let leased = self.pool.lease(&key).await;
        leased.unwrap_or_else(|_| panic!("no tunnel for {key:?}"))
    }
}

#[tokio::test]
async fn many_that_need_a_tunnel_share_one_handshake() {
    let rig = rig(100, 8);
    let waiting: Vec<_> = (0..50)
        .map(|_| {
            let pool = rig.pool.clone();
            tokio::spawn(async move { pool.lease(&("slow", 1)).await.is_ok() })
        })
        .collect();
    while rig.handshakes() == 0 {
        tokio::task::yield_now().await;
    }
    // Meanwhile another destination is served at once.
    rig.lease(("a", 1)).await;
    assert_eq!(rig.handshakes(), 2);
    rig.let_go.add_permits(1);
    for waiter in waiting {
        assert!(waiter.await.unwrap());
    }
    assert_eq!(rig.handshakes(), 2);
}

#[tokio::test]
async fn a_failure_is_told_to_all_and_not_kept() {
    let rig = rig(100, 8);
    for handshakes in 1..=2 {
        let failed = rig.pool.lease(&("dead", 1)).await;
        assert!(matches!(failed, Err(LeaseError::Failed(reason)) if *reason == "no route"));
        assert_eq!(rig.handshakes(), handshakes);
    }
    assert_eq!(rig.pool.len(), 0);
}

#[tokio::test]
async fn a_full_tunnel_is_followed_by_another() {
    let rig = rig(2, 8);
    let mut held = Vec::new();
    for (streams, tunnels) in [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)] {
        held.push(rig.lease(("a", 1)).await);
        assert_eq!(rig.handshakes(), tunnels, "{streams} streams");
    }
    // A place that becomes free is used before a new tunnel is made.
    held.remove(0);
    held.push(rig.lease(("a", 1)).await);
    assert_eq!(rig.handshakes(), 3);
}

#[tokio::test]
async fn a_renewed_certificate_gets_a_tunnel_of_its_own() {
    let rig = rig(100, 8);
    let (old, stream) = rig.lease(("a", 1)).await;
    rig.pool
        .review(|key| if key.1 == 2 { Fate::Keep } else { Fate::Retire });
    let (new, _stream) = rig.lease(("a", 2)).await;
    assert!(!Arc::ptr_eq(&old.0, &new.0));
    // What runs on the old one goes on, and it counts until it has ended.
    assert_eq!(old.streams(), 1);
    assert!(!old.0.end.is_cancelled());
    assert_eq!(rig.pool.len(), 2);
    drop(stream);
    old.0.end.cancel();
    rig.pool.sweep(Instant::now());
    assert_eq!(rig.pool.len(), 1);
}

#[tokio::test]
async fn a_removed_workload_ends_its_tunnels_also_the_retired() {
    let rig = rig(100, 8);
    let (retired, _one) = rig.lease(("a", 1)).await;
    rig.pool.review(|_| Fate::Retire);
    let (open, _two) = rig.lease(("a", 2)).await;
    let (other, _three) = rig.lease(("b", 2)).await;
    rig.pool.review(|key| {
        if key.0 == "a" {
            Fate::Terminate
        } else {
            Fate::Keep
        }
    });
    assert!(retired.0.end.is_cancelled());
    assert!(open.0.end.is_cancelled());
    assert!(!other.0.end.is_cancelled());
    assert_eq!(rig.pool.len(), 1);
}

#[tokio::test]
async fn a_dead_tunnel_is_not_handed_out() {
    let rig = rig(100, 8);
    let (dead, stream) = rig.lease(("a", 1)).await;
    drop(stream);
    dead.0.spent.store(true, Ordering::Relaxed);
    let (fresh, _stream) = rig.lease(("a", 1)).await;
    assert!(!Arc::ptr_eq(&dead.0, &fresh.0));
    assert_eq!(rig.handshakes(), 2);
}

#[tokio::test]
async fn a_spent_tunnel_that_carries_streams_still_ends_with_its_workload() {
    let rig = rig(100, 8);
    let (spent, _stream) = rig.lease(("a", 1)).await;
    spent.0.spent.store(true, Ordering::Relaxed);
    rig.pool.sweep(Instant::now());
    assert_eq!(rig.pool.len(), 1, "it counts until it has ended");
    rig.pool.review(|_| Fate::Terminate);
    assert!(spent.0.end.is_cancelled());
    assert_eq!(rig.pool.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_idle_tunnel_is_let_go_after_its_time() {
    let rig = rig(100, 8);
    let (_tunnel, stream) = rig.lease(("a", 1)).await;
    let begin = Instant::now();
    rig.pool.sweep(begin);
    rig.pool.sweep(begin + 2 * IDLE);
    assert_eq!(rig.pool.len(), 1, "it carries a stream");
    drop(stream);
    rig.pool.sweep(begin + 3 * IDLE);
    rig.pool.sweep(begin + 3 * IDLE + IDLE / 2);
    assert_eq!(rig.pool.len(), 1);
    rig.pool.sweep(begin + 4 * IDLE);
    assert_eq!(rig.pool.len(), 0);
}

#[tokio::test]
async fn the_bound_makes_room_of_idle_tunnels_only() {
    let rig = rig(1, 2);
    let (_a, stream) = rig.lease(("a", 1)).await;
    let (_b, _other) = rig.lease(("b", 1)).await;
    assert!(matches!(
        rig.pool.lease(&("c", 1)).await,
        Err(LeaseError::Limit)
    ));
    drop(stream);
    rig.lease(("c", 1)).await;
    assert_eq!(rig.pool.len(), 2);
}

#[tokio::test]
async fn a_stop_ends_the_wait_for_a_tunnel() {
    let rig = rig(1, 2);
    let pool = rig.pool.clone();
    let waiting = tokio::spawn(async move { pool.lease(&("slow", 1)).await.err() });
    while rig.handshakes() == 0 {
        tokio::task::yield_now().await;
    }
    rig.stop.cancel();
    assert!(matches!(waiting.await.unwrap(), Some(LeaseError::Stopped)));
}
