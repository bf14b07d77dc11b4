// SPDX-License-Identifier: Apache-2.0
//! What a test takes away from a cluster, and gives back.

use crate::{Cluster, Machine, Node};
use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podveil_netns::NetNs;
use podveil_sim::eventually;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// A table of our own, so that what is dropped can be let through again by one command.
const TABLE: &str = "outage";
/// After SIGKILL.
const END: Duration = Duration::from_secs(20);

/// What the process has among its arguments that only starts another one.
const SUPERVISOR: &str = "--supervise";

impl Machine {
    /// Its processes that were started by exactly this program name (the last part of its path), with all these words
    /// among the arguments, as this host numbers them.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn processes(&self, program: &str, words: &[&str]) -> anyhow::Result<Vec<Pid>> {
        let own = namespace(self.init).context("the machine has ended")?;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // Gone meanwhile: not one of them.
            let Ok(command) = fs::read_to_string(format!("/proc/{pid}/cmdline")) else {
                continue;
            };
            let arguments: Vec<&str> = command.split('\0').collect();
            let is_program = arguments.first().is_some_and(|path| {
                Path::new(path).file_name().and_then(|name| name.to_str()) == Some(program)
            });
            if is_program
                && !arguments.contains(&SUPERVISOR)
                && words.iter().all(|word| arguments.contains(word))
                && (namespace(pid).as_ref() == Some(&own) || self.is_ancestor_of(pid))
            {
                found.push(Pid::from_raw(pid.try_into()?));
            }
        }
        Ok(found)
    }

    /// Containers have PID namespaces of their own inside the machine's.
    fn is_ancestor_of(&self, mut pid: u32) -> bool {
        while let Some(parent) = parent(pid) {
            if parent == self.init {
                return true;
            }
            pid = parent;
        }
        false
    }

    /// Signals every one of [`Machine::processes`]; how many there were.
    ///
    /// # Errors
    /// If one cannot be signalled.
    pub fn signal(&self, program: &str, words: &[&str], signal: Signal) -> anyhow::Result<usize> {
        let found = self.processes(program, words)?;
        for pid in &found {
            kill(*pid, signal).with_context(|| format!("{signal} to {program} ({pid})"))?;
        }
        Ok(found.len())
    }

    /// Drops every packet from or to these TCP ports, whoever sends it and whichever way it is going, until
    /// [`Machine::heal`].
    ///
    /// # Errors
    /// If nftables refuses.
    pub fn partition(&self, ports: &[u16]) -> anyhow::Result<()> {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        let ports = ports.join(", ");
        let chain = |hook: &str| {
            format!(
                "chain {hook} {{ type filter hook {hook} priority 300; \
                 tcp dport {{ {ports} }} drop; tcp sport {{ {ports} }} drop; }}"
            )
        };
        let table = format!(
            "table inet {TABLE} {{\n{}\n{}\n{}\n}}",
            chain("input"),
            chain("forward"),
            chain("output")
        );
        self.run(&["nft", &table]).map(drop)
    }

    /// # Errors
    /// If there was no partition.
    pub fn heal(&self) -> anyhow::Result<()> {
        self.run(&["nft", "delete", "table", "inet", TABLE])
            .map(drop)
    }
}

fn namespace(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok().filter(|parent| *parent > 0)
}

impl Node {
    /// The network namespace of the pod that has this address now.
    ///
    /// # Errors
    /// If no pod here has it.
    pub fn pod_netns(&self, address: IpAddr) -> anyhow::Result<NetNs> {
        let script = format!(
            "for netns in /run/netns/*; do \
                 nsenter --net=$netns ip -oneline address 2>/dev/null | grep --quiet --fixed-strings ' {address}/' && \
                     echo $netns; \
             done; true"
        );
        let found = self.machine.run(&["sh", "-c", &script])?;
        let path = found
            .lines()
            .next()
            .with_context(|| format!("nobody on {} has {address}", self.name()))?;
        NetNs::open(format!("/proc/{}/root{path}", self.machine.init))
            .with_context(|| format!("opening {path} of {}", self.name()))
    }
}

impl Cluster {
    /// Kills the API server and what it stores in, without warning. What it has stored stays.
    pub fn kill_server(&mut self) {
        self.server = None;
        self.etcd = None;
    }

    /// Kills everything of Kubernetes and every pod, on all machines, as a power cut does.
    ///
    /// # Errors
    /// If something goes on.
    pub fn power_off(&mut self) -> anyhow::Result<()> {
        self.kill_server();
        self.controllers = None;
        self.scheduler = None;
        for node in &mut self.nodes {
            node.kubelet = None;
            node.kube_proxy = None;
            node.containerd = Mutex::new(None);
        }
        let nodes = self.nodes.iter().map(|node| &node.machine);
        for machine in nodes.chain([&self.control]) {
            // All but its first process: pods outlive their shims, and those the runtime.
            machine.run(&["sh", "-c", "kill -KILL -1; true"])?;
            eventually(END, "everything has ended", || {
                for program in ["etcd", "kube-apiserver", "podveil-node", "podveilctl"] {
                    let left = machine.processes(program, &[])?;
                    ensure!(left.is_empty(), "{program} runs on {}", machine.name);
                }
                Ok(())
            })?;
        }
        for node in &self.nodes {
            // What is in memory only goes with the power; of the rest the machines' first processes hold on.
            node.machine.run(&["rm", "-rf", "/run/podveil"])?;
        }
        Ok(())
    }

    /// Starts all of it again, at once. Nothing is ready when it returns.
    ///
    /// # Errors
    /// If something cannot be started.
    pub fn power_on(&mut self) -> anyhow::Result<()> {
        self.start_server()?;
        self.start_control_plane()?;
        for node in &mut self.nodes {
            node.start_containerd()?;
            node.start_kubelet()?;
            node.start_kube_proxy()?;
        }
        Ok(())
    }
}
