// SPDX-License-Identifier: Apache-2.0
use super::TokenError;
use super::stated::Stated;
use crate::api::{ApiError, Objects};
use crate::entitlement::{CONTROLLER_ACCOUNT, NODE_ACCOUNT};
use crate::reading::{No, Reading};
use podveil_identity::{KubernetesName, ProgramIdentity};
use podveil_kube::k8s_openapi::api::authentication::v1::{
    TokenReview, TokenReviewSpec, TokenReviewStatus,
};
use podveil_kube::kube::Client;
use podveil_model::Uid;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use zeroize::Zeroize;

/// What a token for first contact is made for, and nothing else: one for the API server or for another CA is not taken.
pub const AUDIENCE: &str = "podveil-ca";
/// How long an answer of the API server holds; a deleted pod is seen by the CA's own watch within that time.
const MAX_AGE: Duration = Duration::from_secs(60);
/// Two programs a node, on more nodes than any cluster has. Above it nothing is kept.
const MAX_KEPT: usize = 16_384;
/// Reviews under way at once.
const MAX_BUSY: usize = 32;

const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Asks the API server whose a token is, and its own reading of the cluster whether that pod still runs.
pub struct Reviews {
    reviews: Objects<TokenReview>,
    namespace: KubernetesName,
    reading: Reading,
    busy: Semaphore,
    kept: Mutex<HashMap<[u8; 32], Kept>>,
}

#[derive(Clone)]
struct Kept {
    bound: Bound,
    until: Instant,
}

/// What a token proves: a program, in the pod of this UID.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Bound {
    program: ProgramIdentity,
    pod: Uid,
}

impl Reviews {
    /// `namespace` is Podveil's own, where its programs' ServiceAccounts are.
    pub fn new(client: Client, namespace: KubernetesName, reading: Reading) -> Self {
        Self {
            reviews: Objects::new(client, None),
            namespace,
            reading,
            busy: Semaphore::new(MAX_BUSY),
            kept: Mutex::default(),
        }
    }

    /// # Errors
    /// [`TokenError`]
    pub async fn program(&self, token: &str) -> Result<ProgramIdentity, TokenError> {
        let stated = Stated::read(token)?;
        stated.check(AUDIENCE, SystemTime::now())?;
        let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let bound = match self.kept(&digest) {
            Some(bound) => bound,
            None => {
                let bound = self.review(token).await?;
                self.keep(digest, &bound, stated.left(SystemTime::now()));
                bound
            }
        };
        let running = self
            .reading
            .when(|read| read.check_pod(&bound.pod, &bound.program), |_| true);
        match running.await {
            Ok(()) => Ok(bound.program),
            Err(No::Because(_)) => Err(TokenError::NoSuchPod),
            Err(No::NotReady) => Err(TokenError::NotReady),
        }
    }

    async fn review(&self, token: &str) -> Result<Bound, TokenError> {
        let _place = self.busy.try_acquire().map_err(|_| TokenError::Busy)?;
        let mut review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        let answer = self.reviews.put(&review).await;
        review.spec.token.zeroize();
        let mut answer = answer.map_err(TokenError::Review)?;
        answer.spec.token.zeroize();
        let status = answer
            .status
            .ok_or(TokenError::Review(ApiError::Malformed))?;
        bound(&status, &self.namespace)
    }

    fn kept(&self, digest: &[u8; 32]) -> Option<Bound> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.get(digest).filter(|kept| Instant::now() < kept.until);
        found.map(|kept| kept.bound.clone())
    }

    fn keep(&self, digest: [u8; 32], bound: &Bound, left: Duration) {
        let now = Instant::now();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT {
            kept.retain(|_, kept| now < kept.until);
        }
        if kept.len() < MAX_KEPT {
            let bound = bound.clone();
            let until = now + left.min(MAX_AGE);
            kept.insert(digest, Kept { bound, until });
        }
    }
}

/// No token, and no digest of one.
impl fmt::Debug for Reviews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reviews")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

/// Reads the API server's answer. The node is the one that it names, never one that the caller says.
fn bound(status: &TokenReviewStatus, namespace: &KubernetesName) -> Result<Bound, TokenError> {
    if status.authenticated != Some(true) {
        return Err(TokenError::NotAuthenticated);
    }
    // Without an audience the token would be one for the API server itself.
    let ours = |audiences: &Vec<String>| audiences.iter().any(|one| one == AUDIENCE);
    if !status.audiences.as_ref().is_some_and(ours) {
        return Err(TokenError::OtherAudience);
    }
    let user = status.user.as_ref().ok_or(TokenError::NotPodBound)?;
    let account = user
        .username
        .as_deref()
        .and_then(|name| name.strip_prefix("system:serviceaccount:"))
        .and_then(|name| name.strip_prefix(namespace.as_str()))
        .and_then(|name| name.strip_prefix(':'));
    let extra = |key: &str| match user.extra.as_ref()?.get(key)?.as_slice() {
        [value] if !value.is_empty() => Some(value.as_str()),
        _ => None,
    };
    let is_node = match account {
        Some(NODE_ACCOUNT) => true,
        Some(CONTROLLER_ACCOUNT) => false,
        _ => return Err(TokenError::OtherServiceAccount),
    };
    let (Some(_), Some(uid), Some(node)) = (extra(POD_NAME), extra(POD_UID), extra(NODE_NAME))
    else {
        return Err(TokenError::NotPodBound);
    };
    let node = node.parse().map_err(|_| TokenError::NotPodBound)?;
    Ok(Bound {
        program: if is_node {
            ProgramIdentity::Node(node)
        } else {
            ProgramIdentity::Controller
        },
        pod: Uid(uid.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const USER: &str = "system:serviceaccount:podveil-system:podveil-node";

    fn status(change: impl FnOnce(&mut Value)) -> Result<Bound, TokenError> {
        let mut status = json!({
            "authenticated": true,
            "audiences": ["podveil-ca"],
            "user": {
                "username": USER,
                "extra": {
                    "authentication.kubernetes.io/pod-name": ["podveil-node-x"],
                    "authentication.kubernetes.io/pod-uid": ["u1"],
                    "authentication.kubernetes.io/node-name": ["n1"],
                },
            },
        });
        change(&mut status);
        bound(
            &serde_json::from_value(status).unwrap(),
            &"podveil-system".parse().unwrap(),
        )
    }

    #[test]
    fn the_node_is_the_tokens() {
        let bound = status(|_| {}).unwrap();
        assert_eq!(bound.program, ProgramIdentity::Node("n1".parse().unwrap()));
        assert_eq!(bound.pod, Uid("u1".into()));
        let controller = status(|status| {
            status["user"]["username"] =
                json!("system:serviceaccount:podveil-system:podveil-controller");
        });
        assert_eq!(controller.unwrap().program, ProgramIdentity::Controller);
    }

    #[test]
    fn anything_else_is_refused_with_its_reason() {
        type Change = fn(&mut Value);
        const EXTRA: &str = "authentication.kubernetes.io/";
        let cases: [(&str, Change); 14] = [
            ("NotAuthenticated", |s| s["authenticated"] = json!(false)),
            ("NotAuthenticated", |s| s["authenticated"] = Value::Null),
            ("OtherAudience", |s| s["audiences"] = json!([])),
            ("OtherAudience", |s| s["audiences"] = Value::Null),
            ("OtherAudience", |s| s["audiences"] = json!(["istio-ca"])),
            ("NotPodBound", |s| s["user"] = Value::Null),
            ("OtherServiceAccount", |s| {
                s["user"]["username"] = json!("system:serviceaccount:shop:podveil-node");
            }),
            ("OtherServiceAccount", |s| {
                s["user"]["username"] = json!("system:serviceaccount:podveil-system:podveil-nodes");
            }),
            ("OtherServiceAccount", |s| {
                s["user"]["username"] = json!("system:serviceaccount:podveil-system:podveil-ca");
            }),
            ("OtherServiceAccount", |s| {
                s["user"]["username"] = json!("podveil-system:podveil-node");
            }),
            ("NotPodBound", |s| s["user"]["extra"] = Value::Null),
            ("NotPodBound", |s| {
                s["user"]["extra"][format!("{EXTRA}pod-uid")] = json!([]);
            }),
            ("NotPodBound", |s| {
                s["user"]["extra"][format!("{EXTRA}node-name")] = json!(["n1", "n2"]);
            }),
            ("NotPodBound", |s| {
                s["user"]["extra"][format!("{EXTRA}node-name")] = json!(["../n1"]);
            }),
        ];
        for (index, (reason, change)) in cases.into_iter().enumerate() {
            let refused = status(change).unwrap_err();
            assert_eq!(format!("{refused:?}"), reason, "case {index}");
        }
    }
}
