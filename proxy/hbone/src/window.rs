// SPDX-License-Identifier: Apache-2.0
use podveil_net::Backlog;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio_stream::Stream;
use tokio_stream::wrappers::WatchStream;

/// Keeps the window that a tunnel's peer was told for each stream at what the pod's backlog wants.
pub(crate) struct Window {
    changes: WatchStream<u32>,
    wanted: u32,
    told: u32,
}

impl Window {
    pub fn new(backlog: &Backlog) -> Self {
        let wanted = backlog.window();
        let now = *wanted.borrow();
        Self {
            changes: WatchStream::from_changes(wanted),
            wanted: now,
            told: now,
        }
    }

    /// What the peer was told last, in bytes.
    pub fn told(&self) -> u32 {
        self.told
    }

    /// Tells the peer if there is something new. `tell` fails while the peer has not acknowledged what it was told
    /// before; its acknowledgement polls the tunnel, and so this, again.
    pub fn poll(&mut self, cx: &mut Context<'_>, tell: impl FnOnce(u32) -> Result<(), h2::Error>) {
        while let Poll::Ready(Some(wanted)) = Pin::new(&mut self.changes).poll_next(cx) {
            self.wanted = wanted;
        }
        if self.wanted != self.told && tell(self.wanted).is_ok() {
            self.told = self.wanted;
        }
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("wanted", &self.wanted)
            .field("told", &self.told)
            .finish_non_exhaustive()
    }
}
