// SPDX-License-Identifier: Apache-2.0
use crate::config::NodeConfig;
use anyhow::Context;
use podveil_program::http::{self, Routes};
use std::net::SocketAddr;
use tokio_util::sync::CancellationToken;

/// What the HTTP endpoints of a module answer.
#[derive(Debug)]
pub struct Endpoints {
    pub admin: Routes,
    pub metrics: Routes,
    pub readiness: Routes,
}

/// Where they are really bound.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub admin: SocketAddr,
    pub metrics: SocketAddr,
    /// `None`: at a Unix socket.
    pub readiness: Option<SocketAddr>,
}

impl Endpoints {
    /// Serves them until `end`. Ports that a process has which this one is to follow are served after it.
    ///
    /// # Errors
    /// An address or the socket cannot be had: for the operator.
    pub async fn serve(
        self,
        config: &NodeConfig,
        end: &CancellationToken,
    ) -> anyhow::Result<Bound> {
        let serve = async |what: &str, address: SocketAddr, routes: Routes| {
            let end = end.child_token();
            let served = match config.take_over {
                true => http::serve_when_free(address, routes, end).await,
                false => http::serve(address, routes, end).await,
            };
            served.with_context(|| format!("{what} {address} cannot be served"))
        };
        let readiness = match &config.readiness_socket {
            None => Some(
                serve(
                    "readiness_address",
                    config.readiness_address,
                    self.readiness,
                )
                .await?,
            ),
            Some(path) => {
                http::serve_unix(path, self.readiness, end.child_token()).with_context(|| {
                    format!("readiness_socket {} cannot be served", path.display())
                })?;
                None
            }
        };
        Ok(Bound {
            admin: serve("admin_address", config.admin_address, self.admin).await?,
            metrics: serve("metrics_address", config.metrics_address, self.metrics).await?,
            readiness,
        })
    }
}
