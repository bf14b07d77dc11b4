// SPDX-License-Identifier: Apache-2.0
use crate::consumers::Consumers;
use crate::ledger::{Ledger, Snapshot};
use crate::refusal::Refusal;
use crate::rotation::Presence;
use podveil_ca_client::transport;
use podveil_ca_issuer::Authority;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use std::sync::Arc;
use std::time::SystemTime;

/// Names and meanings of Istio's CA where it has them, so that existing dashboards and alerts work.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    csr: IntCounter,
    success: IntCounter,
    authentication_failure: IntCounter,
    csr_parsing: IntCounter,
    id_extraction: IntCounter,
    csr_sign: IntCounter,
    clamped: IntCounter,
    refusals: IntCounterVec,
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help).expect("a constant, valid name");
            register(&registry, counter.clone());
            counter
        };
        let refusals = IntCounterVec::new(
            Opts::new(
                "podveil_ca_refusals_total",
                "Requests for a certificate that got none, by reason.",
            ),
            &["reason"],
        )
        .expect("a constant, valid name");
        register(&registry, refusals.clone());
        Self {
            csr: counter("citadel_server_csr_count", "Certificate requests received."),
            success: counter(
                "citadel_server_success_cert_issuance_count",
                "Certificates issued.",
            ),
            authentication_failure: counter(
                "citadel_server_authentication_failure_count",
                "Requests whose caller proved no identity.",
            ),
            csr_parsing: counter(
                "citadel_server_csr_parsing_err_count",
                "Certificate requests that were not taken.",
            ),
            id_extraction: counter(
                "citadel_server_id_extraction_err_count",
                "Requests for an identity that does not parse or that the caller may not have.",
            ),
            csr_sign: counter(
                "citadel_server_csr_sign_err_count",
                "Certificates that could not be signed.",
            ),
            clamped: counter(
                "podveil_ca_clamped_certificates_total",
                "Certificates cut short because their issuer ends sooner.",
            ),
            refusals,
            registry,
        }
    }

    /// From now on, what is read at the moment of the scrape too.
    pub fn observe(
        &self,
        ledger: Arc<Ledger>,
        consumers: Arc<Consumers>,
        connections: Arc<transport::Refusals>,
    ) {
        let state = State {
            ledger,
            consumers,
            connections,
        };
        register(&self.registry, state);
    }

    pub fn registry(&self) -> Registry {
        self.registry.clone()
    }

    pub(crate) fn received(&self) {
        self.csr.inc();
    }

    pub(crate) fn issued(&self, clamped: bool) {
        self.success.inc();
        if clamped {
            self.clamped.inc();
        }
    }

    pub(crate) fn refused(&self, refusal: &Refusal) {
        self.refusals.with_label_values(&[refusal.reason()]).inc();
        match refusal {
            Refusal::Token(error) if !error.is_denial() => {}
            Refusal::NoCredential
            | Refusal::NotANode
            | Refusal::NotRenewable
            | Refusal::Token(_) => self.authentication_failure.inc(),
            Refusal::Csr(_) | Refusal::CsrNamesAnother => self.csr_parsing.inc(),
            Refusal::BadIdentity
            | Refusal::NoIdentity
            | Refusal::NotEntitled(_)
            | Refusal::ProgramIdentity => self.id_extraction.inc(),
            Refusal::Issue(_) => self.csr_sign.inc(),
            Refusal::Exhausted(_) | Refusal::NotReady => {}
        }
    }
}

fn register(registry: &Registry, collector: impl Collector + 'static) {
    registry
        .register(Box::new(collector))
        .expect("names are constants and differ");
}

/// What is read at the moment of the scrape, so that no gauge is ever stale.
#[derive(Debug)]
struct State {
    ledger: Arc<Ledger>,
    consumers: Arc<Consumers>,
    connections: Arc<transport::Refusals>,
}

impl Collector for State {
    /// None: the families are made anew at each scrape, and no other collector has these names.
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let snapshot = self.ledger.current();
        let now = SystemTime::now();
        let consumers = self.consumers.list();
        let connected = consumers
            .iter()
            .filter(|(_, _, presence)| *presence == Presence::Connected);
        let behind = connected
            .clone()
            .filter(|(_, in_use, _)| {
                in_use.sequence < snapshot.sequence
                    || in_use.generation < snapshot.certificate_generation
            })
            .count();
        gauges(&snapshot, now)
            .into_iter()
            .chain([
                (
                    "podveil_ca_consumers",
                    "Programs connected for trust bundles.",
                    whole(connected.count() as u64),
                ),
                (
                    "podveil_ca_record_lost",
                    "1 while the record is gone from where it is kept, and this program alone has it.",
                    i64::from(self.ledger.is_lost()),
                ),
                (
                    "podveil_ca_consumers_behind",
                    "Connected programs that have not acknowledged the newest bundle and generation.",
                    whole(behind as u64),
                ),
            ])
            .flat_map(|(name, help, value)| {
                let gauge = IntGauge::new(name, help).expect("a constant, valid name");
                gauge.set(value);
                gauge.collect()
            })
            .chain(refused_connections(&self.connections))
            .collect()
    }
}

fn refused_connections(connections: &transport::Refusals) -> Vec<MetricFamily> {
    let opts = Opts::new(
        "podveil_ca_connections_refused_total",
        "Connections of programs that were closed before their first request, by reason.",
    );
    let counter = IntCounterVec::new(opts, &["reason"]).expect("a constant, valid name");
    for (reason, count) in connections.read() {
        counter.with_label_values(&[reason]).inc_by(count);
    }
    counter.collect()
}

fn gauges(snapshot: &Snapshot, now: SystemTime) -> Vec<(&'static str, &'static str, i64)> {
    // The root that ends first is the one to worry about.
    let root = snapshot
        .roots
        .iter()
        .map(|root| root.not_after())
        .min()
        .unwrap_or(now);
    let issuing = snapshot.issuing.not_after();
    let remaining = |end: SystemTime| whole(end.duration_since(now).unwrap_or_default().as_secs());
    vec![
        (
            "citadel_server_root_cert_expiry_timestamp",
            "Unix time at which the first root ends.",
            unix_seconds(root),
        ),
        (
            "citadel_server_root_cert_expiry_seconds",
            "Seconds until the first root ends.",
            remaining(root),
        ),
        (
            "citadel_server_cert_chain_expiry_timestamp",
            "Unix time at which the issuing authority ends.",
            unix_seconds(issuing),
        ),
        (
            "citadel_server_cert_chain_expiry_seconds",
            "Seconds until the issuing authority ends.",
            remaining(issuing),
        ),
        (
            "podveil_ca_bundle_sequence",
            "Sequence of the trust bundle.",
            whole(snapshot.sequence),
        ),
        (
            "podveil_ca_certificate_generation",
            "Generation of the certificates issued now.",
            whole(snapshot.certificate_generation),
        ),
        (
            "podveil_ca_rotation_active",
            "1 while a rotation is under way.",
            i64::from(snapshot.rotation.is_some()),
        ),
    ]
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(crate) fn unix_seconds(time: SystemTime) -> i64 {
    whole(
        time.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
    )
}

/// For the start-up log.
pub(crate) fn describe(authority: &Authority) -> String {
    format!(
        "{} (serial {}, ends {})",
        authority.subject(),
        authority.serial(),
        unix_seconds(authority.not_after())
    )
}
