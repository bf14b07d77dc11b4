// SPDX-License-Identifier: Apache-2.0
use crate::joined::{About, Connected, Permitted, wait_for};
use crate::registry::Registry;
use crate::rules::{self, Facts, Refused, Source};
use crate::shares::{Share, Shares};
use crate::target::{self, NotOurs};
use h2::Reason;
use http::{Method, StatusCode};
use podveil_flow::{DropReason, Protection};
use podveil_hbone::{Authority, AuthorityError, Baggage, Incoming, Server, Settings, TunnelEnd};
use podveil_model::{LocalAddr, PeerAddr, Workload};
use podveil_net::{ConnectError, prepare_tunnel};
use podveil_state::{Pin, PodContext, serve};
use podveil_tls::{ConfigCache, Configs, HandshakeError, TlsStream, VerifiedPeer};
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::debug;

/// The path of tunnels to one pod, accepted on 15008.
#[derive(Debug)]
pub struct Inbound {
    pod: Arc<PodContext>,
    registry: Arc<Registry>,
    tls: ConfigCache,
    /// Tunnels in their handshakes.
    held: Arc<Semaphore>,
    /// What each address may have of them.
    shares: Arc<Shares>,
    /// What each address has of all tunnels: a client that answers pings and asks for nothing keeps its places for ever.
    tunnels: Arc<Shares>,
    /// Streams of all tunnels.
    living: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// A place among the tunnels in their handshakes.
#[derive(Debug)]
pub(crate) struct Handshaking {
    _held: OwnedSemaphorePermit,
    _share: Share,
}

/// A connection to 15008. Nothing is proved yet.
#[derive(Debug)]
pub(crate) struct Accepted {
    stream: TcpStream,
    peer: PeerAddr,
    local: LocalAddr,
}

/// A connection whose peer has proved an identity that belongs to its address.
#[derive(Debug)]
struct Identified {
    stream: TlsStream<TcpStream>,
    /// With which of our certificates, and whom we trusted.
    configs: Arc<Configs>,
    from: Arc<From>,
}

/// Who is at the other end of a tunnel.
#[derive(Debug)]
struct From {
    peer: PeerAddr,
    local: LocalAddr,
    proved: VerifiedPeer,
    workload: Arc<Workload>,
    /// Held for as long as the tunnel lives.
    _pin: Option<Pin>,
}

/// Why a connection to 15008 does not become a tunnel. It is reset: a client that is told nothing tries again.
#[derive(Debug, thiserror::Error)]
enum NoTunnel {
    #[error("the accepted socket failed")]
    Socket(#[source] io::Error),
    #[error("this pod is at its bound of connections")]
    Limit,
    #[error("{peer} has its share of this pod's tunnels {what}")]
    Share { peer: PeerAddr, what: &'static str },
    #[error("there is no certificate for this pod")]
    NoCertificate,
    #[error("no TLS handshake within {after:?}")]
    TlsTimeout { after: Duration },
    #[error("TLS failed")]
    Tls(#[source] HandshakeError),
    #[error(transparent)]
    Rules(Refused),
}

impl NoTunnel {
    fn reason(&self) -> DropReason {
        match self {
            Self::Socket(_) => DropReason::TunnelFailed,
            Self::Limit | Self::Share { .. } => DropReason::LimitReached,
            Self::NoCertificate => DropReason::CertificateMissing,
            Self::Tls(
                HandshakeError::PeerRefused(_)
                | HandshakeError::PeerUnreadable(_)
                | HandshakeError::NotAWorkload(_),
            ) => DropReason::PeerIdentity,
            Self::TlsTimeout { .. } | Self::Tls(_) => DropReason::TunnelFailed,
            Self::Rules(refused) => refused.reason(),
        }
    }
}

/// Why a CONNECT is refused.
#[derive(Debug, thiserror::Error)]
enum NoStream {
    #[error("not a CONNECT but {method}")]
    NotConnect { method: Method },
    #[error("not for this pod")]
    NotOurs(#[source] NotOurs),
    #[error(transparent)]
    Rules(Refused),
    #[error("the application did not take the connection")]
    Connect(#[source] ConnectError),
}

impl NoStream {
    fn reason(&self) -> DropReason {
        match self {
            Self::NotConnect { .. } | Self::NotOurs(_) => DropReason::BadTarget,
            Self::Rules(refused) => refused.reason(),
            Self::Connect(_) => DropReason::ConnectFailed,
        }
    }

    /// What the peer is told.
    fn status(&self) -> StatusCode {
        match self {
            Self::NotConnect { .. } | Self::NotOurs(_) => StatusCode::BAD_REQUEST,
            Self::Rules(Refused::WorkloadNotKnown { .. }) | Self::Connect(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Rules(_) => StatusCode::UNAUTHORIZED,
        }
    }
}

impl Accepted {
    /// The local address is the pod's own on which the client reached us; it is the only one ever dialled.
    fn from_listener(stream: TcpStream, peer: SocketAddr) -> Result<Self, NoTunnel> {
        prepare_tunnel(&stream).map_err(NoTunnel::Socket)?;
        // Until the peer has proved who it is, every end is a reset.
        stream.set_zero_linger().map_err(NoTunnel::Socket)?;
        let local = LocalAddr(stream.local_addr().map_err(NoTunnel::Socket)?);
        Ok(Self::new(stream, PeerAddr(peer), local))
    }

    /// `stream` is prepared.
    pub fn new(stream: TcpStream, peer: PeerAddr, local: LocalAddr) -> Self {
        Self {
            stream,
            peer,
            local,
        }
    }
}

impl Inbound {
    /// Serves tunnels until `drain` or `stop`; returns when the last connection is over.
    pub async fn run(pod: Arc<PodContext>, listeners: Vec<TcpListener>) {
        let inbound = Arc::new(Self::new(pod.clone()));
        let taking = inbound.clone();
        let accepting = serve(&pod, listeners, &inbound.tasks, move |stream, peer| {
            taking.take(stream, peer);
        });
        inbound.registry.watch_while(&pod.state, accepting).await;
    }

    pub(crate) fn new(pod: Arc<PodContext>) -> Self {
        let limits = &pod.limits;
        Self {
            registry: Arc::default(),
            tls: ConfigCache::default(),
            held: Arc::new(Semaphore::new(limits.max_held)),
            shares: Shares::of(limits.max_held),
            tunnels: Shares::of(limits.max_tunnels),
            living: Arc::new(Semaphore::new(limits.max_connections)),
            tasks: TaskTracker::new(),
            pod,
        }
    }

    fn take(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let accepted = match self.places(PeerAddr(peer)) {
            Ok((tunnel, held)) => {
                Accepted::from_listener(stream, peer).map(|accepted| (accepted, tunnel, held))
            }
            Err(refused) => {
                let _dropped_anyway = stream.set_zero_linger();
                Err(refused)
            }
        };
        match accepted {
            Ok((accepted, tunnel, held)) => {
                let inbound = self.clone();
                self.tasks.spawn(async move {
                    let _tunnel = tunnel;
                    inbound.serve(accepted, held).await;
                });
            }
            Err(refused) => {
                let about = About::new(&self.pod, PeerAddr(peer));
                about.refused(&self.pod, refused.reason(), &refused);
            }
        }
    }

    /// A place among the tunnels, and one among those in their handshakes.
    fn places(&self, peer: PeerAddr) -> Result<(Share, Handshaking), NoTunnel> {
        let known = self.pod.state.view().by_address(peer.ip()).is_some();
        let share = |what, shares: &Arc<Shares>, known| {
            let share = shares.take(peer.ip(), known);
            share.ok_or(NoTunnel::Share { peer, what })
        };
        let handshaking = Handshaking {
            _share: share("in their handshakes", &self.shares, known)?,
            _held: (self.held.clone().try_acquire_owned()).map_err(|_| NoTunnel::Limit)?,
        };
        // Strangers are few among the handshakes, and no others come this far.
        let tunnel = share("at once", &self.tunnels, true)?;
        Ok((tunnel, handshaking))
    }

    /// One connection, from its handshake to the end of its tunnel.
    pub(crate) async fn serve(self: &Arc<Self>, accepted: Accepted, held: Handshaking) {
        let pod = &*self.pod;
        let (peer, local) = (accepted.peer, accepted.local);
        let mut about = About::new(pod, peer);
        about.hbone = Some(local.0);
        let identified = tokio::select! {
            biased;
            () = pod.stop.cancelled() => return,
            identified = self.identify(accepted) => identified,
        };
        let identified = match identified {
            Ok(identified) => identified,
            Err(refused) => return about.refused(pod, refused.reason(), &refused),
        };
        let settings = Settings {
            max_streams: u32::try_from(pod.limits.max_streams_per_tunnel).unwrap_or(u32::MAX),
            ..Settings::default()
        };
        let Identified {
            stream,
            configs,
            from,
        } = identified;
        let handshake = timeout(pod.limits.h2_timeout, Server::handshake(stream, &settings));
        let Some(begun) = pod.stop.run_until_cancelled(handshake).await else {
            return;
        };
        drop(held);
        let ended = match begun {
            Ok(Ok(server)) => self.tunnel(server, &configs, &from).await,
            Ok(Err(error)) => error,
            Err(_) => {
                debug!(%peer, "no HTTP/2 preface in time");
                return;
            }
        };
        debug!(%peer, identity = %from.proved.identity, %ended, "tunnel ended");
    }

    /// Makes the peer prove who it is, and holds that against the address it comes from.
    async fn identify(&self, accepted: Accepted) -> Result<Identified, NoTunnel> {
        let pod = &*self.pod;
        let deadline = pod.hold_deadline();
        let Accepted {
            stream,
            peer,
            local,
        } = accepted;
        wait_for(pod, deadline, |view| {
            rules::local(view, &pod.uid, local.ip()).cloned()
        })
        .await
        .map_err(NoTunnel::Rules)?;
        let svid = pod.svid(deadline).await.ok_or(NoTunnel::NoCertificate)?;
        let bundle = pod.bundle.borrow().clone();
        let configs = self.tls.configs(&svid, &bundle);
        let after = pod.limits.tls_timeout;
        let handshake = timeout(after, podveil_tls::accept(stream, configs.server())).await;
        let (stream, proved) = handshake
            .map_err(|_| NoTunnel::TlsTimeout { after })?
            .map_err(NoTunnel::Tls)?;
        pod.state
            .use_all(pod.state.view().lookup_of_peer(peer.ip()));
        let workload = wait_for(pod, pod.hold_deadline(), |view| {
            rules::check_peer(view, peer.ip(), &proved.identity).cloned()
        })
        .await
        .map_err(NoTunnel::Rules)?;
        // From here on what was written is delivered, also when the tunnel ends.
        let socket = stream.get_ref().0.get_ref();
        SockRef::from(socket)
            .set_linger(None)
            .map_err(NoTunnel::Socket)?;
        Ok(Identified {
            stream,
            configs,
            from: Arc::new(From {
                peer,
                local,
                proved,
                _pin: pod.state.pin(&workload.uid),
                workload,
            }),
        })
    }

    /// Takes streams until the tunnel ends. It says GOAWAY once either certificate or the trust bundle is no longer what
    /// it was made with, and ends at once when either workload is gone.
    async fn tunnel(
        self: &Arc<Self>,
        mut server: Server<TlsStream<TcpStream>>,
        configs: &Configs,
        from: &Arc<From>,
    ) -> TunnelEnd {
        let pod = &*self.pod;
        let (mut svid, mut bundle) = (pod.svid.clone(), pod.bundle.clone());
        let mut changed = pod.state.changed();
        let peer_expires = tokio::time::sleep(
            from.proved
                .not_after
                .duration_since(SystemTime::now())
                .unwrap_or_default(),
        );
        tokio::pin!(peer_expires);
        let mut draining = false;
        loop {
            let drain = tokio::select! {
                biased;
                () = pod.stop.cancelled() => return TunnelEnd::Terminated,
                Ok(()) = changed.changed() => {
                    if self.is_gone(from) {
                        return TunnelEnd::Terminated;
                    }
                    false
                }
                incoming = server.accept() => match incoming {
                    Ok(incoming) => {
                        self.stream(incoming, from);
                        false
                    }
                    Err(ended) => return ended,
                },
                () = pod.drain.cancelled(), if !draining => true,
                () = &mut peer_expires, if !draining => true,
                Ok(()) = svid.changed(), if !draining => !is_current(pod, configs),
                Ok(()) = bundle.changed(), if !draining => !is_current(pod, configs),
            };
            if drain {
                draining = true;
                server.drain();
            }
        }
    }

    fn is_gone(&self, from: &From) -> bool {
        let view = self.pod.state.view();
        rules::local(&view, &self.pod.uid, from.local.ip()).is_err()
            || !rules::check_peer(&view, from.peer.ip(), &from.proved.identity)
                .is_ok_and(|peer| peer.uid == from.workload.uid)
    }

    /// Begins a task for one CONNECT.
    fn stream(self: &Arc<Self>, incoming: Incoming, from: &Arc<From>) {
        let Ok(living) = self.living.clone().try_acquire_owned() else {
            // Nothing was looked at: another of the client's endpoints may take it.
            incoming.reset(Reason::REFUSED_STREAM);
            let about = self.about(from);
            return about.refused(&self.pod, DropReason::LimitReached, &NoTunnel::Limit);
        };
        let (inbound, from) = (self.clone(), from.clone());
        self.tasks.spawn(async move {
            let _living = living;
            inbound.connect(incoming, &from).await;
        });
    }

    async fn connect(&self, mut incoming: Incoming, from: &From) {
        let pod = &*self.pod;
        let mut about = self.about(from);
        let request = Request::of(&incoming);
        let opened = tokio::select! {
            biased;
            () = pod.stop.cancelled() => return,
            // The client gave up while it was held.
            () = incoming.abandoned() => None,
            opened = self.open(request, from, &mut about) => Some(opened),
        };
        match opened {
            Some(Ok(connected)) => {
                let baggage = Baggage::from(&**connected.workload()).to_header();
                if let Some(stream) = incoming.accept(baggage) {
                    connected.carry(pod, about, stream).await;
                }
            }
            Some(Err(refused)) => {
                incoming.refuse(refused.status());
                about.refused(pod, refused.reason(), &refused);
            }
            None => about.abandoned(pod),
        }
    }

    /// Finds what the CONNECT is for, asks who may, and dials it.
    async fn open(
        &self,
        request: Request,
        from: &From,
        about: &mut About,
    ) -> Result<Connected, NoStream> {
        let pod = &*self.pod;
        if request.method != Method::CONNECT {
            return Err(NoStream::NotConnect {
                method: request.method,
            });
        }
        let authority = request
            .authority
            .map_err(|error| NoStream::NotOurs(NotOurs::Authority(error)))?;
        let deadline = pod.hold_deadline();
        let workload = pod.workload(deadline).await;
        let workload = workload.ok_or_else(|| {
            NoStream::Rules(Refused::WorkloadNotKnown {
                uid: pod.uid.clone(),
            })
        })?;
        let destination = target::of_connect(&authority, from.local, &workload, &pod.state.view())
            .map_err(NoStream::NotOurs)?;
        about.destination = Some(destination);
        about.service = workload
            .services
            .keys()
            .find(|key| request.service.as_deref() == Some(&*key.hostname))
            .cloned();
        let facts = Facts {
            uid: pod.uid.clone(),
            source_ip: from.peer.ip(),
            source: Source::Proved {
                identity: from.proved.identity.clone(),
                uid: from.workload.uid.clone(),
            },
            destination,
        };
        let permitted = Permitted::wait(pod, &self.registry, facts, deadline)
            .await
            .map_err(NoStream::Rules)?;
        permitted.connect(pod).await.map_err(NoStream::Connect)
    }

    fn about(&self, from: &From) -> About {
        let mut about = About::new(&self.pod, from.peer);
        about.source.workload = Some(from.workload.clone());
        about.source.identity = Some(from.proved.identity.clone());
        about.hbone = Some(from.local.0);
        about.protection = Protection::MutualTls {
            cipher: from.proved.cipher,
            key_exchange: from.proved.key_exchange,
        };
        about
    }
}

/// What a CONNECT says. Only the method and the authority decide anything.
#[derive(Debug)]
struct Request {
    method: Method,
    authority: Result<Authority, AuthorityError>,
    /// The service that the client says was dialled: for the record.
    service: Option<String>,
}

impl Request {
    fn of(incoming: &Incoming) -> Self {
        Self {
            method: incoming.method().clone(),
            authority: incoming.authority(),
            service: incoming.forwarded().and_then(|forwarded| forwarded.host),
        }
    }
}

/// Are these still our certificate and whom we trust?
fn is_current(pod: &PodContext, configs: &Configs) -> bool {
    let svid = pod.svid.borrow().clone();
    let bundle = pod.bundle.borrow().clone();
    svid.is_some_and(|svid| Arc::ptr_eq(&svid, configs.svid()))
        && Arc::ptr_eq(&bundle, configs.bundle())
}

#[cfg(test)]
#[path = "hbone_tests.rs"]
mod tests;
