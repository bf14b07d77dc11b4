// SPDX-License-Identifier: Apache-2.0
//! Puts a plan into a pod's network namespace, checks that it stands, and takes it away again.
//!
//! [`Backend`] is what `redirect` asks for. [`Ebpf`] captures without NAT and without conntrack, by the programs of
//! `podveil-bpf`. [`Nftables`] is the portable answer: one table, `inet podveil`, written by `nft -f -` in one
//! transaction; [`Iptables`] is for nodes whose kernel has nothing newer. All have one route table for the way back of
//! kept client addresses. What the kernel was seen to do, and why each is as it is, is told at the types. [`BackEnds`] is
//! all of them, with a choice that is made by trying what this node has. [`Connections`] lists what a namespace has open.
//!
//! Starts no task; every command it runs has a deadline and dies with the future that waits for it.

#![forbid(unsafe_code)]

mod back_ends;
mod backend;
mod command;
mod connections;
mod conntrack;
mod ebpf;
mod generations;
mod iptables;
mod nfnetlink;
mod nftables;
mod probe;
mod reference;
mod routes;
mod ruleset;
mod sysctls;
mod verification;

pub use back_ends::{BackEnd, BackEndChoice, BackEndError, BackEnds, Chosen};
pub use backend::{ApplyError, Backend, FenceCount, Observed, VerifyError};
pub use command::CommandError;
pub use connections::{Addresses, Connection, Connections, ListError};
pub use ebpf::Ebpf;
pub use iptables::{Flavour, Iptables};
pub use nftables::Nftables;
pub use podveil_bpf::NodeError;
pub use probe::{Feature, Unusable};
pub use routes::Family;
