// SPDX-License-Identifier: Apache-2.0
use std::future::Future;
use tonic::transport::Channel;

/// Whom a client may take its configuration from.
pub trait Servers: Send + 'static {
    /// The way to the one that the next stream goes to. Asked for each: where there are several, another one than the last.
    ///
    /// CANCEL: nothing is lost.
    fn next(&mut self) -> impl Future<Output = Channel> + Send;
}

/// Always the same.
impl Servers for Channel {
    async fn next(&mut self) -> Channel {
        self.clone()
    }
}
