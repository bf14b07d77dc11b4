// SPDX-License-Identifier: Apache-2.0
//! Who may have which identity: the CA's own narrow reading of the cluster, never the controller's.

use podveil_identity::{KubernetesName, ProgramIdentity, TrustDomain, WorkloadIdentity};
use podveil_model::Uid;
use podveil_source::{Cluster, Pod, Rules};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A pod whose label was just taken off drains with the certificate it has; its renewal may fall into that time.
pub const LEAVING_GRACE: Duration = Duration::from_secs(10 * 60);

/// ServiceAccounts of Podveil's own programs, in Podveil's own namespace.
pub const NODE_ACCOUNT: &str = "podveil-node";
pub const CONTROLLER_ACCOUNT: &str = "podveil-controller";
const CA_ACCOUNT: &str = "podveil-ca";

/// Which of Podveil's own programs there are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Programs {
    /// A controller, and one on each node that the cluster lists.
    Listed,
    /// Those that run in a pod of their own ServiceAccount in this namespace.
    Pods { namespace: KubernetesName },
}

/// Identities by node, as one reading of the cluster gives them.
#[derive(Clone, Debug)]
pub struct Entitlements {
    trust_domain: TrustDomain,
    by_node: HashMap<KubernetesName, HashMap<WorkloadIdentity, Standing>>,
    /// What each pod by itself has; the grace is its own, not that of others with its identity.
    pods: HashMap<Uid, (KubernetesName, WorkloadIdentity, Standing)>,
    /// Of labelled namespaces. A value that cannot be read keeps the last good one, as with the controller.
    rules: HashMap<KubernetesName, Rules>,
    programs: HashSet<ProgramIdentity>,
    /// Pods of [`Programs::Pods`] that are not finished.
    program_pods: HashMap<Uid, ProgramIdentity>,
    /// Names of the CA's own pods.
    replicas: BTreeSet<Arc<str>>,
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
    #[error("the cluster has no such program")]
    NoSuchProgram,
    #[error("no running pod on the node has this identity")]
    NoSuchWorkload,
    #[error("the identity is of another trust domain")]
    WrongTrustDomain,
}

/// The pod that a token is bound to does not run, or not as this program.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("no running pod of this program on its node has the UID that the token is bound to")]
pub struct NoSuchPod;

impl Entitlements {
    /// `before` is the reading that this one replaces: it knows who has been enrolled until now.
    pub fn read(
        cluster: &Cluster,
        programs: &Programs,
        before: Option<&Self>,
        now: Instant,
    ) -> Self {
        let mut read = Self {
            trust_domain: cluster.trust_domain.clone(),
            by_node: HashMap::new(),
            pods: HashMap::new(),
            rules: rules(cluster, before),
            programs: HashSet::new(),
            program_pods: HashMap::new(),
            replicas: BTreeSet::new(),
        };
        if *programs == Programs::Listed {
            read.programs.insert(ProgramIdentity::Controller);
            let nodes = cluster.nodes.keys().cloned().map(ProgramIdentity::Node);
            read.programs.extend(nodes);
        }
        for pod in cluster.pods.iter().filter(|pod| !pod.phase.is_finished()) {
            if let Programs::Pods { namespace } = programs
                && pod.namespace == *namespace
            {
                read.take_program(pod);
            }
            // A pod in the host's network has no identity of its own.
            if !pod.host_network {
                read.take_workload(cluster, pod, before, now);
            }
        }
        read
    }

    fn take_program(&mut self, pod: &Pod) {
        let program = match pod.service_account.as_str() {
            NODE_ACCOUNT => ProgramIdentity::Node(pod.node.clone()),
            CONTROLLER_ACCOUNT => ProgramIdentity::Controller,
            CA_ACCOUNT => {
                self.replicas.insert(pod.name.clone());
                return;
            }
            _ => return,
        };
        self.programs.insert(program.clone());
        self.program_pods.insert(pod.uid.clone(), program);
    }

    fn take_workload(&mut self, cluster: &Cluster, pod: &Pod, before: Option<&Self>, now: Instant) {
        let identity = pod.identity(&cluster.trust_domain);
        let last = before
            .and_then(|before| before.pods.get(&pod.uid))
            .filter(|(node, last, _)| *node == pod.node && *last == identity)
            .map(|(_, _, standing)| *standing);
        let rules = self.rules.get(&pod.namespace).copied().unwrap_or_default();
        let wanted = cluster
            .namespace(&pod.namespace)
            .is_some_and(|namespace| cluster.enrolment(pod, namespace, rules).is_ok());
        let standing = match last {
            _ if wanted => Standing::Enrolled,
            Some(Standing::Enrolled) => Standing::Left { at: now },
            Some(left @ Standing::Left { .. }) => left,
            Some(Standing::NotEnrolled) | None => Standing::NotEnrolled,
        };
        let best = self
            .by_node
            .entry(pod.node.clone())
            .or_default()
            .entry(identity.clone())
            .or_insert(standing);
        *best = standing.max(*best);
        let held = (pod.node.clone(), identity, standing);
        self.pods.insert(pod.uid.clone(), held);
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

    /// May this program have its own SVID? A node that left the cluster may not.
    ///
    /// # Errors
    /// [`NotEntitled::NoSuchProgram`]
    pub fn check_program(&self, program: &ProgramIdentity) -> Result<(), NotEntitled> {
        if self.programs.contains(program) {
            Ok(())
        } else {
            Err(NotEntitled::NoSuchProgram)
        }
    }

    /// Does the pod of this UID run this program, where the program says it does?
    ///
    /// # Errors
    /// [`NoSuchPod`]
    pub fn check_pod(&self, uid: &Uid, program: &ProgramIdentity) -> Result<(), NoSuchPod> {
        match self.program_pods.get(uid) {
            Some(running) if running == program => Ok(()),
            _ => Err(NoSuchPod),
        }
    }

    /// The CA's own replicas, by the names of their pods; none where programs are [`Programs::Listed`].
    pub fn replicas(&self) -> &BTreeSet<Arc<str>> {
        &self.replicas
    }

    fn standing(&self, node: &KubernetesName, identity: &WorkloadIdentity) -> Option<Standing> {
        self.by_node.get(node)?.get(identity).copied()
    }
}

fn rules(cluster: &Cluster, before: Option<&Entitlements>) -> HashMap<KubernetesName, Rules> {
    let labelled = (cluster.namespaces.iter()).filter(|(_, namespace)| namespace.is_labelled());
    let read = labelled.map(|(name, namespace)| {
        let last = before.and_then(|before| before.rules.get(name).copied());
        (name.clone(), namespace.rules(last, cluster.defaults).0)
    });
    read.collect()
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

    fn read(cluster: &Cluster, before: Option<&Entitlements>, now: Instant) -> Entitlements {
        Entitlements::read(cluster, &Programs::Listed, before, now)
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
        let read = read(&cluster(ENROLLED, ""), None, now);
        assert_eq!(check(&read, "n1", WEB, now), Ok(()));
    }

    #[test]
    fn another_node_identity_or_trust_domain_is_refused() {
        let now = Instant::now();
        let read = read(&cluster(ENROLLED, ""), None, now);
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
            let read = read(&cluster(labels, pod), None, now);
            assert_eq!(check(&read, "n1", WEB, now), expected, "{labels} {pod}");
        }
    }

    #[test]
    fn a_pod_that_leaves_may_renew_for_a_while() {
        let now = Instant::now();
        let enrolled = read(&cluster(ENROLLED, ""), None, now);
        let left = read(&cluster("", ""), Some(&enrolled), now);
        // A later reading does not begin the time anew.
        let later = read(
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
        let enrolled = read(&cluster(ENROLLED, ""), None, now);
        let gone = read(
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
        let both = read(&two(""), None, now);
        assert_eq!(check(&both, "n1", WEB, now), Ok(()));
        let one = read(&two(", phase: Succeeded"), Some(&both), now);
        assert_eq!(check(&one, "n1", WEB, now), Err(NotEntitled::NotEnrolled));
    }

    #[test]
    fn a_mode_that_cannot_be_read_keeps_the_last_good_one() {
        const BAD: &str = r#"io.cilium/mtls-enabled: "true", podveil.io/mode: stricter"#;
        let now = Instant::now();
        let strict = read(&cluster(STRICT, OPT_OUT), None, now);
        let bad = read(&cluster(BAD, OPT_OUT), Some(&strict), now);
        let still = read(&cluster(BAD, OPT_OUT), Some(&bad), now + LEAVING_GRACE * 2);
        assert_eq!(
            check(&still, "n1", WEB, now + LEAVING_GRACE * 2),
            Ok(()),
            "a pod does not opt out of a namespace that was strict last"
        );
        let first = read(&cluster(BAD, OPT_OUT), None, now);
        assert_eq!(
            check(&first, "n1", WEB, now),
            Ok(()),
            "the strictest where no good one is known"
        );
    }

    #[test]
    fn only_listed_nodes_and_the_controller_are_programs() {
        let read = read(&cluster(ENROLLED, ""), None, Instant::now());
        let node = |name: &str| ProgramIdentity::Node(name.parse().unwrap());
        for (program, expected) in [
            (node("n1"), Ok(())),
            (node("n3"), Err(NotEntitled::NoSuchProgram)),
            (ProgramIdentity::Controller, Ok(())),
        ] {
            assert_eq!(read.check_program(&program), expected, "{program}");
        }
    }

    #[test]
    fn a_program_is_where_a_pod_of_its_account_runs_in_our_namespace() {
        let pod = |namespace: &str, uid: &str, node: &str, account: &str, rest: &str| {
            format!(
                "- {{name: {uid}, namespace: {namespace}, uid: {uid}, node: {node}, \
                 serviceAccount: {account}, hostNetwork: true{rest}}}\n"
            )
        };
        let text = format!(
            "trustDomain: cluster.local\nnodes: [{{name: n9}}]\nworkloads:\n{}{}{}{}{}{}",
            pod("podveil-system", "u1", "n1", "podveil-node", ""),
            pod(
                "podveil-system",
                "u2",
                "n2",
                "podveil-node",
                ", phase: Failed"
            ),
            pod("podveil-system", "u3", "n3", "podveil-controller", ""),
            pod("podveil-system", "u4", "n4", "default", ""),
            pod("shop", "u5", "n5", "podveil-node", ""),
            pod("podveil-system", "u6", "n6", "podveil-ca", ""),
        );
        let cluster = podveil_source::parse(1, [(Path::new("c.yaml"), text.as_str())]).unwrap();
        let programs = Programs::Pods {
            namespace: "podveil-system".parse().unwrap(),
        };
        let read = Entitlements::read(&cluster, &programs, None, Instant::now());
        let node = |name: &str| ProgramIdentity::Node(name.parse().unwrap());
        assert!(read.check_program(&node("n1")).is_ok());
        assert!(read.check_program(&ProgramIdentity::Controller).is_ok());
        for gone in ["n2", "n3", "n4", "n5", "n6", "n9"] {
            assert!(read.check_program(&node(gone)).is_err(), "{gone}");
        }
        let uid = |uid: &str| Uid(uid.into());
        assert_eq!(read.check_pod(&uid("u1"), &node("n1")), Ok(()));
        for (pod, program) in [
            ("u1", node("n2")),
            ("u1", ProgramIdentity::Controller),
            ("u2", node("n2")),
            ("u5", node("n5")),
            ("u7", node("n1")),
        ] {
            assert_eq!(
                read.check_pod(&uid(pod), &program),
                Err(NoSuchPod),
                "{pod} {program}"
            );
        }
        let replicas: Vec<_> = read.replicas().iter().map(AsRef::as_ref).collect();
        assert_eq!(replicas, ["u6"]);
    }
}
