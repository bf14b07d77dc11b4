// SPDX-License-Identifier: Apache-2.0
//! Builders for tests: a workload, a service, a policy, with every field that a test does not name at its plainest; and
//! an answer as one line.
//! Only ever a dev-dependency.

#![forbid(unsafe_code)]

mod answer;
mod builders;

pub use answer::answer_line;
pub use builders::{
    PolicyBuilder, ServiceBuilder, WorkloadBuilder, mesh, policy, service, workload,
};
