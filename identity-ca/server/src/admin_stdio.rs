// SPDX-License-Identifier: Apache-2.0
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

const BUFFER_BYTES: usize = 16 * 1024;

/// Carries bytes between the admin socket and this process's own standard input and output, for a caller at the other end
/// of a Kubernetes `exec`. Ends when the CA closes the connection or the caller leaves; input that ends first only ends
/// that direction.
///
/// # Errors
/// If nobody listens on `socket`, or we may not connect, or a side breaks.
pub fn admin_stdio(socket: &Path) -> io::Result<()> {
    let ca = UnixStream::connect(socket)?;
    let mut towards_ca = ca.try_clone()?;
    // Not joined: a read of standard input cannot be ended from here, and it ends with the process.
    thread::spawn(move || {
        let copied = copy(&mut io::stdin().lock(), &mut towards_ca);
        // An input that broke is the caller gone; one that ended may still read the answer.
        let end = if copied.is_ok() {
            Shutdown::Write
        } else {
            Shutdown::Both
        };
        let _ = towards_ca.shutdown(end);
    });
    match copy(&mut &ca, &mut io::stdout().lock()) {
        // The caller has left before the CA's last words, which is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        copied => copied,
    }
}

/// As `io::copy`, but each piece is passed on at once: the two ends talk to each other.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                to.write_all(&buffer[..read])?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
