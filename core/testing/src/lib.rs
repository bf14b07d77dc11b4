// SPDX-License-Identifier: Apache-2.0
//! Builders for tests: a workload, a service, a policy, with every field that a test does not name at its plainest.
//! Only ever a dev-dependency.

#![forbid(unsafe_code)]

mod builders;

pub use builders::{
    PolicyBuilder, ServiceBuilder, WorkloadBuilder, mesh, policy, service, workload,
};
