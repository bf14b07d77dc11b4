// SPDX-License-Identifier: Apache-2.0
use podveil_ca::{Config, RunningCa};
use podveil_ca_client::{Module, ProgramConfig, ProgramCredentials};
use podveil_identity::{ProgramIdentity, TrustDomain};
use podveil_proto::podveil::ca::v1 as wire;
use podveil_proto::podveil::ca::v1::admin_client::AdminClient;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};

/// Nothing here takes a tenth of it.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub const CLUSTER: &str = r#"
trustDomain: cluster.local
nodes: [{name: n1}, {name: n2}]
namespaces: [{name: shop, labels: {io.cilium/mtls-enabled: "true"}}]
workloads:
  - {name: web-1, namespace: shop, uid: u1, node: n1, serviceAccount: web, addresses: [10.244.1.10]}
"#;

/// A folder with everything that a CA and its programs read and write.
pub struct Place {
    pub folder: tempfile::TempDir,
}

pub struct Ca {
    pub running: RunningCa,
    pub stop: CancellationToken,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("tokens")).unwrap();
        for program in ["controller", "node.n1", "node.n2"] {
            std::fs::write(
                folder.path().join("tokens").join(program),
                format!("token-of-{program}-0123"),
            )
            .unwrap();
        }
        std::fs::write(folder.path().join("cluster.yaml"), CLUSTER).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn config(&self, listen: SocketAddr) -> Config {
        let text = serde_json::json!({
            "listen": listen,
            "data_dir": self.path("data"),
            "tokens_dir": self.path("tokens"),
            "source": self.path("cluster.yaml"),
            "admin_socket": self.path("run/admin.sock"),
            "metrics_address": "127.0.0.1:0",
            "readiness_address": "127.0.0.1:0",
            "rotation": {"timeout": "5s", "absent_after": "1s"},
        });
        serde_json::from_value(text).unwrap()
    }

    pub async fn start(&self) -> Ca {
        self.start_at("127.0.0.1:0".parse().unwrap()).await
    }

    /// A port that the kernel has given away once may be that of somebody's own connection meanwhile, such as of a program
    /// that tries to reach the CA: that is waited for.
    pub async fn start_at(&self, listen: SocketAddr) -> Ca {
        let began = Instant::now();
        while TcpListener::bind(listen).is_err() && began.elapsed() < DEADLINE {
            tokio::task::yield_now().await;
        }
        let stop = CancellationToken::new();
        let running = RunningCa::start(self.config(listen), stop.clone())
            .await
            .unwrap();
        Ca { running, stop }
    }

    /// A program as it runs, whose token is `token`'s.
    pub fn program(
        &self,
        ca: SocketAddr,
        identity: ProgramIdentity,
        module: Module,
        token: &str,
        stop: &CancellationToken,
    ) -> ProgramCredentials {
        let state = format!("state-{identity}-{module:?}-{token}");
        let config = ProgramConfig {
            trust_domain: trust_domain(),
            identity,
            ca_address: ca.to_string(),
            token_path: self.path("tokens").join(token),
            bootstrap_bundle: self.path("data/bundle.pem"),
            state_dir: self.path(&state),
            module,
        };
        ProgramCredentials::start(config, stop.clone())
    }

    pub async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(admin_channel(&self.path("run/admin.sock")).await)
    }

    pub async fn status(&self) -> wire::StatusResponse {
        let mut admin = self.admin().await;
        admin
            .status(wire::StatusRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    /// Waits until the status is as wanted.
    pub async fn status_when(
        &self,
        what: &str,
        wanted: impl Fn(&wire::StatusResponse) -> bool,
    ) -> wire::StatusResponse {
        let poll = async {
            loop {
                let status = self.status().await;
                if wanted(&status) {
                    return status;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, poll)
            .await
            .unwrap_or_else(|_| panic!("never: {what}"))
    }
}

impl Ca {
    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.running.ended())
            .await
            .unwrap()
            .unwrap();
    }
}

async fn admin_channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connect = move |_: Uri| {
        let socket = socket.clone();
        async move {
            tokio::net::UnixStream::connect(socket)
                .await
                .map(hyper_util::rt::TokioIo::new)
        }
    };
    Endpoint::from_static("http://admin")
        .connect_with_connector(tower::service_fn(connect))
        .await
        .unwrap()
}

pub fn trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

pub fn node(name: &str) -> ProgramIdentity {
    ProgramIdentity::Node(name.parse().unwrap())
}

/// What belongs to the answer about the authorities, without the consumers.
pub fn authorities(status: &wire::StatusResponse) -> Vec<String> {
    status
        .authorities
        .iter()
        .map(|authority| authority.serial.clone())
        .collect()
}
