// SPDX-License-Identifier: Apache-2.0
use crate::{Cluster, Defaults, ParseError, parse};
use notify::Watcher;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// After the first notice, how long to wait for the rest of one change (truncate, write, rename).
const SETTLE: Duration = Duration::from_millis(10);
/// Notices can be lost (queue overflow, a file system that sends none): look again this often.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// A larger source is a mistake; reading it would only end the program.
const MAX_BYTES: u64 = 64 << 20;

/// What became of the last reading.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Readings that changed the cluster.
    pub changes: u64,
    /// Why the newest content is not in use; `None` when it is.
    pub error: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} has no *.yaml file", path.display())]
    Empty { path: PathBuf },
    #[error("{} is larger than {MAX_BYTES} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error(transparent)]
    Parse(#[from] ParseError),
    #[error("cannot watch {}", path.display())]
    Watch {
        path: PathBuf,
        #[source]
        source: notify::Error,
    },
}

/// A file or directory that is being watched.
#[derive(Clone, Debug)]
pub struct FileSource {
    cluster: watch::Receiver<Arc<Cluster>>,
    status: watch::Receiver<Status>,
}

impl FileSource {
    /// Reads `path` once, then keeps reading it on every change until `stop`. Must be called on a tokio runtime.
    /// `defaults` hold in every state that is read.
    ///
    /// # Errors
    /// [`LoadError`] if the first reading fails: there is no last good state to go on with.
    pub fn start(
        path: &Path,
        defaults: Defaults,
        stop: CancellationToken,
    ) -> Result<Self, LoadError> {
        // The watch stands before the first reading, so that no change falls between them.
        let (notice, notices) = mpsc::channel(1);
        let watcher = watch_path(path, notice)?;
        let files = read(path)?;
        let cluster = files.cluster(files.version, defaults)?;
        let (cluster_tx, cluster) = watch::channel(Arc::new(cluster));
        let (status_tx, status) = watch::channel(Status::default());
        let follower = Follower {
            path: path.to_owned(),
            defaults,
            files: Some(files),
            cluster: cluster_tx,
            status: status_tx,
        };
        tokio::spawn(follower.run(watcher, notices, stop));
        Ok(Self { cluster, status })
    }

    /// The last good state.
    pub fn cluster(&self) -> watch::Receiver<Arc<Cluster>> {
        self.cluster.clone()
    }

    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

/// Reads a file or a directory once.
///
/// # Errors
/// [`LoadError`], naming the file and, for a parse error, the line.
pub fn load(path: &Path) -> Result<Cluster, LoadError> {
    let files = read(path)?;
    Ok(parse(files.version, files.named())?)
}

struct Follower {
    path: PathBuf,
    defaults: Defaults,
    /// What was read last, good or not; `None` after a reading that failed.
    files: Option<Files>,
    cluster: watch::Sender<Arc<Cluster>>,
    status: watch::Sender<Status>,
}

impl Follower {
    /// `_watcher` lives as long as this task: dropping it would end the notices.
    async fn run(
        mut self,
        _watcher: notify::RecommendedWatcher,
        mut notices: mpsc::Receiver<()>,
        stop: CancellationToken,
    ) {
        let mut look_again = interval(LOOK_AGAIN);
        look_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = notices.recv() => {
                    tokio::time::sleep(SETTLE).await;
                    // One reading answers all notices up to here.
                    while notices.try_recv().is_ok() {}
                }
                _ = look_again.tick() => {}
            }
            let path = self.path.clone();
            let Ok(files) = tokio::task::spawn_blocking(move || read(&path)).await else {
                return;
            };
            self.take(files);
        }
    }

    fn take(&mut self, files: Result<Files, LoadError>) {
        let files = match files {
            Ok(files) => files,
            Err(error) => {
                self.files = None;
                return self.refuse(error);
            }
        };
        if self
            .files
            .as_ref()
            .is_some_and(|last| last.texts == files.texts)
        {
            return;
        }
        let version = files.version.max(self.cluster.borrow().version + 1);
        match files.cluster(version, self.defaults) {
            Ok(cluster) => {
                let same = cluster.same_state(&self.cluster.borrow());
                if !same {
                    tracing::info!(version, path = %self.path.display(), "cluster state read");
                    self.cluster.send_replace(Arc::new(cluster));
                }
                self.status.send_if_modified(|status| {
                    status.changes += u64::from(!same);
                    status.error.take().is_some() || !same
                });
            }
            Err(error) => self.refuse(error.into()),
        }
        self.files = Some(files);
    }

    fn refuse(&self, error: LoadError) {
        let known = self
            .status
            .borrow()
            .error
            .as_ref()
            .is_some_and(|last| last.to_string() == error.to_string());
        if known {
            return;
        }
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "cluster state is broken; the last good one stays in use"
        );
        self.status
            .send_modify(|status| status.error = Some(Arc::new(error)));
    }
}

/// Watches the directory, not the file: an editor or a ConfigMap replaces the file by a rename.
fn watch_path(
    path: &Path,
    notice: mpsc::Sender<()>,
) -> Result<notify::RecommendedWatcher, LoadError> {
    let failed = |source| LoadError::Watch {
        path: path.to_owned(),
        source,
    };
    let directory = if path.is_dir() {
        path
    } else {
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading makes access events; an error may hide a change. A full channel already holds a notice.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            let _ = notice.try_send(());
        }
    })
    .map_err(failed)?;
    watcher
        .watch(directory, notify::RecursiveMode::NonRecursive)
        .map_err(failed)?;
    Ok(watcher)
}

/// The texts of one reading, by file.
#[derive(Debug)]
struct Files {
    /// The newest modification time among them and the directory, in microseconds of Unix time.
    version: u64,
    texts: BTreeMap<PathBuf, String>,
}

impl Files {
    fn cluster(&self, version: u64, defaults: Defaults) -> Result<Cluster, ParseError> {
        let cluster = parse(version, self.named())?;
        Ok(Cluster {
            defaults,
            ..cluster
        })
    }

    fn named(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.texts
            .iter()
            .map(|(path, text)| (path.as_path(), text.as_str()))
    }
}

fn read(path: &Path) -> Result<Files, LoadError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| LoadError::Read { path, source }
    };
    let mut paths = Vec::new();
    let metadata = std::fs::metadata(path).map_err(failed(path))?;
    let mut version = 0;
    if metadata.is_dir() {
        // A file taken away is a change too, and only the directory's time shows it.
        version = modified_micros(&metadata);
        for entry in std::fs::read_dir(path).map_err(failed(path))? {
            let path = entry.map_err(failed(path))?.path();
            let hidden = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if path
                .extension()
                .is_some_and(|extension| extension == "yaml")
                && !hidden
            {
                paths.push(path);
            }
        }
        if paths.is_empty() {
            return Err(LoadError::Empty {
                path: path.to_owned(),
            });
        }
    } else {
        paths.push(path.to_owned());
    }
    let mut texts = BTreeMap::new();
    let mut total_bytes = 0;
    for file in paths {
        let metadata = std::fs::metadata(&file).map_err(failed(&file))?;
        version = version.max(modified_micros(&metadata));
        total_bytes += metadata.len();
        if total_bytes > MAX_BYTES {
            return Err(LoadError::TooLarge {
                path: path.to_owned(),
            });
        }
        let text = std::fs::read_to_string(&file).map_err(failed(&file))?;
        texts.insert(file, text);
    }
    Ok(Files { version, texts })
}

fn modified_micros(metadata: &std::fs::Metadata) -> u64 {
    metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .and_then(|age| u64::try_from(age.as_micros()).ok())
        .unwrap_or_default()
}
