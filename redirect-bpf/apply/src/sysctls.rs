// SPDX-License-Identifier: Apache-2.0
//! Three switches of a namespace, without which an answer does not take the mark of what it answers.

use crate::backend::{ApplyError, VerifyError};
use podveil_bpf::procfs;
use podveil_netns::NetNs;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A socket that is accepted takes the mark of the SYN; a reset without a socket that of the segment it refuses.
const NAMES: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];

/// Where sysctls can be written.
#[derive(Debug)]
pub struct Sysctls {
    /// A proc file system of our own, where the one at `/proc` is read-only.
    own: Option<OwnedFd>,
}

impl Sysctls {
    /// # Errors
    /// When they can be written nowhere.
    pub fn open() -> io::Result<Self> {
        let shared = Self { own: None };
        let own = match OpenOptions::new().write(true).open(shared.path(NAMES[0])) {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Some(procfs()?),
            opened => opened.map(|_| None)?,
        };
        Ok(Self { own })
    }

    /// How they were, one bit each. A switch that the kernel lacks (no IPv6) counts as off.
    pub fn read(&self, netns: &NetNs) -> Result<u32, ApplyError> {
        netns.run(|| {
            let mut bits = 0;
            for (bit, name) in NAMES.into_iter().enumerate() {
                match fs::read_to_string(self.path(name)) {
                    Ok(text) if text.trim() != "0" => bits |= 1 << bit,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(source) => return Err(ApplyError::Sysctl { name, source }),
                }
            }
            Ok(bits)
        })?
    }

    pub fn switch_on(&self, netns: &NetNs) -> Result<(), ApplyError> {
        self.write(netns, u32::MAX)
    }

    pub fn write(&self, netns: &NetNs, bits: u32) -> Result<(), ApplyError> {
        netns.run(|| {
            for (bit, name) in NAMES.into_iter().enumerate() {
                let value = if bits & 1 << bit == 0 { "0" } else { "1" };
                match fs::write(self.path(name), value) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(ApplyError::Sysctl { name, source });
                    }
                    _ => {}
                }
            }
            Ok(())
        })?
    }

    pub fn verify(&self, netns: &NetNs) -> Result<(), VerifyError> {
        let off =
            |name: &&str| fs::read_to_string(self.path(name)).is_ok_and(|text| text.trim() == "0");
        match netns
            .run(|| NAMES.into_iter().find(off))
            .map_err(ApplyError::from)?
        {
            Some(name) => Err(VerifyError::Sysctl { name }),
            None => Ok(()),
        }
    }

    /// The folder shows the namespace of the thread that opens a file in it.
    fn path(&self, name: &str) -> String {
        match &self.own {
            Some(own) => format!("/proc/self/fd/{}/sys/{name}", own.as_raw_fd()),
            None => format!("/proc/sys/{name}"),
        }
    }
}
