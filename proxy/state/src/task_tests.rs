// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::{StateHandle, channel};
use podveil_model::{Answer, OriginalDst, Stage};
use podveil_testing::{mesh, policy, workload};
use podveil_xds_client::Acknowledge;
use std::net::{IpAddr, SocketAddr};

fn batch(resource_type: ResourceType, version: &str, updates: Vec<Update>) -> Batch {
    Batch {
        resource_type,
        version: version.into(),
        updates,
        rejected: Vec::new(),
        acknowledge: Acknowledge::unheard(),
    }
}

#[test]
fn every_kind_of_update_is_put_in_use() {
    let mut view = View::default();
    let not_found = Lookup::Address("10.0.0.9".parse().unwrap());
    for update in [
        Update::Workload(workload("a").address("10.0.0.2").build()),
        Update::Policy {
            name: "shop/p".into(),
            policy: policy("p").build(),
        },
        Update::NotFound(not_found),
    ] {
        apply(&mut view, update);
    }
    assert!(view.by_uid(&"a".into()).is_some());
    assert_eq!(view.policies().len(), 1);
    assert!(view.is_negative("10.0.0.9".parse().unwrap()));
    apply(&mut view, Update::AddressRemoved("a".into()));
    apply(&mut view, Update::PolicyRemoved("shop/p".into()));
    // Somebody appears at an address that was nobody's.
    apply(
        &mut view,
        Update::Workload(workload("b").address("10.0.0.9").build()),
    );
    assert!(view.by_uid(&"a".into()).is_none());
    assert!(view.policies().is_empty());
    assert!(!view.is_negative("10.0.0.9".parse().unwrap()));
}

#[tokio::test]
async fn a_version_is_in_use_once_readers_see_it() {
    let (writer, handle, words) = channel(false);
    let (batches, received) = mpsc::channel(4);
    let (in_use, mut version) = watch::channel(None);
    let stop = CancellationToken::new();
    let task = StateTask {
        writer,
        batches: received,
        demand: Demand::unanswered(1).0,
        words,
        in_use,
        on_demand: None,
    };
    let running = tokio::spawn(task.run(stop.clone()));
    let updates = vec![Update::Workload(workload("a").build())];
    let sent = batch(ResourceType::Address, "1-7", updates);
    batches.send(sent).await.unwrap();
    version.wait_for(Option::is_some).await.unwrap();
    assert_eq!(version.borrow().as_deref(), Some("1-7"));
    assert!(handle.view().is_synced());
    assert!(handle.view().by_uid(&"a".into()).is_some());
    stop.cancel();
    running.await.unwrap();
}

#[test]
fn what_the_node_says_of_its_own_holds_until_the_control_plane_tells_addresses() {
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let owner = |view: &View, at: &str| {
        view.by_address(ip(at))
            .map(|workload| workload.uid.to_string())
    };
    let (local, told) = ("10.0.0.1", "10.0.0.2");
    let new = |addresses: &[&str]| {
        let mut workload = (*workload("a").build()).clone();
        workload.addresses = addresses.iter().copied().map(ip).collect();
        Update::Workload(Arc::new(workload))
    };
    // In either order.
    for told_first in [true, false] {
        let mut view = View::default();
        if told_first {
            apply(&mut view, new(&[]));
        }
        view.set_local_addresses("a".into(), vec![ip(local)]);
        if !told_first {
            apply(&mut view, new(&[]));
        }
        assert_eq!(owner(&view, local).as_deref(), Some("a"));
        // Another sandbox of it.
        view.set_local_addresses("a".into(), vec![ip("10.0.0.3")]);
        assert_eq!(owner(&view, local), None);
        assert_eq!(owner(&view, "10.0.0.3").as_deref(), Some("a"));
        apply(&mut view, new(&[told]));
        view.set_local_addresses("a".into(), vec![ip(local)]);
        assert_eq!(owner(&view, local), None);
        assert_eq!(owner(&view, told).as_deref(), Some("a"));
        apply(&mut view, Update::AddressRemoved("a".into()));
        apply(&mut view, new(&[]));
        assert_eq!(owner(&view, local), None, "its end ends this too");
    }
}

/// A state held on demand, its task running in paused time.
struct Held {
    handle: StateHandle,
    batches: mpsc::Sender<Batch>,
    wishes: mpsc::Receiver<Wish>,
    status: watch::Sender<Status>,
    _stop: tokio_util::sync::DropGuard,
}

const KEEP: Duration = Duration::from_secs(3600);

impl Held {
    async fn start() -> Self {
        Self::start_with(KEEP).await
    }

    async fn start_with(keep: Duration) -> Self {
        let (writer, handle, words) = channel(true);
        let (batches, received) = mpsc::channel(4);
        let (demand, wishes) = Demand::unanswered(64);
        let stop = CancellationToken::new();
        let connected = Status {
            connected: true,
            ..Status::default()
        };
        let (status, status_now) = watch::channel(connected);
        let task = StateTask {
            writer,
            batches: received,
            demand,
            words,
            in_use: watch::Sender::default(),
            on_demand: Some(OnDemand {
                node: "n1".parse().unwrap(),
                keep,
                status: status_now,
            }),
        };
        tokio::spawn(task.run(stop.clone()));
        let mut held = Self {
            handle,
            batches,
            wishes,
            status,
            _stop: stop.drop_guard(),
        };
        assert_eq!(held.wishes().await, ["ask podveil.io/node/n1"]);
        held.told(vec![Update::Mesh(Arc::new(mesh()))]).await;
        held
    }

    /// What the client is asked for, once the task has heard everything.
    async fn wishes(&mut self) -> Vec<String> {
        for _ in 0..16 {
            tokio::task::yield_now().await;
        }
        let word = |wish| match wish {
            Wish::Ask(lookup) => format!("ask {lookup}"),
            Wish::Forget(lookups) => {
                let mut names: Vec<String> = lookups.iter().map(ToString::to_string).collect();
                names.sort();
                format!("forget {}", names.join(" "))
            }
        };
        std::iter::from_fn(|| self.wishes.try_recv().ok())
            .map(word)
            .collect()
    }

    async fn told(&mut self, updates: Vec<Update>) {
        let batch = batch(ResourceType::Address, "1-1", updates);
        self.batches.send(batch).await.unwrap();
        for _ in 0..16 {
            tokio::task::yield_now().await;
        }
    }

    /// One connection to an address needs what it needs.
    fn connects(&self, to: &str) -> Answer {
        let view = self.handle.view();
        let to: SocketAddr = to.parse().unwrap();
        self.handle.use_all(view.lookups(to));
        let source = workload("client").address("10.0.0.200").build();
        view.resolve(&source, OriginalDst(to))
    }

    /// Nothing happens for this long, but the looks for what is idle.
    async fn rest(&self, long: Duration) {
        tokio::time::sleep(long).await;
    }
}

fn found(ip: &str) -> Update {
    Update::Found(Lookup::Address(ip.parse().unwrap()))
}

fn web(uid: &str, ip: &str) -> Update {
    Update::Workload(
        workload(uid)
            .address(ip)
            .stage(Stage::Mandatory)
            .epoch(7, 4)
            .build(),
    )
}

#[tokio::test(start_paused = true)]
async fn on_demand_a_destination_is_asked_for_once_and_forgotten_when_it_has_long_not_been_used() {
    let mut held = Held::start().await;
    assert!(matches!(held.connects("10.0.0.1:80"), Answer::NotKnown(_)));
    held.connects("10.0.0.1:81");
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
    held.told(vec![web("w", "10.0.0.1"), found("10.0.0.1")])
        .await;
    assert!(matches!(held.connects("10.0.0.1:80"), Answer::Enrolled(_)));

    held.rest(KEEP / 2).await;
    held.connects("10.0.0.1:80");
    held.rest(KEEP * 3 / 4).await;
    assert_eq!(held.wishes().await, Vec::<String>::new(), "used since");
    held.rest(KEEP).await;
    assert_eq!(held.wishes().await, ["forget /10.0.0.1"]);
    // Until the client says so it is kept up to date, and from then on not believed.
    assert!(matches!(held.connects("10.0.0.1:80"), Answer::Enrolled(_)));
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
    let forgotten = Update::Forgotten(Lookup::Address("10.0.0.1".parse().unwrap()));
    held.told(vec![forgotten, Update::Unasked("w".into())])
        .await;
    assert!(matches!(held.connects("10.0.0.1:80"), Answer::NotKnown(_)));
    assert!(held.handle.view().by_uid(&"w".into()).is_none());
}

#[tokio::test(start_paused = true)]
async fn on_demand_nothing_is_forgotten_while_nobody_could_be_asked() {
    let mut held = Held::start().await;
    held.connects("10.0.0.1:80");
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
    held.told(vec![web("w", "10.0.0.1"), found("10.0.0.1")])
        .await;
    held.status.send_modify(|status| status.connected = false);
    held.rest(KEEP * 12).await;
    assert_eq!(held.wishes().await, Vec::<String>::new());
    assert!(matches!(held.connects("10.0.0.1:80"), Answer::Enrolled(_)));
}

#[tokio::test(start_paused = true)]
async fn on_demand_what_a_connection_needs_stays() {
    let mut held = Held::start().await;
    held.connects("10.0.0.1:80");
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
    held.told(vec![web("w", "10.0.0.1"), found("10.0.0.1")])
        .await;
    let pins = [held.handle.pin(&"w".into()), held.handle.pin(&"w".into())];
    held.rest(KEEP * 3).await;
    assert_eq!(held.wishes().await, Vec::<String>::new());
    // Nothing that was asked for means it any more: it is asked for by its own name.
    held.told(vec![Update::Unasked("w".into())]).await;
    assert_eq!(held.wishes().await, ["ask w"]);
    assert!(held.handle.view().by_uid(&"w".into()).is_some());
    held.rest(KEEP).await;
    assert!(held.handle.view().by_uid(&"w".into()).is_some());
    held.wishes().await;
    drop(pins);
    // It was never told by its own name: nobody else would let it go.
    held.rest(KEEP * 3).await;
    assert!(held.handle.view().by_uid(&"w".into()).is_none());
}

#[tokio::test(start_paused = true)]
async fn on_demand_the_end_of_what_only_connections_held_is_heard_by_its_own_name() {
    let mut held = Held::start().await;
    held.told(vec![web("w", "10.0.0.1"), found("10.0.0.1")])
        .await;
    let _pin = held.handle.pin(&"w".into());
    held.told(vec![Update::Unasked("w".into())]).await;
    assert_eq!(held.wishes().await, ["ask w"]);
    assert!(held.handle.view().by_uid(&"w".into()).is_some());
    held.told(vec![Update::NotFound(Lookup::Workload("w".into()))])
        .await;
    assert!(held.handle.view().by_uid(&"w".into()).is_none());
}

#[tokio::test(start_paused = true)]
async fn on_demand_what_is_used_is_held_however_soon_it_would_be_forgotten() {
    let keep = Duration::from_secs(2);
    let mut held = Held::start_with(keep).await;
    held.connects("10.0.0.1:80");
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
    held.told(vec![web("w", "10.0.0.1"), found("10.0.0.1")])
        .await;
    for _ in 0..20 {
        held.rest(keep / 4).await;
        held.connects("10.0.0.1:80");
    }
    assert_eq!(held.wishes().await, Vec::<String>::new());
    held.rest(keep * 2).await;
    assert_eq!(held.wishes().await, ["forget /10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn on_demand_an_answer_taken_back_is_waited_for_and_then_asked_for_again() {
    let mut held = Held::start().await;
    held.connects("10.0.0.1:80");
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
    let lookup = Lookup::Address("10.0.0.1".parse().unwrap());
    held.told(vec![
        Update::NotFound(lookup.clone()),
        Update::Forgotten(lookup),
    ])
    .await;
    assert!(matches!(held.connects("10.0.0.1:80"), Answer::NotKnown(_)));
    assert_eq!(held.wishes().await, Vec::<String>::new());
    held.rest(Duration::from_secs(80)).await;
    held.connects("10.0.0.1:80");
    assert_eq!(held.wishes().await, ["forget /10.0.0.1", "ask /10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn on_demand_what_is_not_answered_is_asked_for_again() {
    let mut held = Held::start().await;
    held.connects("10.0.0.1:80");
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
    held.rest(Duration::from_secs(40)).await;
    held.connects("10.0.0.1:80");
    held.rest(Duration::from_secs(40)).await;
    assert_eq!(held.wishes().await, ["forget /10.0.0.1"]);
    held.connects("10.0.0.1:80");
    assert_eq!(held.wishes().await, ["ask /10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn on_demand_what_was_let_go_does_not_come_back_by_an_older_decision() {
    let mut held = Held::start().await;
    held.told(vec![web("w", "10.0.0.1"), found("10.0.0.1")])
        .await;
    held.told(vec![Update::Unasked("w".into())]).await;
    let plain = workload("w")
        .address("10.0.0.2")
        .stage(Stage::None)
        .epoch(7, 3);
    let lagging = vec![Update::Workload(plain.build()), found("10.0.0.2")];
    held.told(lagging).await;
    let view = held.handle.view();
    let again = view.by_uid(&"w".into()).unwrap();
    // The decision that was held, and all else as it is told.
    assert_eq!(again.stage, Stage::Mandatory);
    assert_eq!(again.addresses, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
    let newer = workload("w")
        .address("10.0.0.2")
        .stage(Stage::None)
        .epoch(8, 0);
    held.told(vec![Update::Workload(newer.build())]).await;
    assert_eq!(
        held.handle.view().by_uid(&"w".into()).unwrap().stage,
        Stage::None
    );
}

#[tokio::test(start_paused = true)]
async fn on_demand_an_address_of_nobodys_is_asked_for_again_soon() {
    let mut held = Held::start().await;
    held.connects("10.0.0.9:80");
    assert_eq!(held.wishes().await, ["ask /10.0.0.9"]);
    let nobody = Lookup::Address("10.0.0.9".parse().unwrap());
    held.told(vec![Update::NotFound(nobody)]).await;
    assert!(held.handle.view().is_negative("10.0.0.9".parse().unwrap()));
    held.rest(Duration::from_secs(120)).await;
    assert_eq!(held.wishes().await, ["forget /10.0.0.9"]);
}

#[tokio::test(start_paused = true)]
async fn on_demand_a_look_for_the_controller_does_not_hold_a_workload_for_long() {
    let mut held = Held::start().await;
    let lookup = Lookup::Workload("w".into());
    held.handle.want(lookup.clone(), Need::Once);
    held.handle.want(lookup.clone(), Need::Once);
    assert_eq!(held.wishes().await, ["ask w"]);
    held.told(vec![web("w", "10.0.0.1"), Update::Found(lookup)])
        .await;
    held.rest(Duration::from_secs(30)).await;
    assert_eq!(held.wishes().await, ["forget w"]);
    // What it decided is known when it is held no more.
    held.told(vec![Update::Unasked("w".into())]).await;
    let (view, uid) = (held.handle.view(), Uid::from("w"));
    let epoch = |stage| podveil_model::Epoch {
        resource_version: 7,
        stage,
    };
    assert!(view.by_uid(&uid).is_none());
    assert!(view.is_decided(&uid, epoch(4)) && !view.is_decided(&uid, epoch(5)));
}
