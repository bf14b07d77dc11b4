// SPDX-License-Identifier: Apache-2.0
//! What the person who runs this may do: to install the chart, and to use this tool afterwards.

use crate::check::Finding;
use crate::cluster::{Answered, Cluster};
use crate::output::Progress;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Api;
use kube::api::PostParams;

/// One thing that somebody needs to be allowed, and whether this person is.
#[derive(Clone, Debug)]
pub struct Permission {
    pub needed: Needed,
    pub allowed: Answered<bool>,
}

#[derive(Clone, Copy, Debug)]
pub struct Needed {
    pub purpose: Purpose,
    pub verb: &'static str,
    pub group: &'static str,
    pub resource: &'static str,
    pub subresource: &'static str,
    /// In Podveil's own namespace; otherwise in the whole cluster.
    pub own_namespace: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Purpose {
    Install,
    Use,
}

const NEEDED: [Needed; 16] = [
    install("create", "", "namespaces", false),
    install("create", "rbac.authorization.k8s.io", "clusterroles", false),
    install(
        "create",
        "rbac.authorization.k8s.io",
        "clusterrolebindings",
        false,
    ),
    install("create", "scheduling.k8s.io", "priorityclasses", false),
    install("create", "apps", "daemonsets", true),
    install("create", "apps", "deployments", true),
    install("create", "", "serviceaccounts", true),
    install("create", "", "secrets", true),
    install("create", "", "configmaps", true),
    install("patch", "", "namespaces", false),
    in_use("list", "", "pods", ""),
    in_use("get", "coordination.k8s.io", "leases", ""),
    // Opened by a WebSocket, which is a GET; newer API servers ask for `create` too.
    in_use("get", "", "pods", "portforward"),
    in_use("create", "", "pods", "portforward"),
    in_use("get", "", "pods", "exec"),
    in_use("create", "", "pods", "exec"),
];

const fn install(
    verb: &'static str,
    group: &'static str,
    resource: &'static str,
    own_namespace: bool,
) -> Needed {
    Needed {
        purpose: Purpose::Install,
        verb,
        group,
        resource,
        subresource: "",
        own_namespace,
    }
}

const fn in_use(
    verb: &'static str,
    group: &'static str,
    resource: &'static str,
    subresource: &'static str,
) -> Needed {
    Needed {
        purpose: Purpose::Use,
        verb,
        group,
        resource,
        subresource,
        own_namespace: true,
    }
}

pub async fn review(cluster: &Cluster, progress: &mut Progress) -> Vec<Permission> {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let mut permissions = Vec::new();
    for (done, needed) in NEEDED.into_iter().enumerate() {
        progress.say(&format!(
            "asking what you may do: {done} of {}",
            NEEDED.len()
        ));
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    verb: some(needed.verb),
                    group: some(needed.group),
                    resource: some(needed.resource),
                    subresource: some(needed.subresource),
                    namespace: needed.own_namespace.then(|| cluster.namespace.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = reviews.create(&PostParams::default(), &review).await;
        let allowed = answer
            .map(|review| review.status.is_some_and(|status| status.allowed))
            .map_err(|error| error.to_string());
        permissions.push(Permission { needed, allowed });
    }
    permissions
}

pub fn judge(permissions: &[Permission]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (purpose, whom) in [
        (Purpose::Install, "to install the chart"),
        (Purpose::Use, "to use podveilctl"),
    ] {
        let mut asked = permissions
            .iter()
            .filter(|one| one.needed.purpose == purpose)
            .peekable();
        if asked.peek().is_none() {
            continue;
        }
        let before = findings.len();
        for permission in asked {
            let what = permission.needed.to_string();
            match &permission.allowed {
                Ok(true) => {}
                Ok(false) if purpose == Purpose::Install => findings.push(Finding::warning(
                    "permissions",
                    format!("you may not {what}, which is needed {whom}"),
                    "let somebody install it who may, e.g. a cluster-admin",
                )),
                Ok(false) => findings.push(Finding::warning(
                    "permissions",
                    format!("you may not {what}, which is needed {whom}"),
                    "a Role in Podveil's namespace that allows it, bound to you",
                )),
                Err(why) => findings.push(Finding::unknown(
                    "permissions",
                    format!("whether you may {what} cannot be asked: {why}"),
                    "",
                )),
            }
        }
        if findings.len() == before {
            findings.push(Finding::good(
                "permissions",
                format!("you may do all that is needed {whom}"),
            ));
        }
    }
    findings
}

impl std::fmt::Display for Needed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if !self.subresource.is_empty() {
            write!(f, "/{}", self.subresource)?;
        }
        if self.own_namespace {
            f.write_str(" in Podveil's namespace")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::worse;
    use super::*;

    #[test]
    fn what_is_not_allowed_is_named_with_its_purpose() {
        let with = |refused: &str| {
            let permissions: Vec<_> = (NEEDED.into_iter())
                .map(|needed| Permission {
                    needed,
                    allowed: Ok(needed.to_string() != refused),
                })
                .collect();
            worse(judge(&permissions))
        };
        assert_eq!(with("nothing"), [""; 0]);
        assert_eq!(
            with("create pods/exec in Podveil's namespace"),
            [
                "Warning: you may not create pods/exec in Podveil's namespace, which is needed to use podveilctl"
            ]
        );
        assert_eq!(
            with("create clusterroles"),
            ["Warning: you may not create clusterroles, which is needed to install the chart"]
        );
    }
}
