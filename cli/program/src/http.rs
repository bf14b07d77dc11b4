// SPDX-License-Identifier: Apache-2.0
//! The small HTTP endpoint of every program: metrics, readiness, read-only state. GET only; what changes state is on a
//! Unix socket elsewhere.

use bytes::Bytes;
use http::uri::Authority;
use http::{Method, Response, StatusCode, header};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// A scraper or a person needs one; a flood of them must not eat the program's descriptors. Above it the oldest connection
/// of whoever has most gives its place, so that who only holds connections keeps no probe of the kubelet out.
const MAX_CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// One request and its answer, so that a reader who does not read gives its place back.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEADER_BYTES: usize = 8 * 1024;
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Between two looks whether a taken address is free.
const TAKEN_PAUSE: Duration = Duration::from_millis(100);

/// What a path answers.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub body: Bytes,
}

impl Answer {
    pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: body.into(),
        }
    }

    pub fn json(body: impl Into<Bytes>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "application/json",
            body: body.into(),
        }
    }

    pub fn protobuf(body: impl Into<Bytes>) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: "application/x-protobuf",
            body: body.into(),
        }
    }
}

/// Paths and what answers them. Handlers must be quick: they run on the runtime's threads.
#[derive(Clone, Default)]
pub struct Routes {
    paths: BTreeMap<&'static str, Arc<dyn Fn() -> Answer + Send + Sync>>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.paths.keys()).finish()
    }
}

impl Routes {
    #[must_use]
    pub fn get(
        mut self,
        path: &'static str,
        handler: impl Fn() -> Answer + Send + Sync + 'static,
    ) -> Self {
        self.paths.insert(path, Arc::new(handler));
        self
    }

    /// `/metrics` and `/stats/prometheus` of a registry.
    #[must_use]
    pub fn metrics(self, registry: prometheus::Registry) -> Self {
        let encode = move || {
            let mut text = String::new();
            match prometheus::TextEncoder::new().encode_utf8(&registry.gather(), &mut text) {
                Ok(()) => Answer {
                    content_type: "text/plain; version=0.0.4",
                    ..Answer::text(StatusCode::OK, text)
                },
                Err(error) => Answer::text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    format!("encoding metrics: {error}\n"),
                ),
            }
        };
        self.get("/metrics", encode.clone())
            .get("/stats/prometheus", encode)
    }

    /// `/healthz/ready`: 200 when `pending` is empty, else 503 with one line for each thing waited for. `/healthz/live`:
    /// 200 as long as the process answers at all, so that waiting for another program is no reason to be restarted.
    #[must_use]
    pub fn readiness(self, pending: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Self {
        self.get("/healthz/live", || Answer::text(StatusCode::OK, "alive\n"))
            .get("/healthz/ready", move || match pending() {
                waiting if waiting.is_empty() => Answer::text(StatusCode::OK, "ready\n"),
                waiting => Answer::text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("not ready:\n{}\n", waiting.join("\n")),
                ),
            })
    }

    fn answer(&self, method: &Method, path: &str) -> Answer {
        if method != Method::GET {
            return Answer::text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match self.paths.get(path) {
            Some(handler) => handler(),
            None => {
                let known: Vec<&str> = self.paths.keys().copied().collect();
                Answer::text(
                    StatusCode::NOT_FOUND,
                    format!("not here; try {}\n", known.join(" ")),
                )
            }
        }
    }
}

/// Binds `address` now and serves it on a task of its own until `stop`. Returns the bound address. `[::]` is every address
/// of both families, and on a machine without IPv6 every IPv4 address. What listens on loopback is for this machine only, and
/// answers 421 to whoever came by a name other than `localhost`: a web page may make its own name lead here.
///
/// # Errors
/// The bind's, for the operator: the address is taken or not ours.
pub async fn serve(
    address: SocketAddr,
    routes: Routes,
    stop: CancellationToken,
) -> io::Result<SocketAddr> {
    let listener = bind(address).await?;
    let bound = listener.local_addr()?;
    spawn(
        Listener::Tcp(listener),
        bound.ip().is_loopback(),
        routes,
        stop,
    );
    Ok(bound)
}

/// As [`serve`], but an address that is taken is served as soon as it is free: it belongs to the process that this one
/// follows. Returns `address` then.
///
/// # Errors
/// As [`serve`], but not that the address is taken.
pub async fn serve_when_free(
    address: SocketAddr,
    routes: Routes,
    stop: CancellationToken,
) -> io::Result<SocketAddr> {
    match serve(address, routes.clone(), stop.clone()).await {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {}
        served => return served,
    }
    tracing::info!(%address, "another process has this address: it is served when that has ended");
    tokio::spawn(async move {
        let sleep = || stop.run_until_cancelled(tokio::time::sleep(TAKEN_PAUSE));
        while sleep().await.is_some() {
            match serve(address, routes.clone(), stop.clone()).await {
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(error) => {
                    return tracing::error!(%address, %error, "this address cannot be served");
                }
                Ok(_) => return tracing::info!(%address, "this address is free and served"),
            }
        }
    });
    Ok(address)
}

/// As [`serve`], at a Unix socket that only this user may use. What an earlier process has left there is replaced.
///
/// # Errors
/// The bind's, for the operator.
pub fn serve_unix(path: &Path, routes: Routes, stop: CancellationToken) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    spawn(Listener::Unix(listener), false, routes, stop);
    Ok(())
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error)
            if address.ip() == Ipv6Addr::UNSPECIFIED
                && error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection of either kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// The connection, and its peer's address where peers have one.
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, Option<IpAddr>)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                (Box::new(stream), Some(peer.ip()))
            }
            Self::Unix(listener) => (Box::new(listener.accept().await?.0), None),
        })
    }
}

/// With `named`, only requests for this machine's own name or an address are answered.
fn spawn(listener: Listener, named: bool, routes: Routes, stop: CancellationToken) {
    tokio::spawn(async move {
        let _ended = stop
            .run_until_cancelled(accept(listener, named, Arc::new(routes), stop.clone()))
            .await;
    });
}

async fn accept(
    listener: Listener,
    named: bool,
    routes: Arc<Routes>,
    stop: CancellationToken,
) -> Infallible {
    let mut open = Open::default();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let (routes, stop) = (routes.clone(), stop.clone());
        let connection = tokio::spawn(async move {
            let respond = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let answer = if named && !is_for_this_machine(&request) {
                    Answer::text(StatusCode::MISDIRECTED_REQUEST, "only for localhost\n")
                } else {
                    routes.answer(request.method(), request.uri().path())
                };
                async move { Ok::<_, Infallible>(response(answer)) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(MAX_HEADER_BYTES)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), respond);
            let connection = tokio::time::timeout(CONNECTION_TIMEOUT, connection);
            match stop.run_until_cancelled(connection).await {
                Some(Ok(Err(error))) => tracing::debug!(%error, "an HTTP connection ended early"),
                Some(Err(_)) => tracing::debug!("an HTTP connection took too long"),
                Some(Ok(Ok(()))) | None => {}
            }
        });
        open.insert(peer, connection.abort_handle());
    }
}

/// Does the request name `localhost` or an address, or nobody? A name is somebody's who may lead it anywhere (DNS rebinding),
/// an address is not.
fn is_for_this_machine<B>(request: &http::Request<B>) -> bool {
    let named = |authority: &Authority| {
        let host = authority.host();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
    };
    let mut hosts = request.headers().get_all(header::HOST).iter();
    hosts.all(|host| Authority::try_from(host.as_bytes()).is_ok_and(|host| named(&host)))
        && request.uri().authority().is_none_or(named)
}

/// The connections that are open, oldest first.
#[derive(Default)]
struct Open(Vec<(Option<IpAddr>, AbortHandle)>);

impl Open {
    fn insert(&mut self, peer: Option<IpAddr>, connection: AbortHandle) {
        self.0.retain(|(_, connection)| !connection.is_finished());
        if self.0.len() >= MAX_CONNECTIONS {
            let of = |peer| self.0.iter().filter(|(other, _)| *other == peer).count();
            let most = self.0.iter().map(|(peer, _)| of(*peer)).max();
            let oldest = (self.0.iter()).position(|(peer, _)| Some(of(*peer)) == most);
            if let Some(oldest) = oldest {
                self.0.remove(oldest).1.abort();
            }
        }
        self.0.push((peer, connection));
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(answer.body));
    *response.status_mut() = answer.status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(answer.content_type),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(address: SocketAddr, request: &str) -> String {
        ask_for("localhost", address, request).await
    }

    async fn ask_for(host: &str, address: SocketAddr, request: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream
            .write_all(
                format!("{request} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
                    .as_bytes(),
            )
            .await
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn paths_are_served_and_only_by_get() {
        let stop = CancellationToken::new();
        let routes = Routes::default()
            .readiness(|| vec!["certificate".to_owned()])
            .metrics(prometheus::Registry::new());
        let address = serve("127.0.0.1:0".parse().unwrap(), routes, stop.clone())
            .await
            .unwrap();
        assert!(
            ask(address, "GET /healthz/ready")
                .await
                .starts_with("HTTP/1.1 503")
        );
        for always in ["GET /metrics", "GET /healthz/live"] {
            assert!(ask(address, always).await.starts_with("HTTP/1.1 200"));
        }
        assert!(ask(address, "GET /nothing").await.contains("/metrics"));
        assert!(
            ask(address, "POST /metrics")
                .await
                .starts_with("HTTP/1.1 405")
        );
        stop.cancel();
    }

    #[tokio::test]
    async fn who_follows_has_the_address_as_soon_as_it_is_free() {
        let routes = |who: &'static str| {
            Routes::default().get("/who", move || Answer::text(StatusCode::OK, who))
        };
        let (first, second) = (CancellationToken::new(), CancellationToken::new());
        let any = (Ipv4Addr::LOCALHOST, 0).into();
        let address = serve(any, routes("first"), first.clone()).await.unwrap();
        serve_when_free(address, routes("second"), second.clone())
            .await
            .unwrap();
        assert!(ask(address, "GET /who").await.ends_with("first"));
        first.cancel();
        let served = async || match tokio::net::TcpStream::connect(address).await {
            Ok(_) => ask(address, "GET /who").await.ends_with("second"),
            Err(_) => false,
        };
        while !served().await {
            tokio::task::yield_now().await;
        }
        second.cancel();
    }

    #[tokio::test]
    async fn a_unix_socket_is_for_its_owner_and_replaces_one_that_was_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ready.sock");
        let stop = CancellationToken::new();
        for _ in 0..2 {
            let routes = Routes::default().readiness(Vec::new);
            serve_unix(&path, routes, stop.clone()).unwrap();
        }
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        let request = b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        stop.cancel();
    }

    #[tokio::test]
    async fn a_name_that_is_not_ours_is_not_answered_on_loopback() {
        let stop = CancellationToken::new();
        let routes = || Routes::default().get("/status", || Answer::json("{}"));
        let any = |ip: IpAddr| serve((ip, 0).into(), routes(), stop.clone());
        let local = any(Ipv4Addr::LOCALHOST.into()).await.unwrap();
        for (host, status) in [
            ("localhost", 200),
            ("LOCALHOST:15000", 200),
            ("127.0.0.1:15000", 200),
            ("[::1]:15000", 200),
            ("evil.example", 421),
            ("evil.example:15000", 421),
            ("localhost.evil.example", 421),
            ("127.0.0.1.evil.example", 421),
            ("localhost\r\nhost: evil.example", 421),
            ("", 421),
            ("a b", 421),
        ] {
            let answer = ask_for(host, local, "GET /status").await;
            let expected = format!("HTTP/1.1 {status} ");
            assert!(answer.starts_with(&expected), "{host:?}: {answer}");
        }
        let absolute = ask(local, "GET http://evil.example/status").await;
        assert!(absolute.starts_with("HTTP/1.1 421 "), "{absolute}");
        // Metrics and readiness are for others, who come by a name.
        let others = any(Ipv4Addr::UNSPECIFIED.into()).await.unwrap();
        let others = SocketAddr::from((Ipv4Addr::LOCALHOST, others.port()));
        let answer = ask_for("pod.example:15020", others, "GET /status").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        stop.cancel();
    }

    #[tokio::test]
    async fn silent_connections_keep_nobody_out() {
        let stop = CancellationToken::new();
        let routes = Routes::default().readiness(Vec::new);
        let address = serve("127.0.0.1:0".parse().unwrap(), routes, stop.clone())
            .await
            .unwrap();
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }
        let answer = tokio::time::timeout(HEADER_TIMEOUT / 2, ask(address, "GET /healthz/live"));
        assert!(answer.await.unwrap().starts_with("HTTP/1.1 200"));
        stop.cancel();
    }

    #[tokio::test]
    async fn who_has_most_connections_gives_its_oldest() {
        let mut open = Open::default();
        let connection = || tokio::spawn(std::future::pending::<()>()).abort_handle();
        let [greedy, other] = [1, 2].map(|last| IpAddr::from([10, 0, 0, last]));
        open.insert(Some(other), connection());
        for _ in 0..2 * MAX_CONNECTIONS {
            open.insert(Some(greedy), connection());
        }
        assert_eq!(open.0.len(), MAX_CONNECTIONS);
        assert_eq!(open.0[0].0, Some(other));
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_gives_its_place_back() {
        const LARGE: usize = 64 << 20;
        let stop = CancellationToken::new();
        let routes = Routes::default().get("/large", || Answer::json(vec![b'x'; LARGE]));
        let address = serve("127.0.0.1:0".parse().unwrap(), routes, stop.clone())
            .await
            .unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut bytes = vec![0; 1024];
        stream.read_exact(&mut bytes).await.unwrap();
        // Time runs ahead as soon as nothing else is to do.
        tokio::time::pause();
        tokio::time::advance(CONNECTION_TIMEOUT).await;
        let ended = stream.read_to_end(&mut bytes).await;
        assert!(ended.is_err() || bytes.len() < LARGE);
        stop.cancel();
    }
}
