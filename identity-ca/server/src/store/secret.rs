// SPDX-License-Identifier: Apache-2.0
//! The record in a Kubernetes Secret, whole: `journal.json`, and `<serial>.pem` and `<serial>.key` of each authority. It
//! is replaced in one step and only in the version that was read last, so of two replicas one is told to read again.

use super::{Kept, Record};
use crate::api::{ApiError, Objects};
use podveil_kube::k8s_openapi::ByteString;
use podveil_kube::k8s_openapi::api::core::v1::{ConfigMap, Secret};
use podveil_kube::kube::Client;
use podveil_kube::kube::api::ObjectMeta;
use std::collections::BTreeMap;
use zeroize::{Zeroize, Zeroizing};

/// Only the CA may read it.
pub const SECRET: &str = "podveil-ca";
/// The roots, for everybody; made from the record.
pub const ROOTS: &str = "podveil-roots";
pub const ROOTS_KEY: &str = "bundle.pem";

const JOURNAL_KEY: &str = "journal.json";

/// The Secret, and what was last known of it.
#[derive(Debug)]
pub struct KubeSecret {
    namespace: String,
    secrets: Objects<Secret>,
    roots: Objects<ConfigMap>,
    /// As read or written last, with the version that the next write replaces; `None` where there is no Secret.
    metadata: Option<ObjectMeta>,
}

/// Why the Secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("Secret {name}")]
    Api {
        name: String,
        #[source]
        source: ApiError,
    },
    /// The chart makes it, empty: the right to make Secrets cannot be limited to one name, so the CA has none.
    #[error(
        "Secret {name} does not exist. Make it, empty, by `helm upgrade` or `kubectl create secret generic`: a CA that \
         runs writes its record there again"
    )]
    Missing { name: String },
    #[error("Secret {name} has a value that is no text")]
    NotText { name: String },
}

impl SecretError {
    /// Another replica has written meanwhile.
    pub fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::Api {
                source: ApiError::Conflict,
                ..
            }
        )
    }
}

impl KubeSecret {
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            secrets: Objects::new(client.clone(), Some(namespace)),
            roots: Objects::new(client, Some(namespace)),
            metadata: None,
        }
    }

    /// A Secret without a journal is one that was made for us and not used yet.
    ///
    /// # Errors
    /// If the API server gives no answer.
    pub async fn load(&mut self) -> Result<Option<Record>, SecretError> {
        let secret = self.secrets.get(SECRET).await.map_err(self.failed())?;
        self.metadata = secret.as_ref().map(|secret| secret.metadata.clone());
        let mut values = Values(secret.and_then(|secret| secret.data).unwrap_or_default());
        let Some(journal) = self.take(&mut values, JOURNAL_KEY)? else {
            return Ok(None);
        };
        let serials: Vec<String> = values
            .0
            .keys()
            .filter_map(|key| key.strip_suffix(".pem"))
            .map(ToOwned::to_owned)
            .collect();
        let mut authorities = BTreeMap::new();
        for serial in serials {
            let certificate = self.take(&mut values, &format!("{serial}.pem"))?;
            let key = self.take(&mut values, &format!("{serial}.key"))?;
            if let (Some(certificate), Some(key)) = (certificate, key) {
                let certificate = certificate.as_str().to_owned();
                authorities.insert(serial, Kept { certificate, key });
            }
        }
        Ok(Some(Record {
            journal: journal.as_str().to_owned(),
            authorities,
        }))
    }

    /// # Errors
    /// [`SecretError::is_conflict`] if it is no longer the version read last.
    pub async fn save(&mut self, record: &Record) -> Result<(), SecretError> {
        let Some(mut metadata) = self.metadata.clone() else {
            return Err(self.missing());
        };
        let mut values = Values(BTreeMap::new());
        let text = |text: &str| ByteString(text.as_bytes().to_vec());
        values.0.insert(JOURNAL_KEY.into(), text(&record.journal));
        for (serial, kept) in &record.authorities {
            let certificate = text(&kept.certificate);
            values.0.insert(format!("{serial}.pem"), certificate);
            values.0.insert(format!("{serial}.key"), text(&kept.key));
        }
        metadata.name = Some(SECRET.into());
        metadata.managed_fields = None;
        let mut secret = Secret {
            metadata,
            data: Some(std::mem::take(&mut values.0)),
            ..Secret::default()
        };
        let written = self.secrets.put(&secret).await;
        values.0 = secret.data.take().unwrap_or_default();
        let mut written = written.map_err(self.failed())?;
        let _wiped = Values(written.data.take().unwrap_or_default());
        self.metadata = Some(written.metadata);
        Ok(())
    }

    /// The roots are published after the first record.
    ///
    /// # Errors
    /// If the API server gives no answer.
    pub async fn was_used(&self) -> Result<bool, SecretError> {
        let roots = self.roots.get(ROOTS).await.map_err(self.failed())?;
        let bundle = roots
            .as_ref()
            .and_then(|roots| roots.data.as_ref()?.get(ROOTS_KEY));
        Ok(bundle.is_some_and(|bundle| !bundle.is_empty()))
    }

    /// After [`Self::load`].
    pub fn exists(&self) -> bool {
        self.metadata.is_some()
    }

    pub fn missing(&self) -> SecretError {
        SecretError::Missing { name: self.name() }
    }

    pub fn version(&self) -> Option<&str> {
        self.metadata.as_ref()?.resource_version.as_deref()
    }

    pub fn place(&self) -> String {
        format!("{JOURNAL_KEY} of Secret {}", self.name())
    }

    pub fn sign(&self) -> String {
        format!("{ROOTS_KEY} of ConfigMap {}/{ROOTS}", self.namespace)
    }

    fn name(&self) -> String {
        format!("{}/{SECRET}", self.namespace)
    }

    fn failed(&self) -> impl Fn(ApiError) -> SecretError + use<> {
        let name = self.name();
        move |source| SecretError::Api {
            name: name.clone(),
            source,
        }
    }

    fn take(
        &self,
        values: &mut Values,
        key: &str,
    ) -> Result<Option<Zeroizing<String>>, SecretError> {
        let Some(value) = values.0.remove(key) else {
            return Ok(None);
        };
        match String::from_utf8(value.0) {
            Ok(text) => Ok(Some(Zeroizing::new(text))),
            Err(error) => {
                error.into_bytes().zeroize();
                Err(SecretError::NotText { name: self.name() })
            }
        }
    }
}

/// A Secret's values, wiped when dropped.
struct Values(BTreeMap<String, ByteString>);

impl Drop for Values {
    fn drop(&mut self) {
        for value in self.0.values_mut() {
            value.0.zeroize();
        }
    }
}
