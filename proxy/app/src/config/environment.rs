// SPDX-License-Identifier: Apache-2.0
use podveil_program::config::{Environment, Override};
use std::num::NonZero;

/// Variables that set a key: the names that the charts of Istio and Cilium already set for the ztunnel, then ours.
pub const OVERRIDES: &[Override] = &[
    Override {
        variable: "NODE_NAME",
        key: "node",
    },
    Override {
        variable: "TRUST_DOMAIN",
        key: "trust_domain",
    },
    Override {
        variable: "XDS_ADDRESS",
        key: "xds_address",
    },
    Override {
        variable: "CA_ADDRESS",
        key: "ca_address",
    },
    Override {
        variable: "CA_ROOT_CA",
        key: "bootstrap_bundle",
    },
    Override {
        variable: "AUTH_TOKEN",
        key: "token",
    },
    Override {
        variable: "INPOD_UDS",
        key: "zds_socket",
    },
    Override {
        variable: "LOG_FORMAT",
        key: "log",
    },
    Override {
        variable: "ZTUNNEL_WORKER_THREADS",
        key: "worker_threads",
    },
    Override {
        variable: "POOL_MAX_STREAMS_PER_CONNECTION",
        key: "proxy.max_streams_per_tunnel",
    },
    Override {
        variable: "POOL_UNUSED_RELEASE_TIMEOUT",
        key: "proxy.tunnel_idle_timeout",
    },
    // In this order: a stated deadline goes before one that is derived.
    Override {
        variable: "TERMINATION_GRACE_PERIOD_SECONDS",
        key: "proxy.drain_bound",
    },
    Override {
        variable: "CONNECTION_TERMINATION_DEADLINE",
        key: "proxy.drain_bound",
    },
    Override {
        variable: "PODVEIL_LISTENERS_SOCKET",
        key: "listeners_socket",
    },
    Override {
        variable: "PODVEIL_STATE_DIR",
        key: "state_dir",
    },
    Override {
        variable: "PODVEIL_BACK_END",
        key: "redirect.back_end",
    },
    Override {
        variable: "PODVEIL_ON_DEMAND",
        key: "proxy.on_demand",
    },
    Override {
        variable: "PODVEIL_CGROUP",
        key: "cgroup",
    },
];

/// Keys that people bring from the peers' `PROXY_CONFIG` and what they are called here.
pub const RENAMED: &[(&str, &str)] = &[
    ("caAddress", "ca_address"),
    ("concurrency", "worker_threads"),
    ("discoveryAddress", "xds_address"),
    ("nodeName", "node"),
    ("proxyAdminPort", "admin_address"),
    ("statsPort", "metrics_address"),
    ("trustDomain", "trust_domain"),
    ("xdsAddress", "xds_address"),
];

/// The environment, with the peers' variables that mean something else than their text translated.
pub struct PeerEnvironment<'a>(pub &'a dyn Environment);

impl std::fmt::Debug for PeerEnvironment<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerEnvironment")
    }
}

impl Environment for PeerEnvironment<'_> {
    fn variable(&self, name: &str) -> Option<String> {
        let text = self.0.variable(name)?;
        match name {
            "TERMINATION_GRACE_PERIOD_SECONDS" => Some(drain_bound(&text).unwrap_or(text)),
            "ZTUNNEL_WORKER_THREADS" => worker_threads(text),
            _ => Some(text),
        }
    }
}

/// What is left of the pod's grace period after a margin for ending: 5 s of a long one, 1 s of a short one.
fn drain_bound(grace_seconds: &str) -> Option<String> {
    let grace: u64 = grace_seconds.parse().ok()?;
    let margin = if grace > 10 { 5 } else { 1 };
    Some(format!("{}s", grace.saturating_sub(margin).max(1)))
}

/// The ztunnel's ways to say how many: a number, a share of the CPUs (`25%`), or `0` for all of them.
fn worker_threads(text: String) -> Option<String> {
    if text == "0" {
        return None;
    }
    let Some(Ok(percent)) = text.strip_suffix('%').map(str::parse::<usize>) else {
        return Some(text);
    };
    let available = std::thread::available_parallelism().map_or(1, NonZero::get);
    Some(available.saturating_mul(percent).div_ceil(100).to_string())
}
