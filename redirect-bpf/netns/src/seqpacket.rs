// SPDX-License-Identifier: Apache-2.0
//! `SOCK_SEQPACKET` Unix sockets: one message a packet, with descriptors beside it.

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt,
};
use nix::sys::stat::Mode;
use nix::unistd::mkdir;
use socket2::{Domain, SockAddr, Socket, Type};
use std::fs;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most descriptors taken from one packet; a packet with more is an error and all of them are closed.
pub const MAX_FDS: usize = 16;
/// Most that the kernel lets one packet carry (`SCM_MAX_FD`). Room for all of them is given: descriptors of a packet that
/// the kernel had to cut short are open here, and nobody is told their numbers.
const MAX_SENT_FDS: usize = 253;

/// A bound socket in a directory of its own. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<Socket>,
    path: PathBuf,
}

/// One connection, either end.
#[derive(Debug)]
pub struct Connection {
    socket: AsyncFd<Socket>,
}

/// One message and the descriptors that came with it.
#[derive(Debug)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// Who is at the other end, as the kernel tells it (at the time it connected).
#[derive(Debug)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    pub pid: i32,
    /// Names this very process even after its number has been used again; `None` before kernel 6.5.
    pub pidfd: Option<OwnedFd>,
}

impl Peer {
    /// False once the process has ended, whatever became of its number. True where the kernel gives no pidfd.
    pub fn is_alive(&self) -> bool {
        (self.pidfd.as_ref()).is_none_or(|pidfd| crate::process::is_running(pidfd.as_fd()))
    }
}

impl Listener {
    /// Binds `path`. Its directory is made with mode 0700 if missing, and refused if others may enter it; a file left
    /// by an earlier process is replaced, one that still answers is not.
    /// # Errors
    /// `AddrInUse` if someone listens there, `PermissionDenied` if the directory is open to others.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let directory = path
            .parent()
            .filter(|directory| !directory.as_os_str().is_empty())
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "socket path has no directory")
            })?;
        private_directory(directory)?;
        let address = SockAddr::unix(path)?;
        if path.exists() {
            if connect_blocking(&address).is_ok() {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            fs::remove_file(path)?;
        }
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.bind(&address)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        socket.listen(8)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: kernel::watch(socket)?,
            path: path.to_owned(),
        })
    }

    /// CANCEL: no connection is lost.
    /// # Errors
    /// As `accept(2)`.
    pub async fn accept(&self) -> io::Result<Connection> {
        let (socket, _) = self
            .socket
            .async_io(Interest::READABLE, Socket::accept)
            .await?;
        Connection::new(socket)
    }
}

/// Removes the folder that [`Listener::bind`] made for `path`, unless something else lies in it. A socket there that
/// nobody answers at is removed with it.
/// # Errors
/// As `rmdir(2)`; a folder that is not there or not empty is none.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent() else {
        return Ok(());
    };
    if path.exists() && connect_blocking(&SockAddr::unix(path)?).is_err() {
        fs::remove_file(path)?;
    }
    match fs::remove_dir(folder) {
        Err(error)
            if !matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty | ErrorKind::ResourceBusy
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Connection {
    fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket: kernel::watch(socket)?,
        })
    }

    /// Connects at once: a Unix socket's server need not accept first.
    /// # Errors
    /// As `connect(2)`.
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::new(connect_blocking(&SockAddr::unix(path)?)?)
    }

    /// Two ends joined, for tests and for parent and child.
    /// # Errors
    /// As `socketpair(2)`.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, two) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None)?;
        Ok((Self::new(one)?, Self::new(two)?))
    }

    /// Sends one packet, whole or not at all.
    /// CANCEL: nothing was sent.
    /// # Errors
    /// As `sendmsg(2)`.
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                let rights = [ControlMessage::ScmRights(&raw)];
                let control = if raw.is_empty() { &[][..] } else { &rights[..] };
                sendmsg::<()>(
                    socket.as_raw_fd(),
                    &[IoSlice::new(bytes)],
                    control,
                    MsgFlags::MSG_NOSIGNAL,
                    None,
                )
                .map_err(io::Error::from)
            })
            .await
            .map(drop)
    }

    /// Takes one packet of at most `limit` bytes; `None` when the peer has closed.
    /// CANCEL: no packet is lost.
    /// # Errors
    /// `InvalidData` for a packet that is longer or carries more than [`MAX_FDS`] descriptors.
    pub async fn recv(&self, limit: usize) -> io::Result<Option<Packet>> {
        self.socket
            .async_io(Interest::READABLE, |socket| receive(socket, limit))
            .await
    }

    /// # Errors
    /// As `getsockopt(2)`.
    pub fn peer(&self) -> io::Result<Peer> {
        let credentials = getsockopt(self.socket.get_ref(), sockopt::PeerCredentials)?;
        Ok(Peer {
            uid: credentials.uid(),
            gid: credentials.gid(),
            pid: credentials.pid(),
            pidfd: kernel::peer_pidfd(self.socket.get_ref().as_fd()),
        })
    }
}

/// Sends one packet to the server at `path` and waits for one back, `bound` for each, on the calling thread. Descriptors
/// that come with it are closed.
/// # Errors
/// As `connect(2)`, `sendmsg(2)` and `recvmsg(2)`; `WouldBlock` past the bound, `UnexpectedEof` if the server closes.
pub fn ask(path: &Path, request: &[u8], limit: usize, bound: Duration) -> io::Result<Vec<u8>> {
    let socket = connect_blocking(&SockAddr::unix(path)?)?;
    socket.set_write_timeout(Some(bound))?;
    socket.set_read_timeout(Some(bound))?;
    socket.send(request)?;
    match receive(&socket, limit)? {
        Some(packet) => Ok(packet.bytes),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn connect_blocking(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.connect(address)?;
    Ok(socket)
}

fn receive(socket: &Socket, limit: usize) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; limit];
    let mut control = cmsg_space!([RawFd; MAX_SENT_FDS]);
    let (length, flags, fds) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(rights) = part {
                fds.extend(rights.into_iter().map(kernel::own));
            }
        }
        (message.bytes, message.flags, fds)
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "packet longer than allowed",
        ));
    }
    if length == 0 && fds.is_empty() {
        return Ok(None);
    }
    bytes.truncate(length);
    Ok(Some(Packet { bytes, fds }))
}

pub(crate) fn private_directory(directory: &Path) -> io::Result<()> {
    if let Some(parent) = directory.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    match mkdir(directory, Mode::S_IRWXU) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let found = fs::symlink_metadata(directory)?;
    let ours = found.is_dir()
        && found.uid() == nix::unistd::geteuid().as_raw()
        && found.mode() & 0o077 == 0;
    if ours {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{} must be a directory of our own with mode 0700",
                directory.display()
            ),
        ))
    }
}

mod kernel {
    #![expect(
        unsafe_code,
        reason = "descriptors arrive from the kernel as plain numbers, and tokio asks for a promise about one"
    )]

    use nix::libc;
    use socket2::Socket;
    use std::io;
    use std::mem;
    use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
    use tokio::io::unix::AsyncFd;

    /// Registers a socket with the runtime.
    pub fn watch(socket: Socket) -> io::Result<AsyncFd<Socket>> {
        // SAFETY: a `Socket` owns its descriptor, always names the same one, and is never taken out of the `AsyncFd`.
        unsafe { AsyncFd::register(socket) }.map_err(Into::into)
    }

    /// Takes ownership of a descriptor that `recvmsg` has just made.
    pub fn own(fd: RawFd) -> OwnedFd {
        // SAFETY: called once for each number in SCM_RIGHTS, which the kernel opened for this process alone.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    pub fn peer_pidfd(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
        const SO_PEERPIDFD: libc::c_int = 77;
        let mut pidfd: RawFd = -1;
        let mut length = mem::size_of_val(&pidfd) as libc::socklen_t;
        // SAFETY: `pidfd` is `length` bytes long, both live through the call, and any bytes are a valid integer.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERPIDFD,
                (&raw mut pidfd).cast(),
                &raw mut length,
            )
        };
        // SAFETY: on success the kernel has opened `pidfd` for this call alone.
        (result == 0 && pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[tokio::test]
    async fn a_packet_carries_bytes_and_descriptors() {
        let (one, two) = Connection::pair().unwrap();
        let file = File::open("/proc/self/status").unwrap();
        one.send(b"first", &[file.as_fd(), file.as_fd()])
            .await
            .unwrap();
        one.send(b"second", &[]).await.unwrap();
        let packet = two.recv(1024).await.unwrap().unwrap();
        assert_eq!(
            (packet.bytes.as_slice(), packet.fds.len()),
            (&b"first"[..], 2)
        );
        let packet = two.recv(1024).await.unwrap().unwrap();
        assert_eq!(
            (packet.bytes.as_slice(), packet.fds.len()),
            (&b"second"[..], 0)
        );
        drop(one);
        assert!(two.recv(1024).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_packet_past_the_limit_is_refused() {
        let (one, two) = Connection::pair().unwrap();
        one.send(&[7; 100], &[]).await.unwrap();
        let error = two.recv(99).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn the_folder_of_a_socket_goes_unless_something_else_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("private/zds.sock");
        remove_folder(&path).unwrap();
        let listener = Listener::bind(&path).unwrap();
        remove_folder(&path).unwrap();
        assert!(path.exists(), "somebody listens there");
        drop(listener);
        fs::write(directory.path().join("private/other"), "").unwrap();
        remove_folder(&path).unwrap();
        assert!(directory.path().join("private/other").exists());
        fs::remove_file(directory.path().join("private/other")).unwrap();
        // As a process that was killed leaves it.
        drop(
            Socket::new(Domain::UNIX, Type::SEQPACKET, None)
                .unwrap()
                .bind(&SockAddr::unix(&path).unwrap()),
        );
        assert!(path.exists());
        remove_folder(&path).unwrap();
        assert!(!directory.path().join("private").exists());
    }

    #[tokio::test]
    async fn descriptors_past_the_limit_are_refused_and_closed() {
        for count in [MAX_FDS + 1, MAX_SENT_FDS] {
            let (one, two) = Connection::pair().unwrap();
            let (sent, kept) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
            one.send(b"many", &vec![sent.as_fd(); count]).await.unwrap();
            drop(sent);
            let error = two.recv(1024).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            // Its other end is told only when no copy is open any more.
            kept.set_nonblocking(true).unwrap();
            assert_eq!((&kept).read(&mut [0]).unwrap(), 0, "{count} descriptors");
        }
    }

    #[tokio::test]
    async fn the_peer_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("private/zds.sock");
        let listener = Listener::bind(&path).unwrap();
        let client = Connection::connect(&path).unwrap();
        let server = listener.accept().await.unwrap();
        let peer = server.peer().unwrap();
        assert_eq!(peer.pid, std::process::id() as i32);
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert!(peer.is_alive());
        drop(client);
        assert_eq!(
            Listener::bind(&path).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_directory_open_to_others_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let open = directory.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        let error = Listener::bind(open.join("zds.sock")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
