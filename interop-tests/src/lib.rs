// SPDX-License-Identifier: Apache-2.0
//! The harness of the tests in real network namespaces: a [`Mesh`] is a simulated cluster with the real programs, and
//! [`tcp`] are clients and servers that know each byte they should see.

#![forbid(unsafe_code)]

mod mesh;
pub mod tcp;

pub use mesh::{Mesh, SETTLE, shop};
