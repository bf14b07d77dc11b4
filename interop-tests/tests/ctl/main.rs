// SPDX-License-Identifier: Apache-2.0
//! `podveilctl`, the binary, against a real API server.

mod pre;
mod run;
