// SPDX-License-Identifier: Apache-2.0
//! What a back end needs and a node may lack, found out by trying: rules and programs are loaded, not looked up by the
//! kernel's version.

use crate::back_ends::BackEnd;
use crate::backend::ApplyError;
use crate::command::CommandError;
use podveil_bpf::NodeError;
use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;

/// A part of kernel or machine that a back end needs.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Feature {
    /// A folder to pin in: a bpf file system above it, or the right to mount one.
    BpfFileSystem,
    /// Links at cgroups and network namespaces (Linux 5.9).
    BpfLinks,
    /// bpf(2) itself, and the kinds of maps.
    BpfMaps,
    /// cgroup2, with the proxy's group in it.
    Cgroup2,
    /// Programs in `connect()` (`cgroup/connect4`, with `bpf_setsockopt` and socket storage).
    ConnectHook,
    /// Programs that see what a pod sends (`cgroup_skb/egress`).
    EgressHook,
    /// Programs that choose the listening socket (`sk_lookup`, Linux 5.9).
    SkLookup,
    /// Programs that see sockets being made (`cgroup/sock_create`).
    SockCreate,
    /// Programs that see sockets open and close (`sockops`).
    SockOps,
    /// Sysctls of pods that can be written: a proc file system of our own, where `/proc/sys` is read-only.
    Sysctls,
    /// Network namespaces of our own to try rules in.
    Namespaces,
    /// The program that writes the rules.
    Program,
    /// The rules: the kernel refuses one of them.
    Rules,
}

impl Feature {
    pub const ALL: [Self; 13] = [
        Self::BpfFileSystem,
        Self::BpfLinks,
        Self::BpfMaps,
        Self::Cgroup2,
        Self::ConnectHook,
        Self::EgressHook,
        Self::Namespaces,
        Self::Program,
        Self::Rules,
        Self::SkLookup,
        Self::SockCreate,
        Self::SockOps,
        Self::Sysctls,
    ];
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BpfFileSystem => "bpf_file_system",
            Self::BpfLinks => "bpf_links",
            Self::BpfMaps => "bpf_maps",
            Self::Cgroup2 => "cgroup2",
            Self::ConnectHook => "connect_hook",
            Self::EgressHook => "egress_hook",
            Self::Namespaces => "namespaces",
            Self::Program => "program",
            Self::Rules => "rules",
            Self::SkLookup => "sk_lookup",
            Self::SockCreate => "sock_create",
            Self::SockOps => "sock_ops",
            Self::Sysctls => "sysctls",
        })
    }
}

/// Why a back end cannot be used on this node.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{back_end} cannot be used here, {feature} is missing: {reason}")]
pub struct Unusable {
    pub back_end: BackEnd,
    pub feature: Feature,
    pub reason: Arc<str>,
}

impl Unusable {
    pub(crate) fn ebpf(error: &NodeError) -> Self {
        let feature = match error {
            NodeError::Cgroup { .. } => Feature::Cgroup2,
            NodeError::Folder { .. } | NodeError::Remove { .. } => Feature::BpfFileSystem,
            NodeError::Link { .. } => Feature::BpfLinks,
            NodeError::Load { program, .. } => match *program {
                "own_socket" => Feature::SockCreate,
                "capture_paths" | "own_connections" => Feature::SockOps,
                "capture_ipv4" | "capture_ipv6" | "fence_ipv4" | "fence_ipv6" => {
                    Feature::ConnectHook
                }
                "fence_out" => Feature::EgressHook,
                "capture" | "fence_in" => Feature::SkLookup,
                // The whole object: its maps are made first.
                _ => Feature::BpfMaps,
            },
            NodeError::Sysctls(_) => Feature::Sysctls,
            NodeError::NetNs(_) => Feature::Namespaces,
            NodeError::Table(_) => Feature::BpfMaps,
        };
        Self::new(BackEnd::Ebpf, feature, error)
    }

    pub(crate) fn rules(back_end: BackEnd, error: &ApplyError) -> Self {
        let feature = match error {
            ApplyError::Command(CommandError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Feature::Program
            }
            ApplyError::NetNs(_) | ApplyError::Scratch(_) => Feature::Namespaces,
            _ => Feature::Rules,
        };
        Self::new(back_end, feature, error)
    }

    fn new(back_end: BackEnd, feature: Feature, error: &dyn Error) -> Self {
        let mut reason = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        let reason = reason.into();
        Self {
            back_end,
            feature,
            reason,
        }
    }
}
