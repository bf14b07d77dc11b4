// SPDX-License-Identifier: Apache-2.0
use crate::PodContext;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

/// First and longest pause after a failed accept. A connection that ends gives its descriptor back, so trying again
/// soon is right; trying at once would spin.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// Where connections come from.
pub trait Listener: Send + 'static {
    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send;
}

impl Listener for TcpListener {
    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send {
        self.accept()
    }
}

/// Accepts on every listener until `drain` or `stop`, then waits for the last of the tasks that `take` started.
pub async fn serve<L: Listener>(
    pod: &PodContext,
    listeners: Vec<L>,
    tasks: &TaskTracker,
    take: impl Fn(TcpStream, SocketAddr) + Clone + Send + 'static,
) {
    let accepting = pod.drain.child_token();
    for listener in listeners {
        tasks.spawn(accept_loop(listener, accepting.clone(), take.clone()));
    }
    let _stopped = pod.stop.run_until_cancelled(pod.drain.cancelled()).await;
    accepting.cancel();
    tasks.close();
    tasks.wait().await;
}

/// Takes connections until `stop`, then closes the listener. Pauses, longer each time, while none can be accepted.
async fn accept_loop<L: Listener>(
    listener: L,
    stop: CancellationToken,
    mut take: impl FnMut(TcpStream, SocketAddr),
) {
    let mut pause = PAUSE.0;
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = PAUSE.0;
                take(stream, peer);
            }
            // This one connection went away while it waited.
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                if pause == PAUSE.0 {
                    warn!(%error, "cannot accept connections; trying again with growing pauses");
                }
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(PAUSE.1);
            }
        }
    }
}

fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::time::Instant;

    struct OutOfDescriptors(Arc<AtomicU32>);

    impl Listener for OutOfDescriptors {
        async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Err(io::Error::from_raw_os_error(24))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_descriptors_the_loop_pauses() {
        let tries = Arc::new(AtomicU32::new(0));
        let stop = CancellationToken::new();
        let begin = Instant::now();
        let running = tokio::spawn(accept_loop(
            OutOfDescriptors(tries.clone()),
            stop.clone(),
            |_, _| unreachable!("nothing is accepted"),
        ));
        tokio::time::sleep_until(begin + Duration::from_secs(10)).await;
        stop.cancel();
        running.await.unwrap();
        // 5 ms doubling to 1 s: 8 tries in the first 1.3 s, then one a second.
        let tries = tries.load(Ordering::Relaxed);
        assert!((10..=20).contains(&tries), "{tries} tries in 10 s");
    }
}
