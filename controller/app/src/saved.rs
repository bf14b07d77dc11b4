// SPDX-License-Identifier: Apache-2.0
//! The state file: how far each workload is enrolled, so that a restart goes on from there.

use podveil_index::{Saved, SavedWorkload};
use podveil_model::{Mode, Stage, Uid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tokio::sync::watch;

const FILE: &str = "enrolment.json";

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

/// Writes each newest state, until the sender is gone.
pub(crate) async fn keep(state_dir: PathBuf, mut saved: watch::Receiver<Saved>) {
    while saved.changed().await.is_ok() {
        let newest = saved.borrow_and_update().clone();
        let path = state_dir.join(FILE);
        let written = tokio::task::spawn_blocking(move || write(&path, newest)).await;
        if let Ok(Err(error)) = written {
            tracing::error!(%error, "the state of enrolment could not be saved");
        }
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

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("made");
        assert_eq!(read(&state_dir).unwrap(), Saved::default());
        let workload = SavedWorkload {
            stage: Stage::Mandatory,
            mode: Mode::Strict,
            resource_version: 7,
        };
        let saved = Saved {
            version: 8,
            workloads: BTreeMap::from([(Uid::from("web"), workload)]),
        };
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
}
