// SPDX-License-Identifier: Apache-2.0
use kube::Client;
use kube::config::{Config, InferConfigError};

/// Why there is no way to the API server: always for the operator to mend.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("neither a service account nor a kubeconfig leads to an API server")]
    Infer(#[source] Box<InferConfigError>),
    #[error("the client of the API server cannot be made")]
    Make(#[source] Box<kube::Error>),
}

/// A client of the API server: by `KUBECONFIG` or the user's own kubeconfig where there is one, else as the pod's service
/// account. Nothing is asked of the server yet.
///
/// # Errors
/// [`ClientError`] if neither can be read.
pub async fn client() -> Result<Client, ClientError> {
    let config = Config::infer()
        .await
        .map_err(|error| ClientError::Infer(Box::new(error)))?;
    Client::try_from(config).map_err(|error| ClientError::Make(Box::new(error)))
}
