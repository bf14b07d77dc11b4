// SPDX-License-Identifier: Apache-2.0
//! The promises, held by the real programs in real network namespaces. One binary, run by `cargo xtask test netns`.

mod addresses;
mod bytes;
mod capture;
mod closing;
mod fence;
mod handshakes;
mod modes;
mod on_demand;
mod outages;
mod policy;
mod protocols;
mod surge;
