// SPDX-License-Identifier: Apache-2.0
//! A controller on loopback, with a CA's authorities made for it.

use crate::authorities::Authorities;
use podveil_ca_client::transport::channel;
use podveil_controller::{Config, Controller};
use podveil_identity::{ProgramIdentity, SpiffeId};
use podveil_program::LogFormat;
use podveil_source::SourceConfig;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// Far above what any step takes; reached only when a state never comes.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Fixture {
    directory: tempfile::TempDir,
    authorities: Authorities,
    controller: Controller,
    stop: CancellationToken,
}

impl Fixture {
    pub async fn start(cluster: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("cluster.yaml"), cluster).unwrap();
        Self::start_in(directory, Authorities::new()).await
    }

    async fn start_in(directory: tempfile::TempDir, authorities: Authorities) -> Self {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            trust_domain: "cluster.local".to_owned(),
            listen: any,
            source: SourceConfig::File(directory.path().join("cluster.yaml")),
            namespace: "podveil-system".to_owned(),
            defaults: Default::default(),
            take_over: false,
            replica: "c1".to_owned(),
            ca_address: "127.0.0.1:1".to_owned(),
            token: "unused".into(),
            bootstrap_bundle: "unused".into(),
            state_dir: directory.path().join("state"),
            admin_address: any,
            metrics_address: any,
            readiness_address: any,
            log: LogFormat::Plain,
        };
        let stop = CancellationToken::new();
        let id = ProgramIdentity::Controller.spiffe_id(&authorities.trust_domain);
        let credentials = authorities.credentials(&id);
        let controller = Controller::start(&config, credentials, stop.clone())
            .await
            .unwrap();
        Self {
            directory,
            authorities,
            controller,
            stop,
        }
    }

    /// Stops the controller and starts it again on what it left.
    pub async fn restart(self) -> Self {
        self.stop.cancel();
        self.controller.ended().await;
        Self::start_in(self.directory, self.authorities).await
    }

    /// Ends when no task of the controller is left.
    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.controller.ended())
            .await
            .unwrap();
    }

    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    pub fn write(&self, cluster: &str) {
        let scratch = self.directory.path().join("cluster.new");
        std::fs::write(&scratch, cluster).unwrap();
        std::fs::rename(scratch, self.directory.path().join("cluster.yaml")).unwrap();
    }

    /// A connection to the controller as this program.
    pub fn channel(&self, program: &ProgramIdentity) -> Channel {
        self.channel_as(&program.spiffe_id(&self.authorities.trust_domain))
    }

    pub fn workload_channel(&self) -> Channel {
        self.channel_as(&SpiffeId::new("spiffe://cluster.local/ns/shop/sa/web").unwrap())
    }

    fn channel_as(&self, id: &SpiffeId) -> Channel {
        channel(
            &self.controller.address.to_string(),
            &self.authorities.credentials(id),
            ProgramIdentity::Controller,
        )
    }
}

pub async fn http_get(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    body.to_owned()
}

/// Asks again until the answer is as wanted.
pub async fn until_answer(
    address: SocketAddr,
    path: &str,
    wanted: impl Fn(&str) -> bool,
) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let answer = http_get(address, path).await;
        if wanted(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{answer}");
    }
}
