// SPDX-License-Identifier: Apache-2.0
//! The plugin's file and its entry in the node's chain: put there, kept there, taken out again.

use super::{CniConfig, PluginState};
use crate::work::chain;
use notify::Watcher;
use podveil_cni::{ConfList, ListError, PLUGIN, Settings};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// Notices can be lost: look again this often.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Not more often than this, should somebody else put it back each time.
const PAUSE: Duration = Duration::from_millis(50);
/// Put back so often within a [`WINDOW`], the plugin is contested: each time the agent's answer would follow at once.
const CONTESTED: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);
/// Between two attempts then.
const CONTESTED_PAUSE: Duration = Duration::from_secs(10);
/// Configurations are a few kilobytes.
const MAX_CONF_BYTES: u64 = 1 << 20;
/// What a container runtime reads as a network configuration.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// Where the plugin goes.
#[derive(Clone, Debug)]
pub struct Installation {
    /// The program to be copied.
    pub plugin: PathBuf,
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
    pub settings: Settings,
}

/// Why the plugin does not stand as it should.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("there is no CNI configuration in {} yet", folder.display())]
    NoConfiguration { folder: PathBuf },
    #[error(
        "{} is a single plugin's configuration, not a list: a plugin can only be chained in a .conflist",
        path.display()
    )]
    NoList { path: PathBuf },
    #[error("the plugin cannot be chained in {}", path.display())]
    List {
        path: PathBuf,
        #[source]
        source: ListError,
    },
    #[error(
        "the CNI agent writes its list without it again and again: see that it leaves other plugins alone (Cilium: \
         cni.exclusive=false)"
    )]
    Contested,
    #[error("{} has more than {MAX_CONF_BYTES} bytes", path.display())]
    TooLong { path: PathBuf },
    #[error("{} cannot be {what}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    move |source| InstallError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

impl Installation {
    pub fn new(config: &CniConfig) -> Self {
        Self {
            plugin: config.plugin.clone(),
            bin_dir: config.bin_dir.clone(),
            conf_dir: config.conf_dir.clone(),
            settings: Settings {
                socket: config.socket.clone(),
                fail_closed: config.fail_closed,
                exempt_namespaces: config.exempt_namespaces.clone(),
            },
        }
    }

    /// The program first, then the entry at the end of the configuration that the runtime takes: the first by name. In
    /// others it has no business. Says whether it was not there.
    /// # Errors
    /// [`InstallError`]: the chain is as it was.
    pub fn put(&self) -> Result<bool, InstallError> {
        let program = fs::read(&self.plugin).map_err(failed("read", &self.plugin))?;
        let target = self.bin_dir.join(PLUGIN);
        if fs::read(&target).ok().as_ref() != Some(&program) {
            replace(&target, &program, 0o755)?;
            tracing::info!(path = %target.display(), "the CNI plugin is copied");
        }
        let mut files = self.configurations()?.into_iter();
        let folder = self.conf_dir.clone();
        let first = files
            .next()
            .ok_or(InstallError::NoConfiguration { folder })?;
        for other in files {
            take_out(&other)?;
        }
        if first
            .extension()
            .is_none_or(|extension| extension != "conflist")
        {
            return Err(InstallError::NoList { path: first });
        }
        let text = read_text(&first)?;
        let list = |source| InstallError::List {
            path: first.clone(),
            source,
        };
        let with = ConfList::new(&text).with(&self.settings).map_err(list)?;
        if with == text {
            return Ok(false);
        }
        rewrite(&first, &with)?;
        tracing::info!(path = %first.display(), "the CNI plugin is chained");
        Ok(true)
    }

    /// The entry first, so that nobody calls what is gone. Where neither is, nothing happens.
    /// # Errors
    /// The first thing that could not be removed; the program stays as long as it may be called.
    pub fn remove(&self) -> Result<(), InstallError> {
        if !self.conf_dir.exists() && !self.bin_dir.exists() {
            return Ok(());
        }
        for path in self.configurations()? {
            take_out(&path)?;
        }
        remove_file(&self.bin_dir.join(PLUGIN))
    }

    /// Every network configuration, in the order in which the runtime looks.
    fn configurations(&self) -> Result<Vec<PathBuf>, InstallError> {
        let unreadable = |source| failed("listed", &self.conf_dir)(source);
        let entries = match fs::read_dir(&self.conf_dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(unreadable)?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(unreadable)?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
                files.push(path);
            }
        }
        files.sort_unstable();
        Ok(files)
    }
}

pub(crate) fn remove_file(path: &Path) -> Result<(), InstallError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(failed("removed", path)(source)),
        _ => Ok(()),
    }
}

fn take_out(path: &Path) -> Result<(), InstallError> {
    let text = match read_text(path) {
        // Somebody else was faster.
        Err(InstallError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Ok(());
        }
        text => text?,
    };
    let list = ConfList::new(&text);
    if !list.is_with() {
        return Ok(());
    }
    match list.without() {
        Ok(without) => rewrite(path, &without)?,
        Err(source) => {
            let path = path.to_owned();
            return Err(InstallError::List { path, source });
        }
    }
    tracing::info!(path = %path.display(), "the CNI plugin is taken out of the chain");
    Ok(())
}

fn read_text(path: &Path) -> Result<String, InstallError> {
    let mut text = String::new();
    let file = File::open(path).map_err(failed("read", path))?;
    let read = file.take(MAX_CONF_BYTES + 1).read_to_string(&mut text);
    if read.map_err(failed("read", path))? as u64 > MAX_CONF_BYTES {
        let path = path.to_owned();
        return Err(InstallError::TooLong { path });
    }
    Ok(text)
}

/// A configuration keeps its permissions: it may name credentials.
fn rewrite(path: &Path, text: &str) -> Result<(), InstallError> {
    // A link stays one.
    let path = fs::canonicalize(path).map_err(failed("found", path))?;
    let mode = fs::metadata(&path).map_err(failed("read", &path))?.mode();
    replace(&path, text.as_bytes(), mode & 0o777)
}

/// In one step, on disk before it is seen: a runtime reads the old file or the new one. The unfinished one has a name that
/// no runtime reads.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), InstallError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!(".{name}.podveil"));
    let written = (|| {
        // One that an earlier end left behind may have other permissions.
        let _left = fs::remove_file(&unfinished);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    })();
    written.map_err(|source| {
        let _partial = fs::remove_file(&unfinished);
        failed("written", path)(source)
    })
}

/// When the plugin was put into the chain lately.
#[derive(Debug, Default)]
struct Puts(VecDeque<Instant>);

impl Puts {
    fn note(&mut self, now: Instant) {
        self.0.push_back(now);
    }

    fn is_contested(&mut self, now: Instant) -> bool {
        while self
            .0
            .pop_front_if(|at| now.saturating_duration_since(*at) > WINDOW)
            .is_some()
        {}
        self.0.len() > CONTESTED
    }
}

/// Keeps the plugin where it belongs until `stop`: put back whenever the CNI agent has written its configuration anew or
/// another one has come first; out while `unwanted`.
pub async fn keep(
    installation: Installation,
    mut unwanted: watch::Receiver<bool>,
    state: watch::Sender<PluginState>,
    stop: CancellationToken,
) {
    let (notice, mut notices) = mpsc::channel(1);
    let _watcher = watch_folder(&installation.conf_dir, notice.clone());
    let mut look_again = interval(LOOK_AGAIN);
    look_again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut puts = Puts::default();
    let mut contested = false;
    let work = async {
        loop {
            tokio::select! {
                Ok(()) = unwanted.changed() => {}
                () = tokio::time::sleep(CONTESTED_PAUSE), if contested => {}
                Some(()) = notices.recv(), if !contested => tokio::time::sleep(PAUSE).await,
                _ = look_again.tick(), if !contested => {}
            }
            let out = *unwanted.borrow_and_update();
            let installation = installation.clone();
            let work = tokio::task::spawn_blocking(move || match out {
                true => installation.remove().map(|()| false),
                false => installation.put(),
            });
            let ended = work.await;
            // Only what has just been put there again is: an error is tried again like any other.
            contested = false;
            let now = match (ended, out) {
                (Ok(Ok(_)), true) => PluginState::Off,
                (Ok(Ok(put)), false) => {
                    let now = Instant::now();
                    if put {
                        puts.note(now);
                    }
                    // Found standing, it is watched again.
                    contested = put && puts.is_contested(now);
                    match contested {
                        true => PluginState::Missing(InstallError::Contested.to_string().into()),
                        false => PluginState::Installed,
                    }
                }
                (Ok(Err(error)), _) => PluginState::Missing(chain(&error).into()),
                (Err(error), _) => PluginState::Missing(error.to_string().into()),
            };
            state.send_if_modified(|held| {
                let changed = *held != now;
                if let (true, PluginState::Missing(reason)) = (changed, &now) {
                    tracing::warn!(%reason, "the CNI plugin is not as it should be: pods start uncaptured or not at all");
                }
                *held = now;
                changed
            });
        }
    };
    let _stopped: Option<()> = stop.run_until_cancelled(work).await;
}

/// `None` where the kernel takes no more watches: looking again now and then serves.
fn watch_folder(folder: &Path, notice: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Looking makes access events; an error may hide a change.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            // One that waits stands for this one too.
            let _full = notice.try_send(());
        }
    })
    .ok()?;
    watcher
        .watch(folder, notify::RecursiveMode::NonRecursive)
        .ok()?;
    Some(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CILIUM: &str = "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \"type\": \"cilium-cni\"\n    }\n  ]\n}\n";

    fn node() -> (tempfile::TempDir, Installation) {
        let root = tempfile::tempdir().unwrap();
        let of = |name: &str| root.path().join(name);
        for folder in ["bin", "conf"] {
            fs::create_dir(of(folder)).unwrap();
        }
        fs::write(of("podveil-cni"), "program").unwrap();
        let installation = Installation {
            plugin: of("podveil-cni"),
            bin_dir: of("bin"),
            conf_dir: of("conf"),
            settings: Settings {
                socket: "/run/podveil/cni/cni.sock".into(),
                fail_closed: true,
                exempt_namespaces: vec!["kube-system".into()],
            },
        };
        (root, installation)
    }

    fn files(folder: &Path) -> Vec<(String, String)> {
        let mut files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, fs::read_to_string(path).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn the_plugin_stands_in_the_first_list_only_and_leaves_no_trace() {
        let (_root, node) = node();
        assert!(matches!(
            node.put(),
            Err(InstallError::NoConfiguration { .. })
        ));
        let conf = |name: &str| node.conf_dir.join(name);
        let later = r#"{"plugins":[{"type":"ptp"}]}"#;
        fs::write(conf("10-later.conflist"), later).unwrap();
        fs::write(conf("05-cilium.conflist.bak"), "else").unwrap();
        node.put().unwrap();
        let with = |name| ConfList::new(&fs::read_to_string(conf(name)).unwrap()).is_with();
        assert!(with("10-later.conflist"));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let program = node.bin_dir.join(PLUGIN);
        assert_eq!(fs::read_to_string(&program).unwrap(), "program");
        assert_eq!(mode(&program), 0o755);
        // Another agent comes, whose configuration goes first.
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(conf("05-cilium.conflist"))
            .unwrap();
        file.write_all(CILIUM.as_bytes()).unwrap();
        node.put().unwrap();
        assert!(with("05-cilium.conflist") && !with("10-later.conflist"));
        assert_eq!(mode(&conf("05-cilium.conflist")), 0o600);
        // The same again writes nothing.
        let inode = || fs::metadata(conf("05-cilium.conflist")).unwrap().ino();
        let before = inode();
        node.put().unwrap();
        assert_eq!(inode(), before);
        // A new version of the program.
        fs::write(&node.plugin, "newer").unwrap();
        node.put().unwrap();
        assert_eq!(fs::read_to_string(&program).unwrap(), "newer");

        node.remove().unwrap();
        let left = files(&node.conf_dir);
        let all = [
            ("05-cilium.conflist", CILIUM),
            ("05-cilium.conflist.bak", "else"),
            ("10-later.conflist", later),
        ];
        assert_eq!(
            left,
            all.map(|(name, text)| (name.to_owned(), text.to_owned()))
        );
        assert!(files(&node.bin_dir).is_empty());
        node.remove().unwrap();
    }

    #[test]
    fn what_nothing_can_be_chained_in_is_named_and_left_alone() {
        let (_root, node) = node();
        let single = node.conf_dir.join("00-single.conf");
        fs::write(&single, r#"{"type":"ptp"}"#).unwrap();
        assert!(matches!(node.put(), Err(InstallError::NoList { path }) if path == single));
        fs::remove_file(&single).unwrap();
        let list = node.conf_dir.join("00-a.conflist");
        for text in ["", "{", "{\"plugins\":[]}"] {
            fs::write(&list, text).unwrap();
            assert!(
                matches!(node.put(), Err(InstallError::List { .. })),
                "{text}"
            );
            assert_eq!(fs::read_to_string(&list).unwrap(), text);
            node.remove().unwrap();
        }
        fs::write(&list, " ".repeat(MAX_CONF_BYTES as usize + 1)).unwrap();
        assert!(matches!(node.put(), Err(InstallError::TooLong { .. })));
    }

    #[tokio::test]
    async fn with_an_agent_that_takes_it_out_each_time_it_does_not_fight_and_says_why() {
        let (_root, node) = node();
        let path = node.conf_dir.join("05-cilium.conflist");
        fs::write(&path, CILIUM).unwrap();
        let (_unwanted, out) = watch::channel(false);
        let (state, mut seen) = watch::channel(PluginState::Off);
        let stop = CancellationToken::new();
        let keeper = tokio::spawn(keep(node, out, state, stop.clone()));
        let (taken_out, mut times) = watch::channel(0);
        let agent = tokio::spawn(async move {
            loop {
                if ConfList::new(&fs::read_to_string(&path).unwrap()).is_with() {
                    fs::write(&path, CILIUM).unwrap();
                    taken_out.send_modify(|times| *times += 1);
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let contested = PluginState::Missing(InstallError::Contested.to_string().into());
        let bound = Duration::from_secs(30);
        let told = tokio::time::timeout(bound, seen.wait_for(|state| *state == contested));
        drop(told.await.expect("it is contested").unwrap());
        let last = tokio::time::timeout(bound, times.wait_for(|times| *times > CONTESTED));
        drop(last.await.expect("the last is taken out too").unwrap());
        // Its next attempt is not within this.
        let again = tokio::time::timeout(CONTESTED_PAUSE / 2, times.changed()).await;
        assert!(again.is_err(), "it fights");
        agent.abort();
        stop.cancel();
        keeper.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_while_it_is_contested_is_tried_again_as_soon_as_any() {
        let (_root, node) = node();
        let path = node.conf_dir.join("05-cilium.conflist");
        let (_unwanted, out) = watch::channel(false);
        let (state, mut seen) = watch::channel(PluginState::Off);
        let stop = CancellationToken::new();
        let keeper = tokio::spawn(keep(node, out, state, stop.clone()));
        let contested = PluginState::Missing(InstallError::Contested.to_string().into());
        while *seen.borrow_and_update() != contested {
            fs::write(&path, CILIUM).unwrap();
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        fs::write(&path, "{").unwrap();
        seen.wait_for(|state| *state != contested).await.unwrap();
        fs::write(&path, CILIUM).unwrap();
        let mended =
            seen.wait_for(|state| matches!(state, PluginState::Installed) || *state == contested);
        let bound = LOOK_AGAIN + 2 * PAUSE;
        let mended = tokio::time::timeout(bound, mended).await;
        drop(mended.expect("it is tried again").unwrap());
        assert!(ConfList::new(&fs::read_to_string(&path).unwrap()).is_with());
        stop.cancel();
        keeper.await.unwrap();
    }

    #[tokio::test]
    async fn looking_is_no_reason_to_look_again() {
        let (_root, node) = node();
        fs::write(node.conf_dir.join("05-cilium.conflist"), CILIUM).unwrap();
        let (notice, mut notices) = mpsc::channel(1);
        let _watcher = watch_folder(&node.conf_dir, notice).unwrap();
        assert!(node.put().unwrap());
        notices.recv().await.unwrap();
        assert!(!node.put().unwrap(), "nothing was to be done");
        // What this did comes after whatever looking did.
        while tokio::time::timeout(10 * PAUSE, notices.recv())
            .await
            .is_ok()
        {}
        assert!(!node.put().unwrap());
        fs::write(node.bin_dir.join("elsewhere"), "").unwrap();
        let none = tokio::time::timeout(PAUSE, notices.recv()).await;
        assert!(none.is_err(), "it is woken by itself");
    }

    #[test]
    fn what_was_contested_is_not_any_more_when_it_has_stood_for_a_while() {
        let start = Instant::now();
        let mut puts = Puts::default();
        for _ in 0..CONTESTED {
            puts.note(start);
            assert!(!puts.is_contested(start));
        }
        puts.note(start);
        assert!(puts.is_contested(start + WINDOW));
        assert!(!puts.is_contested(start + WINDOW + Duration::from_millis(1)));
    }

    #[tokio::test]
    async fn it_is_put_back_when_the_agent_writes_its_configuration_anew_and_out_when_unwanted() {
        let (_root, node) = node();
        let (unwanted, out) = watch::channel(false);
        let (state, mut seen) = watch::channel(PluginState::Off);
        let stop = CancellationToken::new();
        let keeper = tokio::spawn(keep(node.clone(), out, state, stop.clone()));
        seen.wait_for(|state| matches!(state, PluginState::Missing(_)))
            .await
            .unwrap();
        let path = node.conf_dir.join("05-cilium.conflist");
        let bound = Duration::from_secs(20);
        for _ in 0..2 {
            fs::write(&path, CILIUM).unwrap();
            let chained = async {
                while !ConfList::new(&fs::read_to_string(&path).unwrap()).is_with() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(bound, chained)
                .await
                .expect("it is chained");
        }
        seen.wait_for(|state| *state == PluginState::Installed)
            .await
            .unwrap();
        unwanted.send_replace(true);
        seen.wait_for(|state| *state == PluginState::Off)
            .await
            .unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), CILIUM);
        stop.cancel();
        keeper.await.unwrap();
    }
}
