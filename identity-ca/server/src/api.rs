// SPDX-License-Identifier: Apache-2.0
//! Requests to the API server whose answers hold keys or tokens. The kube crate's own typed requests log an answer that
//! does not parse, and serde's errors quote it; here neither happens.

use podveil_kube::kube::core::Request;
use podveil_kube::kube::{self, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::marker::PhantomData;
use std::time::Duration;
use zeroize::Zeroizing;

/// An API server that takes longer is away, for us.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Objects of one kind, in one namespace or cluster-wide.
#[derive(Clone)]
pub struct Objects<K> {
    client: Client,
    request: Request,
    kind: PhantomData<fn() -> K>,
}

/// Why the API server gave no answer that could be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("somebody else changed the object meanwhile")]
    Conflict,
    #[error("the API server's answer does not parse")]
    Malformed,
    #[error("the API server refused")]
    Refused(#[source] Box<kube::Error>),
    #[error("the API server did not answer in {TIMEOUT:?}")]
    TimedOut,
    #[error("the API server cannot be reached")]
    Unreachable(#[source] Box<kube::Error>),
}

impl<K> Objects<K>
where
    K: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
{
    pub fn new(client: Client, namespace: Option<&str>) -> Self {
        Self {
            client,
            request: Request::new(K::url_path(&(), namespace)),
            kind: PhantomData,
        }
    }

    /// # Errors
    /// [`ApiError`]; `None` is no error.
    pub async fn get(&self, name: &str) -> Result<Option<K>, ApiError> {
        match self.ask(self.request.get(name, &Default::default())).await {
            Ok(object) => Ok(Some(object)),
            Err(ApiError::Refused(error)) if code(&error) == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates `object`, or replaces the version of it that its `resourceVersion` names.
    ///
    /// # Errors
    /// [`ApiError::Conflict`] if it is there already, or of another version.
    pub async fn put(&self, object: &K) -> Result<K, ApiError> {
        let body = serde_json::to_vec(object).map_err(|_| ApiError::Malformed)?;
        let meta = object.meta();
        let request = match (&meta.resource_version, &meta.name) {
            (Some(_), Some(name)) => self.request.replace(name, &Default::default(), body),
            _ => self.request.create(&Default::default(), body),
        };
        match self.ask(request).await {
            Err(ApiError::Refused(error)) if code(&error) == Some(409) => Err(ApiError::Conflict),
            // What was to be replaced is gone.
            Err(ApiError::Refused(error))
                if code(&error) == Some(404) && meta.resource_version.is_some() =>
            {
                Err(ApiError::Conflict)
            }
            answer => answer,
        }
    }

    async fn ask<E: std::fmt::Debug>(
        &self,
        request: Result<http::Request<Vec<u8>>, E>,
    ) -> Result<K, ApiError> {
        // Only a name that is none can be at fault, and ours are constants.
        let request = request.map_err(|_| ApiError::Malformed)?;
        let answer = tokio::time::timeout(TIMEOUT, self.client.request_text(request))
            .await
            .map_err(|_| ApiError::TimedOut)?
            .map_err(|error| match error {
                kube::Error::FromUtf8(_) => ApiError::Malformed,
                // Behind the front there may be nobody: that is no answer.
                error if code(&error).is_some_and(|code| code < 500 && code != 429) => {
                    ApiError::Refused(Box::new(error))
                }
                error => ApiError::Unreachable(Box::new(error)),
            })?;
        let answer = Zeroizing::new(answer);
        serde_json::from_str(&answer).map_err(|_| ApiError::Malformed)
    }
}

impl<K> std::fmt::Debug for Objects<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Objects")
            .field(&self.request.url_path)
            .finish()
    }
}

/// The status that the API server itself answered.
fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}
