// SPDX-License-Identifier: Apache-2.0
//! What plugin and node program say to each other: one packet each way, JSON, with the pod's network namespace beside the
//! question as a descriptor.

use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::time::Duration;

/// Longest packet, either way.
pub const MAX_PACKET_BYTES: usize = 16 * 1024;
/// How long the node program waits to be told of a pod, before it says that it was not.
pub const UNKNOWN_BOUND: Duration = Duration::from_secs(5);
/// How long a pod that is being captured is waited for: on a busy node the work of one waits for that of others, and would
/// begin anew with the next sandbox. Far below the two minutes that a kubelet gives a sandbox.
pub const CAPTURE_BOUND: Duration = Duration::from_secs(30);

/// A question of the plugin.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Request {
    pub about: About,
    pub namespace: String,
    pub pod: String,
    pub uid: String,
    /// The runtime's name for the sandbox.
    pub sandbox: String,
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum About {
    /// The sandbox is new: answered when the pod may start.
    Start,
    /// As it is now.
    Now,
    /// The sandbox ends. Without a namespace.
    End,
}

/// The node program's word.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Answer {
    /// Capture stands.
    Captured,
    /// It is none of ours.
    NotEnrolled,
    /// One sentence why it must not start now.
    Refused { reason: String },
}

impl Request {
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// # Errors
    /// If it is none.
    pub fn decode(packet: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(packet)
    }
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// # Errors
    /// If it is none.
    pub fn decode(packet: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_is_understood_as_it_was_meant() {
        let request = Request {
            about: About::Start,
            namespace: "shop".into(),
            pod: "web".into(),
            uid: "u".into(),
            sandbox: "s".into(),
            addresses: vec!["fd00::1".parse().unwrap()],
        };
        assert_eq!(Request::decode(&request.encode()).unwrap(), request);
        let reason = "no".to_owned();
        for answer in [
            Answer::Captured,
            Answer::NotEnrolled,
            Answer::Refused { reason },
        ] {
            assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }
        assert!(Answer::decode(b"").is_err());
        assert!(Answer::decode(br#"{"verdict": "fine"}"#).is_err());
    }
}
