// SPDX-License-Identifier: Apache-2.0
use anyhow::{Context, bail};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The program answers from memory.
const BOUND: Duration = Duration::from_secs(2);
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Asks the program whose readiness endpoint is this Unix socket whether it is ready: a kubelet's probe, which cannot speak
/// to such a socket itself.
///
/// # Errors
/// It is not, and why; or it does not answer.
pub fn ask(socket: &Path) -> anyhow::Result<()> {
    let answer = get(socket)
        .with_context(|| format!("the program at {} does not answer", socket.display()))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    match head.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => bail!("{}", body.trim_end()),
    }
}

fn get(socket: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.set_write_timeout(Some(BOUND))?;
    stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER_BYTES).read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_program::http::{Routes, serve_unix};
    use tokio_util::sync::CancellationToken;

    #[tokio::test]
    async fn who_is_not_ready_says_what_it_waits_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ready.sock");
        let said = |pending: Vec<String>| {
            let path = path.clone();
            let routes = Routes::default().readiness(move || pending.clone());
            serve_unix(&path, routes, CancellationToken::new()).unwrap();
            tokio::task::spawn_blocking(move || ask(&path))
        };
        said(Vec::new()).await.unwrap().unwrap();
        let error = said(vec!["a certificate".to_owned()]).await.unwrap();
        assert_eq!(error.unwrap_err().to_string(), "not ready:\na certificate");
        let nobody = ask(&folder.path().join("nobody.sock"));
        assert!(nobody.unwrap_err().to_string().contains("does not answer"));
    }
}
