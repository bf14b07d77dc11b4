// SPDX-License-Identifier: Apache-2.0
use podveil_flow::{ConnectionRecord, Direction, End, Protection, Verdict};
use podveil_identity::WorkloadIdentity;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};

/// Istio's traffic labels, in the order of [`TrafficLabels::values`].
pub const NAMES: [&str; 23] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
];

const UNKNOWN: &str = "unknown";

/// A workload as metrics see it: namespace and owner's name.
pub type WorkloadKey = (String, String);

/// The label values of one connection.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TrafficLabels {
    values: [String; NAMES.len()],
    /// The workloads that the values name; the series go when one of these is gone.
    pub(super) ends: [Option<WorkloadKey>; 2],
}

impl TrafficLabels {
    pub fn of(record: &ConnectionRecord) -> Self {
        let source = EndLabels::of(&record.source);
        let destination = EndLabels::of(&record.destination);
        let principals = [&source, &destination].map(|end| {
            end.principal
                .map_or_else(|| UNKNOWN.to_owned(), ToString::to_string)
        });
        let service = record.service.as_ref();
        let hostname = service.map(|key| &*key.hostname);
        let name = hostname.and_then(|hostname| hostname.split('.').next());
        let values = [
            reporter(record.direction),
            source.workload,
            source.canonical,
            source.revision,
            source.namespace,
            &principals[0],
            source.canonical,
            source.revision,
            source.cluster,
            or_unknown(hostname),
            or_unknown(service.map(|key| key.namespace.as_str())),
            or_unknown(name),
            destination.workload,
            destination.canonical,
            destination.revision,
            destination.namespace,
            &principals[1],
            destination.canonical,
            destination.revision,
            destination.cluster,
            "tcp",
            response_flags(record),
            security_policy(record),
        ];
        Self {
            values: values.map(str::to_owned),
            ends: [&record.source, &record.destination].map(workload_key),
        }
    }

    pub fn values(&self) -> [&str; NAMES.len()] {
        self.values.each_ref().map(String::as_str)
    }
}

/// As such connections are counted that find no room for labels of their own.
pub(super) fn without_ends(record: &ConnectionRecord) -> ConnectionRecord {
    ConnectionRecord {
        source: End::default(),
        destination: End::default(),
        service: None,
        ..record.clone()
    }
}

/// The same for two records with the same labels. It is found at each connection, so no text is made for it.
pub(super) fn key(record: &ConnectionRecord, hasher: &RandomState) -> u64 {
    let mut state = hasher.build_hasher();
    reporter(record.direction).hash(&mut state);
    for end in [&record.source, &record.destination] {
        let labels = EndLabels::of(end);
        labels.hash(&mut state);
    }
    record.service.hash(&mut state);
    response_flags(record).hash(&mut state);
    security_policy(record).hash(&mut state);
    state.finish()
}

#[derive(Hash)]
struct EndLabels<'a> {
    workload: &'a str,
    canonical: &'a str,
    revision: &'a str,
    namespace: &'a str,
    cluster: &'a str,
    principal: Option<&'a WorkloadIdentity>,
}

impl<'a> EndLabels<'a> {
    fn of(end: &'a End) -> Self {
        let workload = end.workload.as_deref();
        Self {
            workload: or_unknown(workload.map(|workload| &*workload.workload_name)),
            canonical: or_unknown(workload.map(|workload| &*workload.canonical_name)),
            revision: or_unknown(workload.map(|workload| &*workload.canonical_revision)),
            namespace: or_unknown(workload.map(|workload| workload.namespace().as_str())),
            cluster: or_unknown(workload.map(|workload| &*workload.cluster)),
            principal: end.identity.as_ref(),
        }
    }
}

pub(super) fn reporter(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "destination",
        Direction::Outbound => "source",
    }
}

fn response_flags(record: &ConnectionRecord) -> &'static str {
    match record.verdict {
        Verdict::Allowed { .. } => "-",
        Verdict::Dropped { reason, .. } => reason.response_flags(),
    }
}

fn security_policy(record: &ConnectionRecord) -> &'static str {
    match record.protection {
        Protection::MutualTls { .. } => "mutual_tls",
        Protection::Plain => UNKNOWN,
    }
}

fn or_unknown(value: Option<&str>) -> &str {
    value.filter(|text| !text.is_empty()).unwrap_or(UNKNOWN)
}

fn workload_key(end: &End) -> Option<WorkloadKey> {
    let workload = end.workload.as_deref()?;
    Some((
        workload.namespace().to_string(),
        workload.workload_name.to_string(),
    ))
}
