// SPDX-License-Identifier: Apache-2.0
use crate::Settings;
use h2::{Ping, PingPong};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::time::{Duration, Instant, Sleep, sleep};

/// Asks the peer at intervals whether it is there.
///
/// ```text
/// resting --interval--> asked --answer--> resting
///                         `----timeout--> silent
/// ```
pub(crate) struct Keepalive {
    pings: PingPong,
    interval: Duration,
    timeout: Duration,
    asked: bool,
    timer: Pin<Box<Sleep>>,
}

impl Keepalive {
    pub(crate) fn new(pings: PingPong, settings: &Settings) -> Self {
        Self {
            pings,
            interval: settings.ping_interval,
            timeout: settings.ping_timeout,
            asked: false,
            timer: Box::pin(sleep(settings.ping_interval)),
        }
    }

    /// Ready when the peer is silent. A failed connection is not reported here: it reports itself.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.asked && self.pings.poll_pong(cx).is_ready() {
                self.rest();
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if self.asked {
                return Poll::Ready(());
            }
            self.asked = self.pings.send_ping(Ping::opaque()).is_ok();
            let wait = if self.asked {
                self.timeout
            } else {
                self.interval
            };
            self.timer.as_mut().reset(Instant::now() + wait);
        }
    }

    fn rest(&mut self) {
        self.asked = false;
        self.timer.as_mut().reset(Instant::now() + self.interval);
    }
}
