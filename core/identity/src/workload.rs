// SPDX-License-Identifier: Apache-2.0
use crate::{IdentityError, SpiffeId, TrustDomain};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A namespace or service account name (RFC 1123 subdomain): always a legal SPIFFE path segment, never `.` or `..`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct KubernetesName(Arc<str>);

impl KubernetesName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Has it clones, which are the same in memory?
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl FromStr for KubernetesName {
    type Err = IdentityError;

    fn from_str(name: &str) -> Result<Self, IdentityError> {
        let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = name.as_bytes();
        let legal = bytes.len() <= 253
            && bytes.first().is_some_and(alphanumeric)
            && bytes.last().is_some_and(alphanumeric)
            && bytes
                .iter()
                .all(|byte| alphanumeric(byte) || *byte == b'-' || *byte == b'.');
        if legal {
            Ok(Self(name.into()))
        } else {
            Err(IdentityError::BadName {
                name: name.to_owned(),
            })
        }
    }
}

impl fmt::Display for KubernetesName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whom a workload's certificate names: all pods of one service account in one namespace.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct WorkloadIdentity {
    pub trust_domain: TrustDomain,
    pub namespace: KubernetesName,
    pub service_account: KubernetesName,
}

impl WorkloadIdentity {
    /// # Errors
    /// [`IdentityError::BadName`] if a part is not a Kubernetes name.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        Ok(Self {
            trust_domain,
            namespace: namespace.parse()?,
            service_account: service_account.parse()?,
        })
    }

    pub fn spiffe_id(&self) -> SpiffeId {
        SpiffeId::from_segments(
            self.trust_domain.clone(),
            &[
                "ns",
                self.namespace.as_str(),
                "sa",
                self.service_account.as_str(),
            ],
        )
        .expect("Kubernetes names are legal path segments and too short to pass the length limit")
    }

    /// The form that policies compare: the ID without `spiffe://`.
    pub fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain.as_str(),
            self.namespace,
            self.service_account
        )
    }
}

impl TryFrom<&SpiffeId> for WorkloadIdentity {
    type Error = IdentityError;

    fn try_from(id: &SpiffeId) -> Result<Self, IdentityError> {
        let not_a_workload = || IdentityError::NotAWorkload { id: id.clone() };
        let mut segments = id.path().split('/');
        let parts: [&str; 5] = std::array::from_fn(|_| segments.next().unwrap_or_default());
        match (parts, segments.next()) {
            (["", "ns", namespace, "sa", service_account], None) => Ok(Self {
                trust_domain: TrustDomain::new(id.trust_domain_name())
                    .map_err(|_| not_a_workload())?,
                namespace: namespace.parse().map_err(|_| not_a_workload())?,
                service_account: service_account.parse().map_err(|_| not_a_workload())?,
            }),
            _ => Err(not_a_workload()),
        }
    }
}

impl FromStr for WorkloadIdentity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let id = SpiffeId::new(text).map_err(|source| IdentityError::NotSpiffe {
            text: text.to_owned(),
            source,
        })?;
        Self::try_from(&id)
    }
}

impl fmt::Display for WorkloadIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}", self.principal())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_id_is_parsed_and_built_again() {
        let identity: WorkloadIdentity = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
        assert_eq!(identity.namespace.as_str(), "shop");
        assert_eq!(
            identity.to_string(),
            "spiffe://cluster.local/ns/shop/sa/web"
        );
        assert_eq!(identity.spiffe_id().to_string(), identity.to_string());
    }

    #[test]
    fn another_shape_is_refused() {
        for text in [
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/shop",
            "spiffe://cluster.local/ns/shop/sa/web/x",
            "spiffe://cluster.local/sa/web/ns/shop",
            "spiffe://cluster.local/ns/Shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/..",
            "spiffe://cluster.local/ns/sh,op/sa/web",
            "spiffe://cluster.local/podveil/node/n1",
            "https://cluster.local/ns/shop/sa/web",
        ] {
            assert!(
                text.parse::<WorkloadIdentity>().is_err(),
                "{text} was taken"
            );
        }
    }
}
