// SPDX-License-Identifier: Apache-2.0
//! Connection records: what became of one connection, seen from one side.

#![forbid(unsafe_code)]

mod drop_reason;
mod record;

pub use drop_reason::DropReason;
pub use record::{CloseReason, ConnectionRecord, Direction, End, Protection, Verdict};
