// SPDX-License-Identifier: Apache-2.0
use podveil_netns::NetNs;
use std::io;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// `nft` and `iptables` answer in milliseconds; a machine where they need longer is in trouble that waiting does not cure.
const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("{program} failed: {message}")]
    Failed {
        program: &'static str,
        message: String,
    },
    #[error("{program} cannot be run")]
    Io {
        program: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{program} did not end within {DEADLINE:?}")]
    TimedOut { program: &'static str },
}

/// Runs a program inside `netns` and this process's own mount namespace, where `/sys/fs/cgroup` is what nft expects
/// (`ip netns exec` would mount another `/sys`).
/// CANCEL: the program is killed.
pub async fn run_in(
    netns: &NetNs,
    program: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<Vec<u8>, CommandError> {
    let failed = |source| CommandError::Io { program, source };
    let work = async {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("LC_ALL", "C")
            // Of iptables' legacy flavour: for each namespace its own, and no file that a read-only root does not let be made.
            .env("XTABLES_LOCKFILE", "/proc/self/ns/net")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // A child is born in the namespace of the thread that forks it.
        let mut child = netns
            .run(|| command.spawn())
            .map_err(|error| failed(io::Error::other(error)))?
            .map_err(failed)?;
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let write = async move {
            match stdin.write_all(input.as_bytes()).await {
                // It has read enough to fail; its own words say more.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                result => result,
            }
        };
        let (written, output) = tokio::join!(write, child.wait_with_output());
        let output = output.map_err(failed)?;
        if !output.status.success() {
            let mut message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            message.truncate(message.floor_char_boundary(2000));
            return Err(CommandError::Failed { program, message });
        }
        written.map_err(failed)?;
        Ok(output.stdout)
    };
    tokio::time::timeout(DEADLINE, work)
        .await
        .map_err(|_| CommandError::TimedOut { program })?
}
