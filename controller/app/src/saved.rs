// SPDX-License-Identifier: Apache-2.0
//! The state file: how far each workload is enrolled, so that a restart goes on from there.

use podveil_index::{Saved, SavedWorkload};
use podveil_model::{Mode, Stage, Uid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;

const FILE: &str = "enrolment.json";
/// Changes that come close together share one file.
const GATHER: Duration = Duration::from_secs(1);
/// Before the next attempt after one that failed: a disk does not stay full for ever.
const RETRY: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    #[error("making {}", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is broken; without it every workload is walked in again", path.display())]
    Broken {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("reading {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u64,
    workloads: BTreeMap<String, Workload>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Workload {
    stage: StageName,
    strict: bool,
    resource_version: u64,
}

#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum StageName {
    None,
    Wanted,
    Capturable,
    Announced,
    Mandatory,
    Draining,
}

/// Reads what was saved in `state_dir`, which is made if it is not there; nothing on the first start.
///
/// # Errors
/// [`SavedError`]: going on without it would take enrolled workloads back to plain for a moment, so a person decides.
pub(crate) fn read(state_dir: &Path) -> Result<Saved, SavedError> {
    std::fs::create_dir_all(state_dir).map_err(|source| SavedError::Directory {
        path: state_dir.to_owned(),
        source,
    })?;
    let path = state_dir.join(FILE);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Saved::default()),
        Err(source) => return Err(SavedError::Read { path, source }),
    };
    match serde_json::from_slice::<File>(&text) {
        Ok(file) => Ok(file.into()),
        Err(source) => Err(SavedError::Broken { path, source }),
    }
}

/// Writes the newest state soon after each change, until the sender is gone. What a crash loses of it is learnt again
/// from the nodes' reports.
pub(crate) async fn keep(state_dir: PathBuf, mut saved: watch::Receiver<Saved>) {
    let mut pause = GATHER;
    let mut is_unsaved = saved.changed().await.is_ok();
    while is_unsaved {
        let gathering = async { while saved.changed().await.is_ok() {} };
        // Sooner only where the sender is gone: then this is the last attempt.
        let is_last = tokio::time::timeout(pause, gathering).await.is_ok();
        let newest = saved.borrow_and_update().clone();
        let path = state_dir.join(FILE);
        let written = tokio::task::spawn_blocking(move || write(&path, newest)).await;
        (pause, is_unsaved) = match written.map_err(io::Error::other).flatten() {
            Ok(()) => (GATHER, saved.changed().await.is_ok()),
            Err(error) => {
                tracing::error!(%error, "the state of enrolment could not be saved");
                (RETRY, !is_last)
            }
        };
    }
}

/// In one step: after a crash there is the old file or the new one.
fn write(path: &Path, saved: Saved) -> io::Result<()> {
    let scratch = path.with_extension("new");
    let mut file = std::fs::File::create(&scratch)?;
    file.write_all(&serde_json::to_vec(&File::from(saved)).map_err(io::Error::other)?)?;
    file.sync_all()?;
    std::fs::rename(scratch, path)
}

impl From<Saved> for File {
    fn from(saved: Saved) -> Self {
        let workload = |(uid, saved): (Uid, SavedWorkload)| {
            let workload = Workload {
                stage: saved.stage.into(),
                strict: saved.mode == Mode::Strict,
                resource_version: saved.resource_version,
            };
            (uid.to_string(), workload)
        };
        Self {
            version: saved.version,
            workloads: saved.workloads.into_iter().map(workload).collect(),
        }
    }
}

impl From<File> for Saved {
    fn from(file: File) -> Self {
        let workload = |(uid, file): (String, Workload)| {
            let workload = SavedWorkload {
                stage: file.stage.into(),
                mode: if file.strict {
                    Mode::Strict
                } else {
                    Mode::Permissive
                },
                resource_version: file.resource_version,
            };
            (Uid::from(uid.as_str()), workload)
        };
        Self {
            version: file.version,
            workloads: file.workloads.into_iter().map(workload).collect(),
        }
    }
}

macro_rules! stages {
    ($($name:ident),*) => {
        impl From<Stage> for StageName {
            fn from(stage: Stage) -> Self {
                match stage { $(Stage::$name => Self::$name,)* }
            }
        }

        impl From<StageName> for Stage {
            fn from(name: StageName) -> Self {
                match name { $(StageName::$name => Self::$name,)* }
            }
        }
    };
}

stages!(None, Wanted, Capturable, Announced, Mandatory, Draining);

#[cfg(test)]
mod tests {
    use super::*;

    fn one_workload() -> Saved {
        let workload = SavedWorkload {
            stage: Stage::Mandatory,
            mode: Mode::Strict,
            resource_version: 7,
        };
        Saved {
            version: 8,
            workloads: BTreeMap::from([(Uid::from("web"), workload)]),
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("made");
        assert_eq!(read(&state_dir).unwrap(), Saved::default());
        let saved = one_workload();
        write(&state_dir.join(FILE), saved.clone()).unwrap();
        assert_eq!(read(&state_dir).unwrap(), saved);
    }

    #[test]
    fn a_broken_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(FILE), "{").unwrap();
        assert!(matches!(
            read(directory.path()),
            Err(SavedError::Broken { .. })
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_fails_is_tried_again_until_it_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        // Nothing can be written here, whoever tries.
        let in_the_way = directory.path().join(FILE).with_extension("new");
        std::fs::create_dir(&in_the_way).unwrap();
        let sender = watch::Sender::new(Saved::default());
        let keeping = tokio::spawn(keep(directory.path().to_owned(), sender.subscribe()));
        sender.send_replace(one_workload());
        tokio::time::sleep(GATHER + 3 * RETRY).await;
        assert_eq!(read(directory.path()).unwrap(), Saved::default());
        std::fs::remove_dir(&in_the_way).unwrap();
        let written = async {
            while read(directory.path()).unwrap() != one_workload() {
                tokio::time::sleep(GATHER).await;
            }
        };
        tokio::time::timeout(10 * RETRY, written).await.unwrap();
        drop(sender);
        keeping.await.unwrap();
    }
}
