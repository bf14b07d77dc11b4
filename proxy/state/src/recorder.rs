// SPDX-License-Identifier: Apache-2.0
use podveil_flow::ConnectionRecord;
use std::fmt;

/// Told what becomes of each connection. Called on the connection's own task: it must not wait.
pub trait Recorder: fmt::Debug + Send + Sync + 'static {
    /// Bytes can flow. The record is as it stands now: no bytes yet, and `close` says nothing.
    fn opened(&self, connection: &ConnectionRecord);

    /// The connection is over. One that was refused (its verdict is `Dropped`) or given up by its
    /// source was never opened.
    fn closed(&self, connection: &ConnectionRecord);
}

/// Records nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Discard;

impl Recorder for Discard {
    fn opened(&self, _: &ConnectionRecord) {}

    fn closed(&self, _: &ConnectionRecord) {}
}
