// SPDX-License-Identifier: Apache-2.0
use podveil_flow::ConnectionRecord;
use podveil_net::Counters;
use std::fmt;
use std::sync::Arc;

/// Names an open connection to the recorder that was told of it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ConnectionId(pub u64);

/// Told what becomes of each connection. Called on the connection's own task: it must not wait.
pub trait Recorder: fmt::Debug + Send + Sync + 'static {
    /// Bytes can flow, and `carried` counts them as they do. The record is as it stands now: no bytes yet, and `close`
    /// says nothing. The answer is for [`Self::closed`].
    fn opened(&self, connection: &ConnectionRecord, carried: &Arc<Counters>) -> ConnectionId;

    /// The connection is over. `None`: it was refused (its verdict is `Dropped`) or given up by its source, and was never
    /// opened.
    fn closed(&self, connection: &ConnectionRecord, opened: Option<ConnectionId>);
}

/// Records nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Discard;

impl Recorder for Discard {
    fn opened(&self, _: &ConnectionRecord, _: &Arc<Counters>) -> ConnectionId {
        ConnectionId(0)
    }

    fn closed(&self, _: &ConnectionRecord, _: Option<ConnectionId>) {}
}
