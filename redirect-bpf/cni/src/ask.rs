// SPDX-License-Identifier: Apache-2.0
use crate::wire::{Answer, MAX_PACKET_BYTES, Request};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("its answer is not understood")]
    Answer(#[source] serde_json::Error),
    #[error("it has closed the connection without an answer")]
    Closed,
    #[error("it cannot be reached at {path}")]
    Connect {
        path: String,
        #[source]
        source: Errno,
    },
    #[error("it did not answer in time")]
    Silent,
    #[error("the connection broke")]
    Socket(#[source] Errno),
}

/// Asks the node program; each of the three waits (to be let in, to be heard, to be answered) is at most `bound` long.
/// # Errors
/// See [`AskError`].
pub(crate) fn ask(
    path: &Path,
    request: &Request,
    netns: Option<BorrowedFd<'_>>,
    bound: Duration,
) -> Result<Answer, AskError> {
    let failed = |source| match source {
        Errno::EAGAIN => AskError::Silent,
        source => AskError::Socket(source),
    };
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(failed)?;
    let bound = TimeVal::milliseconds(bound.as_millis().try_into().unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::SendTimeout, &bound).map_err(failed)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &bound).map_err(failed)?;
    let cannot = |source| AskError::Connect {
        path: path.display().to_string(),
        source,
    };
    let address = UnixAddr::new(path).map_err(cannot)?;
    connect(socket.as_raw_fd(), &address).map_err(cannot)?;

    let bytes = request.encode();
    let fds: Vec<_> = netns.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let parts = [IoSlice::new(&bytes)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &parts,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(failed)?;

    let mut answer = vec![0; MAX_PACKET_BYTES];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(failed)?;
    if length == 0 {
        return Err(AskError::Closed);
    }
    Answer::decode(&answer[..length.min(answer.len())]).map_err(AskError::Answer)
}
