// SPDX-License-Identifier: Apache-2.0
//! Three switches of a namespace, without which an answer does not take the mark of what it answers.

use crate::backend::{ApplyError, VerifyError};
use podveil_netns::NetNs;
use std::fs;
use std::io;

/// A socket that is accepted takes the mark of the SYN; a reset without a socket that of the segment it refuses.
const NAMES: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];

/// How they were, one bit each. A switch that the kernel lacks (no IPv6) counts as off.
pub fn read(netns: &NetNs) -> Result<u32, ApplyError> {
    netns.run(|| {
        let mut bits = 0;
        for (bit, name) in NAMES.into_iter().enumerate() {
            match fs::read_to_string(path(name)) {
                Ok(text) if text.trim() != "0" => bits |= 1 << bit,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(ApplyError::Sysctl { name, source }),
            }
        }
        Ok(bits)
    })?
}

pub fn switch_on(netns: &NetNs) -> Result<(), ApplyError> {
    write(netns, u32::MAX)
}

pub fn write(netns: &NetNs, bits: u32) -> Result<(), ApplyError> {
    netns.run(|| {
        for (bit, name) in NAMES.into_iter().enumerate() {
            let value = if bits & 1 << bit == 0 { "0" } else { "1" };
            match fs::write(path(name), value) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(ApplyError::Sysctl { name, source });
                }
                _ => {}
            }
        }
        Ok(())
    })?
}

pub fn verify(netns: &NetNs) -> Result<(), VerifyError> {
    let off = |name: &&str| fs::read_to_string(path(name)).is_ok_and(|text| text.trim() == "0");
    match netns
        .run(|| NAMES.into_iter().find(off))
        .map_err(ApplyError::from)?
    {
        Some(name) => Err(VerifyError::Sysctl { name }),
        None => Ok(()),
    }
}

/// The folder shows the namespace of the thread that opens a file in it.
fn path(name: &str) -> String {
    format!("/proc/sys/{name}")
}
