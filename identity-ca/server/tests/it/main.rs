// SPDX-License-Identifier: Apache-2.0
//! A CA as it runs: gRPC over loopback TLS with the programs' own client, and the binary under `kill -9`.

mod admin_stdio;
mod harness;
mod killed;
mod rotation;
mod serving;
