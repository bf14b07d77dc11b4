// SPDX-License-Identifier: Apache-2.0
//! What a module of the node program tells the controller: its whole state, to every replica, on each change that somebody
//! may wait for and at least every 3 s.
//!
//! A [`Source`] is the module's state; [`run`] keeps one stream to each of the [`Replicas`], whose addresses are looked up
//! again and again, on the connection that the configuration of that replica comes by as well. A stream that ends is opened
//! again with a growing wait; nothing is queued meanwhile, since each report replaces the one before it. A replica may ask
//! back whether certain workloads are in use ([`Source::holds`]): a node takes its configuration from one replica only, and
//! the others cannot read that one's versions. And it says whether Podveil is being uninstalled, so that the program knows
//! how to end ([`Controllers`]).
//!
//! Left out: what a report says.

#![forbid(unsafe_code)]

mod replicas;
mod run;
mod stream;

pub use replicas::Replicas;
pub use run::{Controllers, run};
pub use stream::Source;

use podveil_model::{Epoch, Stage};
use podveil_proto::podveil::node::v1 as wire;

/// A workload's stage on the wire.
pub fn wire_stage(stage: Stage) -> wire::EnrolmentStage {
    match stage {
        Stage::None => wire::EnrolmentStage::None,
        Stage::Wanted => wire::EnrolmentStage::Wanted,
        Stage::Capturable => wire::EnrolmentStage::Capturable,
        Stage::Announced => wire::EnrolmentStage::Announced,
        Stage::Mandatory => wire::EnrolmentStage::Mandatory,
        Stage::Draining => wire::EnrolmentStage::Draining,
    }
}

/// A workload's epoch on the wire.
pub fn wire_epoch(epoch: Epoch) -> wire::Epoch {
    wire::Epoch {
        resource_version: epoch.resource_version,
        stage: epoch.stage,
    }
}
