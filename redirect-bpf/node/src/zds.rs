// SPDX-License-Identifier: Apache-2.0
//! ZDS, the agent's side: hands pods over to the proxy, each with its network namespace.
//!
//! [`session::Session`] is the conversation with one proxy and does no I/O: it compares what is offered with what the proxy has
//! acknowledged, and says what to send next. [`serve`] is the shell around it: one proxy at a time, checked before
//! anything is sent.

mod server;
mod session;

#[cfg(test)]
pub use server::Acknowledged;
pub use server::{Offers, Proxy, serve};
pub use session::{Offer, Taking};
