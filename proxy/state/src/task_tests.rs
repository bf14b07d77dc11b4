// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::channel;
use podveil_testing::{policy, workload};
use podveil_xds_client::Acknowledge;

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
    let not_found = Key::Address(NetworkAddress {
        network: "".into(),
        ip: "10.0.0.9".parse().unwrap(),
    });
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
    let (writer, handle, questions) = channel();
    let (batches, received) = mpsc::channel(4);
    let (in_use, mut version) = watch::channel(None);
    let stop = CancellationToken::new();
    let task = StateTask {
        writer,
        batches: received,
        demand: None,
        questions,
        in_use,
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
