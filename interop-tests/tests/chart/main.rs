// SPDX-License-Identifier: Apache-2.0
//! The chart, by the real helm: what it takes, what it renders, and what a real API server makes of it.

mod configuration;
mod helm;
mod install;
mod rendering;
mod values;
