// SPDX-License-Identifier: Apache-2.0
use super::install::replace;
use crate::work::chain;
use podveil_cni::NotEnrolled;
use podveil_identity::KubernetesName;
use podveil_model::{Epoch, MeshConfig};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

/// The namespaces that are known not to be enrolled. Begins with what a run before was told.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Namespaces {
    epoch: Epoch,
    not_enrolled: BTreeSet<KubernetesName>,
}

impl Namespaces {
    /// What [`tell`] has written to `path`; nothing where that cannot be read.
    pub fn read(path: &Path) -> Self {
        let read = NotEnrolled::read(path).and_then(|told| {
            let (resource_version, stage) = told.version.split_once('.')?;
            let names = told.names.iter();
            Some(Self {
                epoch: Epoch {
                    resource_version: resource_version.parse().ok()?,
                    stage: stage.parse().ok()?,
                },
                not_enrolled: names.map(|name| name.parse().ok()).collect::<Option<_>>()?,
            })
        });
        read.unwrap_or_default()
    }

    /// Takes the controller's word. An older one than what is held takes namespaces out and puts none in: a replica that
    /// lags cannot let anybody out.
    pub fn take(&mut self, mesh: &MeshConfig) {
        if mesh.epoch >= self.epoch {
            self.epoch = mesh.epoch;
            self.not_enrolled.clone_from(&mesh.not_enrolled);
        } else {
            (self.not_enrolled).retain(|name| mesh.not_enrolled.contains(name));
        }
    }

    pub fn are_without(&self, namespace: &str) -> bool {
        let name = namespace.parse();
        name.is_ok_and(|name: KubernetesName| self.not_enrolled.contains(&name))
    }

    fn encode(&self) -> String {
        let told = NotEnrolled {
            version: self.epoch.to_string(),
            names: self.not_enrolled.iter().map(ToString::to_string).collect(),
        };
        told.encode()
    }
}

/// Keeps the file at `path` as the controller's last word, until nobody tells any more and for as long as this program is away:
/// the plugin lets pods of these namespaces start then. Nothing is written before there is a word.
pub async fn tell(path: PathBuf, mut namespaces: watch::Receiver<Arc<Namespaces>>) {
    while namespaces.changed().await.is_ok() {
        write(&path, &mut namespaces).await;
    }
}

async fn write(path: &Path, namespaces: &mut watch::Receiver<Arc<Namespaces>>) {
    let (path, namespaces) = (path.to_owned(), namespaces.borrow_and_update().clone());
    let written = tokio::task::spawn_blocking(move || {
        if let Err(error) = replace(&path, namespaces.encode().as_bytes(), 0o600) {
            // Better none than one that is not true any more.
            let _none = fs::remove_file(&path);
            tracing::warn!(
                error = chain(&error),
                "the CNI plugin cannot be told which namespaces are not enrolled: while this program is away, no pod starts but those of exempt namespaces"
            );
        }
    });
    if let Err(error) = written.await {
        tracing::error!(%error, "a piece of work was lost");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn namespaces(resource_version: u64, names: &[&str]) -> Namespaces {
        let epoch = Epoch {
            resource_version,
            stage: 0,
        };
        Namespaces {
            epoch,
            not_enrolled: names.iter().map(|name| name.parse().unwrap()).collect(),
        }
    }

    fn mesh(namespaces: Namespaces) -> MeshConfig {
        MeshConfig {
            epoch: namespaces.epoch,
            not_enrolled: namespaces.not_enrolled,
            ..podveil_testing::mesh()
        }
    }

    #[test]
    fn an_older_word_takes_namespaces_out_and_puts_none_in() {
        let mut held = namespaces(7, &["a", "b"]);
        assert!(held.are_without("a") && !held.are_without("c") && !held.are_without("no name"));
        held.take(&mesh(namespaces(6, &["b", "c"])));
        assert_eq!(held, namespaces(7, &["b"]));
        held.take(&mesh(namespaces(8, &["c"])));
        assert_eq!(held, namespaces(8, &["c"]));
        // A control plane that does not say.
        held.take(&mesh(namespaces(9, &[])));
        assert!(!held.are_without("c"));
    }

    #[tokio::test]
    async fn the_file_is_the_last_word_and_outlasts_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("not-enrolled");
        assert_eq!(Namespaces::read(&path), Namespaces::default());
        let (sender, told) = watch::channel(Arc::default());
        let task = tokio::spawn(tell(path.clone(), told));
        for names in [&["bank", "shop"][..], &["shop"], &[], &["bank"]] {
            let word = namespaces(7, names);
            sender.send_replace(Arc::new(word.clone()));
            while Namespaces::read(&path) != word {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        // A word that comes together with the end.
        let last = namespaces(8, &["bank"]);
        sender.send_replace(Arc::new(last.clone()));
        drop(sender);
        task.await.unwrap();
        assert_eq!(Namespaces::read(&path), last);

        // It cannot be written any more: then it says nothing.
        fs::create_dir(folder.path().join(".not-enrolled.podveil")).unwrap();
        let (sender, told) = watch::channel(Arc::default());
        sender.send_replace(Arc::new(namespaces(9, &["bank"])));
        drop(sender);
        tell(path.clone(), told).await;
        assert!(!path.exists());
    }
}
