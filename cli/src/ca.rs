// SPDX-License-Identifier: Apache-2.0
//! The CA's admin service, by its Unix socket on its own machine, or through the API's exec. Whoever may reach the one or
//! the other may administer the CA.

use crate::cluster::{Access, CaAdmin};
use crate::failure::OrCure;
use anyhow::Context;
use hyper_util::rt::TokioIo;
use podveil_proto::podveil::ca::v1::admin_client::AdminClient;
use podveil_proto::podveil::ca::v1::{StatusRequest, StatusResponse};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

/// Where the CA's default puts it.
const DEFAULT_SOCKET: &str = "/run/podveil/ca/admin.sock";

/// Which CA.
#[derive(Clone, Debug, clap::Args)]
pub struct Where {
    /// The CA's admin socket on this machine, instead of a cluster; without a value the CA's default one.
    #[arg(long, num_args = 0..=1, default_missing_value = DEFAULT_SOCKET, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    #[command(flatten)]
    pub access: Access,
}

impl Where {
    /// # Errors
    /// If the CA cannot be reached.
    pub async fn connect(&self) -> anyhow::Result<CaAdmin> {
        match &self.socket {
            Some(socket) => connect(socket).await,
            None => {
                let cluster = self.access.cluster().await?;
                cluster.ca(&cluster.programs().await?).await
            }
        }
    }
}

/// # Errors
/// If nobody listens there, or we may not.
pub async fn connect(socket: &Path) -> anyhow::Result<CaAdmin> {
    let path: PathBuf = socket.to_owned();
    // The address is never looked at: the connector below goes to the socket.
    let channel = Endpoint::from_static("http://ca.invalid")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .or_cure(
            format!("connecting to the CA's admin socket {}", socket.display()),
            "it is there only on the CA's own machine, for the user that the CA runs as; without `--socket` the CA of \
             the cluster is asked",
        )?;
    Ok(CaAdmin {
        client: AdminClient::new(channel),
        found: socket.display().to_string(),
        replica: None,
    })
}

/// What the CA says about itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CaStatus {
    /// The replica that answered; not known where it was asked by its socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    pub trust_domain: String,
    pub bundle_sequence: u64,
    pub certificate_generation: u64,
    pub authorities: Vec<Authority>,
    /// Programs that are connected.
    pub consumers: Vec<Consumer>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Authority {
    pub subject: String,
    pub serial: String,
    pub root: bool,
    pub issuing: bool,
    /// Unix seconds.
    pub not_after: i64,
}

#[derive(Clone, Debug, Serialize)]
pub struct Consumer {
    pub spiffe_id: String,
    pub module: String,
    pub bundle_sequence: u64,
    pub certificate_generation: u64,
}

impl Authority {
    pub fn ends(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(self.not_after).unwrap_or_default())
    }
}

impl CaAdmin {
    /// # Errors
    /// If the CA does not answer.
    pub async fn status(&mut self) -> anyhow::Result<CaStatus> {
        let answer = self
            .client
            .status(StatusRequest {})
            .await
            .with_context(|| format!("asking the CA ({}) for its status", self.found))?
            .into_inner();
        Ok(CaStatus::new(self.replica.clone(), answer))
    }
}

impl CaStatus {
    fn new(replica: Option<String>, wire: StatusResponse) -> Self {
        let authorities = wire.authorities.into_iter().map(|one| Authority {
            subject: one.subject,
            serial: one.serial,
            root: one.root,
            issuing: one.issuing,
            not_after: one.not_after,
        });
        let consumers = wire.consumers.into_iter().map(|one| Consumer {
            spiffe_id: one.spiffe_id,
            module: one.module,
            bundle_sequence: one.bundle_sequence,
            certificate_generation: one.certificate_generation,
        });
        Self {
            replica,
            trust_domain: wire.trust_domain,
            bundle_sequence: wire.bundle_sequence,
            certificate_generation: wire.certificate_generation,
            authorities: authorities.collect(),
            consumers: consumers.collect(),
        }
    }
}
