// SPDX-License-Identifier: Apache-2.0
//! Who may have which identity: the CA's own narrow reading of the cluster, never the controller's.

use podveil_identity::{KubernetesName, TrustDomain, WorkloadIdentity};
use podveil_model::Uid;
use podveil_source::Cluster;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A pod whose label was just taken off drains with the certificate it has; its renewal may fall into that time.
pub const LEAVING_GRACE: Duration = Duration::from_secs(10 * 60);

/// Identities by node, as one reading of the cluster gives them.
#[derive(Clone, Debug)]
pub struct Entitlements {
    trust_domain: TrustDomain,
    by_node: HashMap<KubernetesName, HashMap<WorkloadIdentity, Standing>>,
    /// What each pod by itself has; the grace is its own, not that of others with its identity.
    pods: HashMap<Uid, (KubernetesName, WorkloadIdentity, Standing)>,
}

/// From the least to the best; an identity on a node has the best of its pods there.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Standing {
    NotEnrolled,
    Left { at: Instant },
    Enrolled,
}

/// Why a node gets no certificate for an identity.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NotEntitled {
    #[error("no running pod of this identity on the node is enrolled")]
    NotEnrolled,
    #[error("no running pod on the node has this identity")]
    NoSuchWorkload,
    #[error("the identity is of another trust domain")]
    WrongTrustDomain,
}

impl Entitlements {
    /// `before` is the reading that this one replaces: it knows who has been enrolled until now.
    pub fn read(cluster: &Cluster, before: Option<&Self>, now: Instant) -> Self {
        let mut by_node: HashMap<_, HashMap<_, _>> = HashMap::new();
        let mut pods = HashMap::new();
        for pod in &cluster.pods {
            // A finished pod has no use for a certificate, a pod in the host's network has no identity of its own.
            if pod.phase.is_finished() || pod.host_network {
                continue;
            }
            let identity = pod.identity(&cluster.trust_domain);
            let last = before
                .and_then(|before| before.pods.get(&pod.uid))
                .filter(|(node, last, _)| *node == pod.node && *last == identity)
                .map(|(_, _, standing)| *standing);
            let standing = match last {
                _ if cluster.wants_enrolment(pod) => Standing::Enrolled,
                Some(Standing::Enrolled) => Standing::Left { at: now },
                Some(left @ Standing::Left { .. }) => left,
                Some(Standing::NotEnrolled) | None => Standing::NotEnrolled,
            };
            let best = by_node
                .entry(pod.node.clone())
                .or_default()
                .entry(identity.clone())
                .or_insert(standing);
            *best = standing.max(*best);
            pods.insert(pod.uid.clone(), (pod.node.clone(), identity, standing));
        }
        Self {
            trust_domain: cluster.trust_domain.clone(),
            by_node,
            pods,
        }
    }

    /// # Errors
    /// [`NotEntitled`], the reason in words that name nothing the caller did not say.
    pub fn check(
        &self,
        node: &KubernetesName,
        identity: &WorkloadIdentity,
        now: Instant,
    ) -> Result<(), NotEntitled> {
        if identity.trust_domain != self.trust_domain {
            return Err(NotEntitled::WrongTrustDomain);
        }
        match self.standing(node, identity) {
            Some(Standing::Enrolled) => Ok(()),
            Some(Standing::Left { at }) if now < at + LEAVING_GRACE => Ok(()),
            Some(_) => Err(NotEntitled::NotEnrolled),
            None => Err(NotEntitled::NoSuchWorkload),
        }
    }

    fn standing(&self, node: &KubernetesName, identity: &WorkloadIdentity) -> Option<Standing> {
        self.by_node.get(node)?.get(identity).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn cluster(namespace_labels: &str, pod: &str) -> Cluster {
        let text = format!(
            "trustDomain: cluster.local\n\
             nodes: [{{name: n1}}, {{name: n2}}]\n\
             namespaces: [{{name: shop, labels: {{{namespace_labels}}}}}]\n\
             workloads:\n  - {{name: web-1, namespace: shop, uid: u1, node: n1, serviceAccount: web, \
             addresses: [10.244.1.10]{pod}}}\n"
        );
        podveil_source::parse(1, [(Path::new("cluster.yaml"), text.as_str())]).unwrap()
    }

    fn check(
        entitlements: &Entitlements,
        node: &str,
        id: &str,
        now: Instant,
    ) -> Result<(), NotEntitled> {
        entitlements.check(&node.parse().unwrap(), &id.parse().unwrap(), now)
    }

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
    const ENROLLED: &str = r#"io.cilium/mtls-enabled: "true""#;
    const STRICT: &str = r#"io.cilium/mtls-enabled: "true", podveil.io/mode: strict"#;
    const OPT_OUT: &str = r#", labels: {io.cilium/mtls-enabled: "false"}"#;

    #[test]
    fn an_enrolled_pod_of_the_node_entitles_it() {
        let now = Instant::now();
        let read = Entitlements::read(&cluster(ENROLLED, ""), None, now);
        assert_eq!(check(&read, "n1", WEB, now), Ok(()));
    }

    #[test]
    fn another_node_identity_or_trust_domain_is_refused() {
        let now = Instant::now();
        let read = Entitlements::read(&cluster(ENROLLED, ""), None, now);
        for (node, id, reason) in [
            ("n2", WEB, NotEntitled::NoSuchWorkload),
            (
                "n1",
                "spiffe://cluster.local/ns/shop/sa/db",
                NotEntitled::NoSuchWorkload,
            ),
            (
                "n1",
                "spiffe://cluster.local/ns/other/sa/web",
                NotEntitled::NoSuchWorkload,
            ),
            (
                "n1",
                "spiffe://other.domain/ns/shop/sa/web",
                NotEntitled::WrongTrustDomain,
            ),
        ] {
            assert_eq!(check(&read, node, id, now), Err(reason), "{node} {id}");
        }
    }

    #[test]
    fn who_is_not_enrolled_is_refused() {
        let now = Instant::now();
        for (labels, pod, expected) in [
            ("", "", Err(NotEntitled::NotEnrolled)),
            (
                r#"io.cilium/mtls-enabled: "yes""#,
                "",
                Err(NotEntitled::NotEnrolled),
            ),
            (ENROLLED, OPT_OUT, Err(NotEntitled::NotEnrolled)),
            (STRICT, OPT_OUT, Ok(())),
            (
                ENROLLED,
                ", hostNetwork: true",
                Err(NotEntitled::NoSuchWorkload),
            ),
            (
                ENROLLED,
                ", phase: Succeeded",
                Err(NotEntitled::NoSuchWorkload),
            ),
            (
                ENROLLED,
                ", phase: Failed",
                Err(NotEntitled::NoSuchWorkload),
            ),
            (ENROLLED, ", phase: Terminating", Ok(())),
        ] {
            let read = Entitlements::read(&cluster(labels, pod), None, now);
            assert_eq!(check(&read, "n1", WEB, now), expected, "{labels} {pod}");
        }
    }

    #[test]
    fn a_pod_that_leaves_may_renew_for_a_while() {
        let now = Instant::now();
        let enrolled = Entitlements::read(&cluster(ENROLLED, ""), None, now);
        let left = Entitlements::read(&cluster("", ""), Some(&enrolled), now);
        // A later reading does not begin the time anew.
        let later = Entitlements::read(
            &cluster("", ""),
            Some(&left),
            now + Duration::from_secs(300),
        );
        for read in [&left, &later] {
            let end = now + LEAVING_GRACE;
            assert_eq!(check(read, "n1", WEB, end - Duration::from_secs(1)), Ok(()));
            assert_eq!(check(read, "n1", WEB, end), Err(NotEntitled::NotEnrolled));
        }
    }

    #[test]
    fn a_pod_that_is_gone_has_no_grace() {
        let now = Instant::now();
        let enrolled = Entitlements::read(&cluster(ENROLLED, ""), None, now);
        let gone = Entitlements::read(
            &cluster(ENROLLED, ", phase: Succeeded"),
            Some(&enrolled),
            now,
        );
        assert_eq!(
            check(&gone, "n1", WEB, now),
            Err(NotEntitled::NoSuchWorkload)
        );
    }

    #[test]
    fn a_pod_that_was_never_enrolled_inherits_no_grace() {
        let now = Instant::now();
        let two = |phase: &str| {
            let text = format!(
                "trustDomain: cluster.local\n\
                 namespaces: [{{name: shop, labels: {{{ENROLLED}}}}}]\n\
                 workloads:\n\
                 - {{name: a, namespace: shop, uid: a, node: n1, serviceAccount: web{phase}}}\n\
                 - {{name: b, namespace: shop, uid: b, node: n1, serviceAccount: web{OPT_OUT}}}\n"
            );
            podveil_source::parse(1, [(Path::new("cluster.yaml"), text.as_str())]).unwrap()
        };
        let both = Entitlements::read(&two(""), None, now);
        assert_eq!(check(&both, "n1", WEB, now), Ok(()));
        let one = Entitlements::read(&two(", phase: Succeeded"), Some(&both), now);
        assert_eq!(check(&one, "n1", WEB, now), Err(NotEntitled::NotEnrolled));
    }
}
