// SPDX-License-Identifier: Apache-2.0
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Client;
use kube::client::{Body, ConfigExt};
use kube::config::{Config, InferConfigError};
use std::time::Duration;
use tower::{BoxError, ServiceBuilder};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A watch may be silent for minutes; whether the server is still there is asked below it: a dead one is noticed within
/// idle + retries x interval, or within the last bound where a request is under way.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
const UNACKNOWLEDGED: Duration = Duration::from_secs(25);

/// How long the API server may say nothing, where its machine answers for it.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until an answer begins; a watch's begins at once.
    pub answer: Duration,
    /// In an answer. A watch brings a bookmark once a minute, the first one after two: one that is silent for longer is
    /// dead, and is followed again from where it was.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(60),
            silence: Duration::from_secs(180),
        }
    }
}

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
    client_of(&config, Patience::default()).map_err(|error| ClientError::Make(Box::new(error)))
}

/// A client of the API server that `config` names.
///
/// # Errors
/// If its certificates or keys cannot be read.
pub fn client_of(config: &Config, patience: Patience) -> kube::Result<Client> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_keepalive(Some(KEEPALIVE_IDLE));
    connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    connector.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
    connector.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let mut connector = TimeoutConnector::new(connector);
    connector.set_read_timeout(Some(patience.silence));
    // A connection that was idle has all of it for its next answer.
    connector.set_reset_reader_on_write(true);
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .timeout(patience.answer)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}
