// SPDX-License-Identifier: Apache-2.0
use super::*;
use tonic::transport::Endpoint;

fn channel(_: &str) -> Channel {
    Endpoint::from_static("http://podveil").connect_lazy()
}

fn addresses(texts: &[&str]) -> BTreeSet<SocketAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// None answers yet.
fn replicas(texts: &[&str]) -> Replicas {
    let mut known = Known::new();
    follow(&mut known, &addresses(texts), channel);
    Replicas {
        known: Arc::new(watch::Sender::new(known)),
        soon: Arc::default(),
        otherwise: Some(channel("")),
        credentials: None,
        last: None,
    }
}

const ONE: &str = "10.0.0.1:1";
const TWO: &str = "10.0.0.2:1";

/// Where the next stream goes; nothing: otherwise.
async fn next(replicas: &mut Replicas) -> Option<String> {
    replicas.next().await;
    replicas.last.clone()
}

#[tokio::test(start_paused = true)]
async fn the_next_stream_goes_to_another_replica_than_the_last_of_those_that_answer() {
    let mut all = replicas(&[ONE, TWO, "10.0.0.3:1", "10.0.0.4:1"]);
    for answers in [ONE, TWO, "10.0.0.3:1"] {
        all.set_open(answers, true);
    }
    let mut last = None;
    for _ in 0..50 {
        let chosen = next(&mut all).await;
        assert_ne!(chosen, last);
        assert_ne!(chosen.as_deref(), Some("10.0.0.4:1"));
        last = chosen;
    }
    all.set_open(ONE, false);
    all.set_open("10.0.0.3:1", false);
    for _ in 0..3 {
        assert_eq!(next(&mut all).await.as_deref(), Some(TWO));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_begins_waits_for_a_replica_that_answers() {
    let all = replicas(&[ONE, TWO]);
    let chosen = tokio::spawn({
        let mut all = all.clone();
        async move { next(&mut all).await }
    });
    tokio::time::sleep(FIRST_ANSWER / 2).await;
    all.set_open(TWO, true);
    assert_eq!(chosen.await.unwrap().as_deref(), Some(TWO));
}

#[tokio::test(start_paused = true)]
async fn where_none_answers_streams_go_to_one_and_otherwise_in_turn() {
    let mut all = replicas(&[ONE, TWO]);
    for _ in 0..3 {
        assert!(next(&mut all).await.is_some());
        assert_eq!(next(&mut all).await, None);
    }
    let mut nobody = replicas(&[]);
    assert_eq!(next(&mut nobody).await, None);
    assert_eq!(next(&mut nobody).await, None);
}

#[tokio::test]
async fn replicas_come_and_go_as_they_are_named_and_keep_their_connections() {
    let mut all = Known::new();
    assert!(follow(&mut all, &addresses(&[ONE]), channel));
    all.get_mut(ONE).unwrap().open = true;
    assert!(!follow(&mut all, &addresses(&[ONE]), channel));
    assert!(follow(&mut all, &addresses(&[ONE, TWO]), channel));
    assert!(all[ONE].open && !all[TWO].open);
    assert!(follow(&mut all, &addresses(&[TWO]), channel));
    assert!(all.keys().eq([TWO]));
}

#[tokio::test]
async fn replicas_are_looked_up_without_being_asked_to() {
    let (known, soon) = (Arc::<watch::Sender<Known>>::default(), Arc::default());
    let mut now = known.subscribe();
    let looking = keep_looking("localhost:9".to_owned(), channel, known, soon);
    let looking = tokio::spawn(looking);
    let found = now.wait_for(|known| !known.is_empty());
    let found = tokio::time::timeout(LOOK_BOUND, found).await.unwrap();
    assert_eq!(found.unwrap().len(), 1);
    looking.abort();
}

#[test]
fn a_replica_with_two_addresses_is_one_replica() {
    let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
    let both = ["[fd00::1]:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.1:1"].map(parse);
    let expected = ["10.0.0.1:1", "10.0.0.2:1"].map(parse);
    assert!(one_family(both.into_iter()).into_iter().eq(expected));
    let six = one_family(both.into_iter().take(1));
    assert!(six.into_iter().eq([both[0]]));
}
