// SPDX-License-Identifier: Apache-2.0
use crate::{Broken, Chunks, Duplex};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Sleep;

/// How long bytes that an end sent before it broke may still be passed on to a slow other end.
const LAST_BYTES: Duration = Duration::from_secs(5);

/// Bytes carried so far, readable while the relay runs.
#[derive(Debug, Default)]
pub struct Counters {
    a_to_b: AtomicU64,
    b_to_a: AtomicU64,
}

impl Counters {
    /// Bytes read from `a` and written to `b`.
    pub fn a_to_b(&self) -> u64 {
        self.a_to_b.load(Ordering::Relaxed)
    }

    /// Bytes read from `b` and written to `a`.
    pub fn b_to_a(&self) -> u64 {
        self.b_to_a.load(Ordering::Relaxed)
    }

    /// For tests of those who read them: as if so much had been carried.
    pub fn set(&self, a_to_b: u64, b_to_a: u64) {
        self.a_to_b.store(a_to_b, Ordering::Relaxed);
        self.b_to_a.store(b_to_a, Ordering::Relaxed);
    }
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Side {
    A,
    B,
}

/// Why the relay ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended<S> {
    /// Each end finished its direction and everything was passed on.
    Clean,
    /// This side broke; the other one was reset.
    Broken { side: Side, cause: Broken },
    /// `stop` resolved; both sides were reset.
    Stopped(S),
}

/// Carries bytes between `a` and `b` until both directions have ended or one end breaks, in one task.
///
/// A clean end of one direction is passed on and the other direction goes on. A broken end resets the other one.
/// `stop` ends it from outside, with a reason that is handed back.
///
/// Held at any time per direction: one read of a TCP end, or what an HBONE stream's window allows.
///
/// CANCEL: dropping the future resets both ends.
pub async fn relay<A: Duplex, B: Duplex, S: Future>(
    mut a: A,
    mut b: B,
    counters: &Counters,
    stop: S,
) -> Ended<S::Output> {
    let mut stop = pin!(stop);
    let mut forth = Direction::default();
    let mut back = Direction::default();
    // A broken end whose last bytes wait for the other one.
    let mut broken: Option<(Side, Broken)> = None;
    let mut deadline: Option<Pin<Box<Sleep>>> = None;

    poll_fn(|cx| {
        if let Poll::Ready(reason) = stop.as_mut().poll(cx) {
            return Poll::Ready(Ended::Stopped(reason));
        }
        // Towards a broken end nothing moves any more.
        let broken_side = broken.map(|(side, _)| side);
        if broken_side != Some(Side::B)
            && let Err(cause) = forth.poll(&mut a, &mut b, &counters.a_to_b, cx)
        {
            return Poll::Ready(broken.unwrap_or((Side::B, cause)).into());
        }
        if broken_side != Some(Side::A)
            && let Err(cause) = back.poll(&mut b, &mut a, &counters.b_to_a, cx)
        {
            return Poll::Ready(broken.unwrap_or((Side::A, cause)).into());
        }
        if forth.finished && back.finished {
            a.end();
            b.end();
            return Poll::Ready(Ended::Clean);
        }
        broken = broken
            .or_else(|| forth.poll_source(&mut a, cx).map(|cause| (Side::A, cause)))
            .or_else(|| back.poll_source(&mut b, cx).map(|cause| (Side::B, cause)));
        let Some((side, cause)) = broken else {
            return Poll::Pending;
        };
        let rest = match side {
            Side::A => &forth,
            Side::B => &back,
        };
        if rest.chunks.is_empty() {
            return Poll::Ready((side, cause).into());
        }
        let deadline = deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep(LAST_BYTES)));
        deadline.as_mut().poll(cx).map(|()| (side, cause).into())
    })
    .await
}

impl<S> From<(Side, Broken)> for Ended<S> {
    fn from((side, cause): (Side, Broken)) -> Self {
        Self::Broken { side, cause }
    }
}

/// One direction: bytes of the source on their way to the target.
#[derive(Default)]
struct Direction {
    chunks: Chunks,
    /// The source ended this direction cleanly.
    ended: bool,
    /// The source broke; nothing more comes.
    broken: Option<Broken>,
    /// The target was told of the end.
    finished: bool,
}

impl Direction {
    /// Moves what can be moved, until one end is pending.
    ///
    /// # Errors
    /// If the target broke. That the source did is found by [`Direction::poll_source`].
    fn poll<Source: Duplex, Target: Duplex>(
        &mut self,
        source: &mut Source,
        target: &mut Target,
        counter: &AtomicU64,
        cx: &mut Context<'_>,
    ) -> Result<(), Broken> {
        while !self.finished {
            let came = self.read(source, cx);
            let went = self.write(source, target, counter, cx)?;
            if self.ended && self.chunks.is_empty() {
                self.finished = target.poll_finish(cx)?.is_ready();
                break;
            }
            // Reading stopped for want of room, and now there is some; or it did not stop at all.
            if !(self.reads::<Source>() && (came || went)) {
                break;
            }
        }
        if self.chunks.is_empty() {
            self.chunks.release();
        }
        Ok(())
    }

    /// Whether something came.
    fn read<Source: Duplex>(&mut self, source: &mut Source, cx: &mut Context<'_>) -> bool {
        let mut came = false;
        while self.reads::<Source>() {
            match source.poll_read(cx) {
                Poll::Ready(Ok(Some(bytes))) => self.chunks.push(bytes),
                Poll::Ready(Ok(None)) => self.ended = true,
                Poll::Ready(Err(cause)) => self.broken = Some(cause),
                Poll::Pending => break,
            }
            came = true;
        }
        came
    }

    fn reads<Source: Duplex>(&self) -> bool {
        !self.ended && self.broken.is_none() && self.chunks.len() < Source::READ_AHEAD
    }

    /// Whether something went.
    fn write<Source: Duplex, Target: Duplex>(
        &mut self,
        source: &mut Source,
        target: &mut Target,
        counter: &AtomicU64,
        cx: &mut Context<'_>,
    ) -> Result<bool, Broken> {
        let mut went = false;
        while !self.chunks.is_empty() {
            match target.poll_write(cx, &mut self.chunks)? {
                Poll::Ready(bytes) => {
                    source.consumed(bytes);
                    counter.fetch_add(bytes as u64, Ordering::Relaxed);
                    went = true;
                }
                Poll::Pending => break,
            }
        }
        Ok(went)
    }

    /// Whether the source broke: known from reading, or asked for while nobody reads (it has ended its direction, or is
    /// ahead of the target).
    fn poll_source<Source: Duplex>(
        &self,
        source: &mut Source,
        cx: &mut Context<'_>,
    ) -> Option<Broken> {
        if self.broken.is_some() || self.reads::<Source>() {
            return self.broken;
        }
        match source.poll_broken(cx) {
            Poll::Ready(cause) => Some(cause),
            Poll::Pending => None,
        }
    }
}
