// SPDX-License-Identifier: Apache-2.0
use super::install::{remove_file, replace};
use crate::work::chain;
use podveil_cni::namespaces::encode;
use podveil_identity::KubernetesName;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Keeps the file at `path` as the controller's last word about which namespaces are enrolled, until `stop` and for as long
/// as this program is away: the plugin lets pods of other namespaces start then. Nothing is written before there is a word.
pub async fn tell(
    path: PathBuf,
    mut enrolled: watch::Receiver<Option<BTreeSet<KubernetesName>>>,
    stop: CancellationToken,
) {
    while let Some(Ok(())) = stop.run_until_cancelled(enrolled.changed()).await {
        let names = enrolled.borrow_and_update().clone();
        let text = names.map(|names| encode(names.iter().map(KubernetesName::as_str)));
        let path = path.clone();
        let written = tokio::task::spawn_blocking(move || {
            let written = match text {
                Some(text) => replace(&path, text.as_bytes(), 0o600),
                // A control plane that does not say.
                None => remove_file(&path),
            };
            if let Err(error) = written {
                // Better none than one that is not true any more.
                let _none = fs::remove_file(&path);
                tracing::warn!(
                    error = chain(&error),
                    "the CNI plugin cannot be told which namespaces are enrolled: while this program is away, no pod starts but those of exempt namespaces"
                );
            }
        });
        if let Err(error) = written.await {
            tracing::error!(%error, "a piece of work was lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_file_is_the_last_word_and_outlasts_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("enrolled-namespaces");
        let (sender, enrolled) = watch::channel(None);
        let stop = CancellationToken::new();
        let task = tokio::spawn(tell(path.clone(), enrolled, stop.clone()));
        for names in [&["bank", "shop"][..], &["shop"], &[]] {
            let set = names.iter().map(|name| name.parse().unwrap()).collect();
            sender.send_replace(Some(set));
            while fs::read_to_string(&path).ok() != Some(encode(names)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        sender.send_replace(None);
        while path.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        sender.send_replace(Some(["shop".parse().unwrap()].into()));
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // It cannot be written any more: then it says nothing.
        fs::create_dir(folder.path().join(".enrolled-namespaces.podveil")).unwrap();
        sender.send_replace(Some(["late".parse().unwrap()].into()));
        while path.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        stop.cancel();
        task.await.unwrap();
    }
}
