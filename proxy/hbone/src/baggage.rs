// SPDX-License-Identifier: Apache-2.0
use http::HeaderValue;
use podveil_model::Workload;
use std::str::FromStr;
use std::sync::Arc;

const MAX_BYTES: usize = 4096;
const MAX_MEMBERS: usize = 32;
const MAX_VALUE: usize = 253;

/// The kind of object that owns a workload.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum WorkloadType {
    CronJob,
    Deployment,
    Job,
    #[default]
    Pod,
}

impl WorkloadType {
    const ALL: [Self; 4] = [Self::CronJob, Self::Deployment, Self::Job, Self::Pod];

    fn key(self) -> &'static str {
        match self {
            Self::CronJob => "k8s.cronjob.name",
            Self::Deployment => "k8s.deployment.name",
            Self::Job => "k8s.job.name",
            Self::Pod => "k8s.pod.name",
        }
    }
}

/// What a proxy says about the workload it speaks for (W3C Baggage). For telemetry only: it is the peer's word.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Baggage {
    pub cluster: Option<Arc<str>>,
    pub namespace: Option<Arc<str>>,
    pub workload: Option<(WorkloadType, Arc<str>)>,
    pub canonical_name: Option<Arc<str>>,
    pub canonical_revision: Option<Arc<str>>,
    pub region: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
}

/// Why a `baggage` header is ignored as a whole.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum BaggageError {
    #[error("a member is not key=value")]
    BadMember,
    #[error("a value is longer than {MAX_VALUE} bytes or has a byte that no name has")]
    BadValue,
    #[error("longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("more than {MAX_MEMBERS} members")]
    TooManyMembers,
}

impl Baggage {
    /// The header that says so, or `None` if nothing is known. A value that cannot be written is left out: peers do not
    /// unescape.
    pub fn to_header(&self) -> Option<HeaderValue> {
        let workload = self.workload.as_ref();
        let members = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (
                workload.map_or("", |(kind, _)| kind.key()),
                &workload.map(|(_, name)| name.clone()),
            ),
            ("service.name", &self.canonical_name),
            ("service.version", &self.canonical_revision),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        let mut text = String::new();
        for (key, value) in members {
            if let Some(value) = value
                && is_value(value)
                && !value.is_empty()
            {
                let comma = if text.is_empty() { "" } else { "," };
                text.extend([comma, key, "=", value]);
            }
        }
        if text.is_empty() {
            return None;
        }
        HeaderValue::try_from(text).ok()
    }

    fn set(&mut self, key: &str, value: &str) {
        let slot = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.canonical_name,
            "service.version" => &mut self.canonical_revision,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            _ => {
                let kind = WorkloadType::ALL.into_iter().find(|kind| kind.key() == key);
                if let Some(kind) = kind {
                    self.workload = Some((kind, value.into()));
                }
                return;
            }
        };
        *slot = Some(value.into());
    }
}

/// Letters, digits and what names, versions and zones are made of. Neither separators nor anything to escape.
fn is_value(text: &str) -> bool {
    text.len() <= MAX_VALUE
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._/:+~@".contains(&byte))
}

impl From<&Workload> for Baggage {
    fn from(workload: &Workload) -> Self {
        let known = |text: &Arc<str>| Some(text.clone()).filter(|text| !text.is_empty());
        Self {
            cluster: known(&workload.cluster),
            namespace: Some(workload.namespace().as_str().into()),
            workload: known(&workload.workload_name).map(|name| (WorkloadType::Deployment, name)),
            canonical_name: known(&workload.canonical_name),
            canonical_revision: known(&workload.canonical_revision),
            region: None,
            zone: None,
        }
    }
}

impl FromStr for Baggage {
    type Err = BaggageError;

    /// Unknown keys and properties behind `;` are skipped; of a key that comes twice the last one counts.
    fn from_str(text: &str) -> Result<Self, BaggageError> {
        if text.len() > MAX_BYTES {
            return Err(BaggageError::TooLong);
        }
        let mut baggage = Self::default();
        for (index, member) in text.split(',').enumerate() {
            if index >= MAX_MEMBERS {
                return Err(BaggageError::TooManyMembers);
            }
            let member = member.split(';').next().unwrap_or_default().trim();
            if member.is_empty() {
                continue;
            }
            let (key, value) = member.split_once('=').ok_or(BaggageError::BadMember)?;
            let value = value.trim_start();
            if !is_value(value) {
                return Err(BaggageError::BadValue);
            }
            if !value.is_empty() {
                baggage.set(key.trim_end(), value);
            }
        }
        Ok(baggage)
    }
}

/// Any bytes: what is taken is written and parsed again to the same.
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(baggage) = text.parse::<Baggage>() {
        let header = baggage.to_header();
        let text = header.as_ref().and_then(|header| header.to_str().ok());
        assert_eq!(text.unwrap_or_default().parse(), Ok(baggage));
    }
}
