// SPDX-License-Identifier: Apache-2.0
//! The node program's configuration: one YAML file, overridden by the environment. `docs/configuration.md` is
//! generated from these types, so each key says what it means and why its default is what it is.

mod environment;
mod host_port;

pub use environment::{OVERRIDES, PeerEnvironment, RENAMED};
pub use host_port::HostPort;

use podveil_identity::{KubernetesName, TrustDomain};
use podveil_netns::cgroup::{CgroupError, Membership};
use podveil_program::config::{self, ConfigError, Environment};
use podveil_program::{HumanDuration, LogFormat};
use podveil_state::Limits;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// The node program's configuration file.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// This node's name, as the control plane knows it. No default: a wrong one would ask for other nodes' pods.
    #[serde(deserialize_with = "parsed", serialize_with = "displayed")]
    #[schemars(with = "String")]
    pub node: KubernetesName,

    /// The trust domain of every identity here. Default `cluster.local`, as in Istio and Cilium.
    #[serde(
        default = "default_trust_domain",
        deserialize_with = "parsed",
        serialize_with = "displayed"
    )]
    #[schemars(with = "String")]
    pub trust_domain: TrustDomain,

    /// What this process does. Default `[proxy]`: `redirect` needs more privileges and runs as a process of its own,
    /// never together with `proxy`.
    #[serde(default = "default_modules")]
    pub modules: Vec<Module>,

    /// The controller, `host:port`; a scheme `https://` is taken off. Default `podveil-controller.podveil-system.svc:15010`,
    /// the chart's service. With a holder (`listeners_socket`) it is where to go while no replica of `reports_address` answers.
    #[serde(default = "default_xds_address")]
    pub xds_address: HostPort,

    /// A name, `host:port`, with the addresses of all replicas of the controller: reports go to each, and one gives the
    /// configuration. Default: `xds_address`, which is right for a single replica; with several it must be set, as the chart does
    /// with its headless service.
    #[serde(default)]
    pub reports_address: Option<HostPort>,

    /// The CA, `host:port`; a scheme `https://` is taken off. Default `podveil-ca.podveil-system.svc:15012`, the chart's
    /// service.
    #[serde(default = "default_ca_address")]
    pub ca_address: HostPort,

    /// File with the token that proves this program to the CA at its first contact. Default: where the chart projects it.
    #[serde(default = "default_token")]
    pub token: PathBuf,

    /// File with the roots (PEM) that the CA is trusted by at first contact; a newer copy in `state_dir` goes before it.
    /// Default `/var/run/secrets/podveil/bundle.pem`; the chart sets where it mounts the ConfigMap.
    #[serde(default = "default_bootstrap_bundle")]
    pub bootstrap_bundle: PathBuf,

    /// Folder for what survives a restart: the last trust bundle, never a key. Default `/var/lib/podveil/node`, on the
    /// node's own disk, so that a cold boot needs no controller.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,

    /// Name of a cgroup2 folder of their own that both node processes join; sockets made in it are the proxy's, whoever sets
    /// what mark. Default: in a pod on a machine with cgroup v2 alone none, since the pod's own cgroup says the same; else
    /// `podveil-<node>`, so that nodes on one machine do not share it.
    #[serde(default)]
    pub cgroup: Option<String>,

    /// Unix socket of the ZDS agent. Default `/var/run/ztunnel/ztunnel.sock`, the name that Istio's and Cilium's charts set.
    #[serde(default = "default_zds_socket")]
    pub zds_socket: PathBuf,

    /// Unix socket of the listeners' holder. Default `/var/run/podveil/listeners.sock`. Empty (`""`): there is no holder
    /// (mode A: a foreign control plane and its agent), and the proxy makes its own listeners in each pod's network namespace.
    #[serde(default = "default_listeners_socket")]
    pub listeners_socket: PathBuf,

    /// Read-only admin endpoint (`/config_dump`). Default `127.0.0.1:15000`: it shows the cluster's addresses, so it is for
    /// this node only.
    #[serde(default = "default_admin_address")]
    pub admin_address: SocketAddr,

    /// Metrics endpoint. Default `0.0.0.0:15020`, where Istio's scrape configuration looks.
    #[serde(default = "default_metrics_address")]
    pub metrics_address: SocketAddr,

    /// Readiness endpoint (`/healthz/ready`). Default `0.0.0.0:15021`: the kubelet asks from the node's address.
    #[serde(default = "default_readiness_address")]
    pub readiness_address: SocketAddr,

    /// Unix socket that has the readiness endpoint instead, for `podveil-node ready`. Default none. With `take_over` set it
    /// must be one that the process which is followed does not have: a port is the node's, and would tell of the other one.
    #[serde(default)]
    pub readiness_socket: Option<PathBuf>,

    /// Start beside a process of the same module, stand by, and follow it when it ends: `redirect` in all it has, `proxy` at
    /// the ZDS agent. Ports that it has are served then. A proxy that is asked to stop lets one that follows have new connections
    /// at once, and without one serves them as ever. Default false: two processes of one module on one node are a mistake. A
    /// second `redirect` module waits with either value.
    #[serde(default)]
    pub take_over: bool,

    /// How log lines are written. Default `plain`, as the peers have it.
    #[serde(default)]
    pub log: LogFormat,

    /// Threads that carry bytes. Default: one for each CPU that this process may use, at least two, so that one handshake
    /// never stands before everyone's bytes.
    #[serde(default)]
    pub worker_threads: Option<usize>,

    /// The `redirect` module.
    #[serde(default)]
    pub redirect: RedirectSection,

    /// The `proxy` module.
    #[serde(default)]
    pub proxy: ProxySection,
}

/// One job of the node program.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Module {
    /// Carries connections: HBONE, plain, policy.
    Proxy,
    /// Finds pods, holds their listeners, installs capture and fence.
    Redirect,
}

/// How a pod's network namespace is found.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindPods {
    /// By a file named after the pod's uid: simulated nodes.
    Directory,
    /// By the pod's processes.
    Processes,
}

/// What captures pods' connections.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackEnd {
    /// The first that this node has everything for: eBPF, nftables, iptables. Log, metric and status say what is missing.
    Auto,
    /// eBPF; the module does not start where it cannot be had.
    Ebpf,
    /// NAT by nftables; the module does not start where it cannot be had.
    Nftables,
    /// NAT by iptables and ipset, of either flavour; the module does not start where it cannot be had.
    Iptables,
}

/// Keys of the `redirect` module.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedirectSection {
    /// How a pod's network namespace is found. Default `processes`: by the pod's processes in `/proc`, which must be the
    /// node's own.
    pub find: FindPods,
    /// With `find: processes`, the socket of the container runtime (CRI v1): it is asked which process is a pod's sandbox
    /// before all processes are looked through, and believed where `/proc` says the same. Default: none, since whoever may
    /// use that socket may do anything on the node, and looking is as good.
    pub cri_socket: Option<PathBuf>,
    /// With `find: directory`, the folder where a pod's network namespace is the file of its uid. Default `/run/netns`, where
    /// `ip netns` keeps them.
    pub netns_dir: PathBuf,
    /// Is `podveil-cni` the last plugin of the node's CNI chain, so that a pod that is to be captured starts only then? It is
    /// put there and kept there, and taken out when this is off. Default false; the chart sets it.
    pub cni: bool,
    /// Unix socket at which the plugin asks, by the same name here and on the node. Default `/run/podveil/cni/cni.sock`.
    pub cni_socket: PathBuf,
    /// The plugin's program, to be copied. Default `/usr/bin/podveil-cni`, where the image has it.
    pub cni_plugin: PathBuf,
    /// The container runtime's folder of CNI plugins, as it is seen here. Default `/host/opt/cni/bin`, where the chart mounts it.
    pub cni_bin_dir: PathBuf,
    /// The container runtime's folder of CNI configurations, as it is seen here. Default `/host/etc/cni/net.d`, where the chart
    /// mounts it.
    pub cni_conf_dir: PathBuf,
    /// Does a pod stay out that the plugin cannot ask about, or that is not captured in time? Default true. Otherwise it starts
    /// and is captured a little later.
    pub cni_fail_closed: bool,
    /// Namespaces that the plugin never asks about, so that a cold cluster starts. Default `kube-system` and
    /// `podveil-system`.
    pub cni_exempt_namespaces: Vec<String>,
    /// What captures pods' connections. Default `auto`. A pod that is captured stays with the back end that did it
    /// until it is released.
    pub back_end: BackEnd,
    /// Where the maps and links of eBPF are pinned, so that they outlast this process: a folder of a bpf file system, or one
    /// where that can be mounted. No dots in its name. Default `/sys/fs/bpf/podveil`.
    pub bpf_dir: PathBuf,
    /// How long listeners wait for a proxy that is not there before new connections are reset. Default 5 s: longer than a
    /// restart of the proxy, shorter than most clients' patience.
    pub hold_bound: HumanDuration,
    /// Accept backlog of each listener. Default 4096: new connections of a busy pod during `hold_bound`.
    pub backlog: u32,
    /// Connections that a released pod still has through the proxy are given this long. Default 10 m.
    pub release_bound: HumanDuration,
    /// When it is asked to stop, it goes on for so long while a proxy is connected: containers of one pod are asked at once,
    /// and until the proxy has drained, rules must follow and probes be recognised. Default 0 s; the chart gives it a little
    /// more than `proxy.drain_bound`.
    pub drain_bound: HumanDuration,
}

impl Default for RedirectSection {
    fn default() -> Self {
        Self {
            find: FindPods::Processes,
            cri_socket: None,
            netns_dir: "/run/netns".into(),
            cni: false,
            cni_socket: "/run/podveil/cni/cni.sock".into(),
            cni_plugin: "/usr/bin/podveil-cni".into(),
            cni_bin_dir: "/host/opt/cni/bin".into(),
            cni_conf_dir: "/host/etc/cni/net.d".into(),
            cni_fail_closed: true,
            cni_exempt_namespaces: vec!["kube-system".to_owned(), "podveil-system".to_owned()],
            back_end: BackEnd::Auto,
            bpf_dir: "/sys/fs/bpf/podveil".into(),
            hold_bound: HumanDuration(Duration::from_secs(5)),
            backlog: 4096,
            release_bound: HumanDuration(Duration::from_secs(600)),
            drain_bound: HumanDuration(Duration::ZERO),
        }
    }
}

/// Keys of the `proxy` module. Durations bound a wait, numbers bound a table; nothing here is unbounded.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProxySection {
    /// How long a connection waits for an answer (certificate, workload, tunnel) before it is refused. Default 5 s.
    pub hold_bound: HumanDuration,
    /// TCP connect to a peer's proxy or a local application. Default 10 s, as in ztunnel.
    pub connect_timeout: HumanDuration,
    /// TLS handshake, either side. Default 10 s: two round trips on any link, with retransmissions.
    pub tls_timeout: HumanDuration,
    /// HTTP/2 handshake, either side. Default 10 s.
    pub http2_timeout: HumanDuration,
    /// Answer to a CONNECT. Default 20 s: it includes the far side's own connect.
    pub connect_response_timeout: HumanDuration,
    /// Connections of one pod that may wait at once for an answer. Default 512: above it new ones are refused, so that one
    /// pod cannot hold the node's memory.
    pub max_held_per_pod: usize,
    /// Connections of one pod at once, in each direction. Default 65536: more than the ephemeral ports of one address. Never
    /// more than a quarter of the process's descriptors.
    pub max_connections_per_pod: usize,
    /// Accept backlog of listeners made here (mode A). Default 4096.
    pub backlog: u32,
    /// Streams on one tunnel before a second one is opened; a peer that grants fewer is obeyed. Default 100, as in ztunnel.
    pub max_streams_per_tunnel: usize,
    /// A tunnel without streams is closed after this. Default 5 m, as in ztunnel.
    pub tunnel_idle_timeout: HumanDuration,
    /// Tunnels of one pod at once. Default 4096.
    pub max_tunnels_per_pod: usize,
    /// How long connections are given to end when the program is stopped; then they are reset. Until another proxy follows, new
    /// ones are served meanwhile, and it ends earlier where none is open. Default 25 s: under the chart's grace period
    /// of 30 s.
    pub drain_bound: HumanDuration,
    /// Label sets of traffic metrics kept at once; beyond it connections are counted under `unknown`. Default 10000, some
    /// 20 MB of scrape.
    pub max_traffic_series: usize,
    /// Series of a workload that is gone are kept this long, so that the last scrape still sees them. Default 5 m.
    pub gone_series_kept: HumanDuration,
    /// Hold no more of the cluster than this node's workloads and what their connections ask for, in place of everything.
    /// Default false. It saves memory on nodes of a large cluster; in return the first connection to a destination, or from
    /// a peer, waits for an answer of the controller, and while none is there only what was dialled, and who was heard of, before
    /// can be connected to. Not without a holder (`listeners_socket`).
    pub on_demand: bool,
    /// With `on_demand`, what no connection has used for this long is held no more; a second at least. Default 1 h. While no
    /// controller is there, everything is kept.
    pub forget_after: HumanDuration,
}

impl Default for ProxySection {
    fn default() -> Self {
        let seconds = |seconds| HumanDuration(Duration::from_secs(seconds));
        let limits = Limits::default();
        Self {
            hold_bound: HumanDuration(limits.hold_bound),
            connect_timeout: HumanDuration(limits.connect_timeout),
            tls_timeout: HumanDuration(limits.tls_timeout),
            http2_timeout: HumanDuration(limits.h2_timeout),
            connect_response_timeout: HumanDuration(limits.connect_response_timeout),
            max_held_per_pod: limits.max_held,
            max_connections_per_pod: limits.max_connections,
            backlog: 4096,
            max_streams_per_tunnel: limits.max_streams_per_tunnel,
            tunnel_idle_timeout: HumanDuration(limits.tunnel_idle),
            max_tunnels_per_pod: limits.max_tunnels,
            drain_bound: seconds(25),
            max_traffic_series: 10_000,
            gone_series_kept: seconds(300),
            on_demand: false,
            forget_after: seconds(3600),
        }
    }
}

const FORGET_LEAST: Duration = Duration::from_secs(1);

/// Why the node program cannot start with this configuration.
#[derive(Debug, thiserror::Error)]
pub enum NodeConfigError {
    #[error("modules: name one of proxy and redirect")]
    NoModule,
    #[error("modules: proxy and redirect never share a process; start two")]
    Together,
    #[error(
        "proxy.on_demand: not without a holder (listeners_socket), since a foreign control plane answers otherwise"
    )]
    OnDemand,
    #[error(
        "proxy.forget_after: at least {FORGET_LEAST:?}; sooner, what is in use would be forgotten"
    )]
    ForgetAfter,
    #[error("reading the configuration")]
    Unreadable(#[source] ConfigError),
}

impl NodeConfig {
    /// Reads the file (if there is one) and the environment, with the names that peers' charts set.
    ///
    /// # Errors
    /// [`NodeConfigError`]: for the operator, with file and line.
    pub fn load(
        path: Option<&Path>,
        environment: &dyn Environment,
    ) -> Result<Self, NodeConfigError> {
        let config: Self = config::load(path, OVERRIDES, RENAMED, &PeerEnvironment(environment))
            .map_err(NodeConfigError::Unreadable)?;
        config.module()?;
        if config.proxy.on_demand && config.holder().is_none() {
            return Err(NodeConfigError::OnDemand);
        }
        if config.proxy.forget_after.0 < FORGET_LEAST {
            return Err(NodeConfigError::ForgetAfter);
        }
        Ok(config)
    }

    /// The one module of this process.
    ///
    /// # Errors
    /// If there is none, or both.
    pub fn module(&self) -> Result<Module, NodeConfigError> {
        match self.modules.as_slice() {
            [] => Err(NodeConfigError::NoModule),
            [first, rest @ ..] if rest.iter().all(|module| module == first) => Ok(*first),
            _ => Err(NodeConfigError::Together),
        }
    }

    /// # Errors
    /// When the machine's cgroups cannot be read.
    pub fn cgroup(&self) -> Result<Membership, CgroupError> {
        Membership::choose(self.cgroup.as_deref(), &format!("podveil-{}", self.node))
    }

    pub fn reports_address(&self) -> &HostPort {
        self.reports_address.as_ref().unwrap_or(&self.xds_address)
    }

    /// The holder's socket; `None` in mode A.
    pub fn holder(&self) -> Option<&Path> {
        Some(self.listeners_socket.as_path()).filter(|path| !path.as_os_str().is_empty())
    }
}

fn default_trust_domain() -> TrustDomain {
    TrustDomain::new("cluster.local").expect("a legal trust domain")
}

fn default_modules() -> Vec<Module> {
    vec![Module::Proxy]
}

fn default_xds_address() -> HostPort {
    HostPort::known("podveil-controller.podveil-system.svc:15010")
}

fn default_ca_address() -> HostPort {
    HostPort::known("podveil-ca.podveil-system.svc:15012")
}

fn default_token() -> PathBuf {
    "/var/run/secrets/podveil/token".into()
}

fn default_bootstrap_bundle() -> PathBuf {
    "/var/run/secrets/podveil/bundle.pem".into()
}

fn default_state_dir() -> PathBuf {
    "/var/lib/podveil/node".into()
}

fn default_zds_socket() -> PathBuf {
    "/var/run/ztunnel/ztunnel.sock".into()
}

fn default_listeners_socket() -> PathBuf {
    "/var/run/podveil/listeners.sock".into()
}

fn default_admin_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15000)
}

fn default_metrics_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 15020)
}

fn default_readiness_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 15021)
}

/// A value whose type checks its own text.
fn parsed<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr<Err: Display>,
    D: Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

fn displayed<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

#[cfg(test)]
mod tests;
