// SPDX-License-Identifier: Apache-2.0
use crate::{BackEnd, CommandError, Connection, Family, ListError};
use podveil_bpf::{Fault, NodeError};
use podveil_netns::{NetNs, NetNsError};
use podveil_plan::{Capture, Fence, FenceStep};
use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::sync::Arc;

/// One way to bring a pod's connections to the proxy. Every call is idempotent; what stands can be found again in the
/// namespace or in the kernel's tables, and is remembered only to save asking, so that a restarted process goes on where
/// the last one stopped.
pub trait Backend: Send + Sync + 'static {
    /// Makes the namespace hold exactly this. Acts on new connections only: those already open live on, and those that
    /// were open past the proxy when capture began are the answer.
    fn apply(
        &self,
        netns: &NetNs,
        capture: &Capture,
        fence: &Arc<Fence>,
    ) -> impl Future<Output = Result<BTreeSet<Connection>, ApplyError>> + Send;

    /// Changes the addresses behind the fence and nothing else.
    fn change_fence(
        &self,
        netns: &NetNs,
        step: &FenceStep,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// Does everything that [`Backend::apply`] put there still stand?
    fn verify(
        &self,
        netns: &NetNs,
        capture: &Capture,
    ) -> impl Future<Output = Result<(), VerifyError>> + Send;

    /// Is there anything of ours?
    fn stands(&self, netns: &NetNs) -> impl Future<Output = Result<bool, ApplyError>> + Send;

    /// Is there anything of this very node's? Several simulated nodes may live on one machine.
    fn owns(&self, netns: &NetNs) -> impl Future<Output = Result<bool, ApplyError>> + Send;

    /// Counts what is open. Takes connections that have ended out of `older`, and out of the fence.
    fn observe(
        &self,
        netns: &NetNs,
        older: &mut BTreeSet<Connection>,
    ) -> impl Future<Output = Result<Observed, ApplyError>> + Send;

    /// Drops what is kept outside of namespaces for those that have ended: a pod's namespace mostly ends before the pod, and
    /// its address may soon be another one's. To be called now and then; costs little.
    /// # Errors
    /// [`ApplyError`].
    fn forget_gone(&self) -> Result<(), ApplyError> {
        Ok(())
    }

    /// Takes everything away. Connections that the proxy still carries break: wait for [`Observed::captured`] to be 0
    /// where that matters.
    fn remove(&self, netns: &NetNs) -> impl Future<Output = Result<(), ApplyError>> + Send;
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Observed {
    /// Connections of the pod that the proxy carries, or that need our rules for their way back.
    pub captured: usize,
    /// Connections past the proxy that were open before capture and still are.
    pub older: usize,
    pub fence: FenceCount,
    /// SYNs that were dropped because no listener of the proxy stood.
    pub no_listener_syns: u64,
    /// Whose pod it is; `None` before the first look.
    pub back_end: Option<BackEnd>,
}

/// Packets that the fence refused; zero in a healthy cluster.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FenceCount {
    /// Plaintext of the pod towards an enrolled address.
    pub out_packets: u64,
    /// Plain SYNs from one mandatory workload to another.
    pub in_packets: u64,
    /// The application's answers to the proxy that would have left the pod.
    pub lost_reply_packets: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("the namespace's rules cannot be read or written")]
    Command(#[from] CommandError),
    #[error("the namespace's connections cannot be listed")]
    Connections(#[source] io::Error),
    #[error("eBPF programs or maps cannot be written")]
    Ebpf(#[from] NodeError),
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    #[error("the namespace's routes cannot be read or written")]
    Routes(#[source] io::Error),
    #[error("no namespace can be made to compare rules in")]
    Scratch(#[source] io::Error),
    #[error("sysctl {name} cannot be read or set")]
    Sysctl {
        name: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("table {table} of iptables, now empty, cannot be removed")]
    Table {
        table: String,
        #[source]
        source: io::Error,
    },
    #[error("unexpected output of {program}")]
    Output {
        program: &'static str,
        #[source]
        source: serde_json::Error,
    },
}

impl From<ListError> for ApplyError {
    fn from(error: ListError) -> Self {
        match error {
            ListError::Io(source) => Self::Connections(source),
            ListError::NetNs(error) => Self::NetNs(error),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("the namespace cannot be read")]
    Apply(#[from] ApplyError),
    #[error("chain {chain} is not as written: {found} of {expected} rules stand")]
    Chain {
        chain: &'static str,
        expected: usize,
        found: usize,
    },
    #[error("IPv{}: a connection opened in the namespace is not captured", family.version())]
    Connection {
        family: Family,
        #[source]
        source: io::Error,
    },
    #[error("chain {chain} of table {table} is not as written")]
    IptablesChain { table: String, chain: String },
    #[error("map {map} does not hold what was written")]
    Map { map: &'static str },
    #[error("an eBPF program was taken away")]
    Program(#[from] Fault),
    #[error("IPv{version}: the way back over lo is missing ({what})")]
    Route { version: u8, what: &'static str },
    #[error("sysctl {name} is not as it was set")]
    Sysctl { name: &'static str },
    #[error("table inet podveil is missing")]
    Table,
}
