// SPDX-License-Identifier: Apache-2.0
use crate::zds::{Offers, Proxy};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// A proxy that waits to follow another one is connected at once.
const FOLLOWS: Duration = Duration::from_millis(50);
/// It takes each pod in milliseconds.
const TAKES: Duration = Duration::from_secs(10);

/// Resolves when the module, asked to stop, may: the proxy that is connected has gone, at most `bound` later, or given way
/// to one that waited; and that one has answered to every pod, so that each listener has somebody who serves it.
pub async fn outlast_the_proxy(
    mut proxy: watch::Receiver<Proxy>,
    offers: watch::Receiver<Offers>,
    bound: Duration,
) {
    // One that another waits to follow is about to give way.
    let gone = proxy.wait_for(|now| now.peer.is_none() || (now.is_follower && !now.is_awaited));
    let _in_time = timeout(bound, gone).await.is_ok();
    let follower = timeout(FOLLOWS, proxy.wait_for(|now| now.peer.is_some()));
    if matches!(follower.await, Ok(Ok(_))) {
        let taken = timeout(TAKES, proxy.wait_for(|now| has_all(now, &offers.borrow())));
        if taken.await.is_err() {
            tracing::warn!("the proxy that follows has not taken every pod in {TAKES:?}");
        }
    }
}

fn has_all(proxy: &Proxy, offers: &Offers) -> bool {
    let Some(offers) = offers else {
        return false;
    };
    offers.iter().all(|(uid, offer)| {
        offer.generation().is_none_or(|generation| {
            let answered = proxy.acknowledged.get(uid);
            answered.is_some_and(|(answered, _)| *answered == generation)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zds::{Acknowledged, Offer, Taking};
    use podveil_netns::NetNs;
    use podveil_netns::seqpacket::Connection;
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use tokio::time::Instant;

    const BOUND: Duration = Duration::from_secs(25);

    fn connected(is_follower: bool, acknowledged: Acknowledged) -> Proxy {
        let (connection, _other) = Connection::pair().unwrap();
        Proxy {
            peer: Some(Arc::new(connection.peer().unwrap())),
            is_follower,
            is_awaited: false,
            acknowledged,
        }
    }

    fn offers() -> Offers {
        let taking = Taking {
            name: "web".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            netns: Arc::new(NetNs::current().unwrap()),
            addresses: Arc::default(),
            generation: 3,
        };
        Some(Arc::new(BTreeMap::from([(
            "u".into(),
            Offer::Take(taking),
        )])))
    }

    /// How long it takes to end.
    async fn lasts(proxy: watch::Receiver<Proxy>, offers: &watch::Sender<Offers>) -> Duration {
        let began = Instant::now();
        outlast_the_proxy(proxy, offers.subscribe(), BOUND).await;
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_at_once_without_a_proxy_and_with_one_when_that_has_gone_or_takes_too_long() {
        let (offers, _offered) = watch::channel(offers());
        let (proxy, seen) = watch::channel(Proxy::default());
        assert!(lasts(seen.clone(), &offers).await <= FOLLOWS);
        proxy.send_replace(connected(false, Acknowledged::default()));
        assert_eq!(lasts(seen.clone(), &offers).await, BOUND + TAKES);
        let (_, lasted) = tokio::join!(
            async {
                tokio::time::sleep(BOUND / 5).await;
                proxy.send_replace(Proxy::default());
            },
            lasts(seen, &offers)
        );
        assert!(
            (BOUND / 5..=BOUND / 5 + FOLLOWS).contains(&lasted),
            "{lasted:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_that_follows_is_waited_for_until_it_has_answered_to_every_pod() {
        let (offers, _offered) = watch::channel(offers());
        let (proxy, seen) = watch::channel(connected(true, Acknowledged::default()));
        let (_, lasted) = tokio::join!(
            async {
                // An older offer, then this one.
                for generation in [2, 3] {
                    tokio::time::sleep(TAKES / 4).await;
                    let answered = BTreeMap::from([("u".into(), (generation, Ok(())))]);
                    proxy.send_modify(|proxy| proxy.acknowledged = Arc::new(answered));
                }
            },
            lasts(seen, &offers)
        );
        assert_eq!(lasted, TAKES / 2);
    }
}
