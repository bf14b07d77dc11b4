// SPDX-License-Identifier: Apache-2.0
use crate::kernel::{self, AttachType, LinkInfo};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A program that is loaded.
#[derive(Debug)]
pub struct Loaded {
    pub name: &'static str,
    pub kind: AttachType,
    pub fd: OwnedFd,
}

/// What stands at a pin.
#[derive(Debug, Eq, PartialEq)]
pub enum Standing {
    /// No pin, or a link whose target is gone or another one.
    Nothing,
    /// A link with another program, such as an older one.
    Other,
    /// This program.
    Exactly,
}

/// # Errors
/// As bpf(2).
pub fn standing(pin: &Path, program: &Loaded, target: u64) -> io::Result<Standing> {
    let link = match kernel::get(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Standing::Nothing),
        Err(error) => return Err(error),
    };
    let info: LinkInfo = kernel::link_info(link.as_fd(), program.kind)?;
    Ok(if info.target != target {
        Standing::Nothing
    } else if info.program == kernel::program_id(program.fd.as_fd())? {
        Standing::Exactly
    } else {
        Standing::Other
    })
}

/// Makes the link at `pin` hold `program`. With `anew` a link that stands gives way to one behind all others, without a
/// moment in which neither acts.
/// # Errors
/// As bpf(2).
pub fn ensure(
    pin: &Path,
    program: &Loaded,
    target: (BorrowedFd<'_>, u64),
    anew: bool,
) -> io::Result<Standing> {
    let found = standing(pin, program, target.1)?;
    match found {
        Standing::Exactly if !anew => {}
        Standing::Other if !anew => {
            kernel::link_update(kernel::get(pin)?.as_fd(), program.fd.as_fd())?;
        }
        _ => {
            let link = kernel::link_create(program.fd.as_fd(), target.0, program.kind)?;
            let fresh = pin.with_file_name(format!("{}_new", program.name));
            match fs::remove_file(&fresh) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            kernel::pin(link.as_fd(), &fresh)?;
            fs::rename(&fresh, pin)?;
        }
    }
    Ok(found)
}
