// SPDX-License-Identifier: Apache-2.0
//! Podveil on real Kubernetes: two nodes, the chart, the images of this checkout.

mod journey;
mod operations;
mod strict;
