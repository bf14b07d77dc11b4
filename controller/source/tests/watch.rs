// SPDX-License-Identifier: Apache-2.0
//! What a change on disk does, and what a broken one does not.

use podveil_source::{Defaults, FileSource, LoadError, load};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Far above what any step takes; reached only when a state never comes.
const DEADLINE: Duration = Duration::from_secs(10);

struct Fixture {
    directory: tempfile::TempDir,
    source: FileSource,
    _stop: DropGuard,
}

impl Fixture {
    fn file(content: &str) -> Self {
        Self::start(content, |directory| directory.join("cluster.yaml"))
    }

    fn directory(content: &str) -> Self {
        Self::start(content, |directory| directory)
    }

    fn start(content: &str, watched: impl FnOnce(PathBuf) -> PathBuf) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("cluster.yaml"), content).unwrap();
        let stop = CancellationToken::new();
        let path = watched(directory.path().to_owned());
        let source = FileSource::start(&path, Defaults::default(), stop.clone()).unwrap();
        Self {
            directory,
            source,
            _stop: stop.drop_guard(),
        }
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.directory.path().join(name), content).unwrap();
    }

    async fn until_nodes(&self, nodes: usize) -> u64 {
        let mut cluster = self.source.cluster();
        let reached = cluster.wait_for(|cluster| cluster.nodes.len() == nodes);
        let cluster = tokio::time::timeout(DEADLINE, reached)
            .await
            .unwrap()
            .unwrap();
        cluster.version
    }

    async fn until_error(&self, broken: bool) -> Option<String> {
        let mut status = self.source.status();
        let reached = status.wait_for(|status| status.error.is_some() == broken);
        let status = tokio::time::timeout(DEADLINE, reached)
            .await
            .unwrap()
            .unwrap();
        status.error.as_ref().map(ToString::to_string)
    }
}

#[tokio::test]
async fn a_change_is_taken_at_once() {
    let fixture = Fixture::file("trustDomain: td\nnodes: [{name: n1}]\n");
    let before = fixture.until_nodes(1).await;
    let started = Instant::now();
    fixture.write(
        "cluster.yaml",
        "trustDomain: td\nnodes: [{name: n1}, {name: n2}]\n",
    );
    let after = fixture.until_nodes(2).await;
    assert!(after > before);
    // Fifty milliseconds are what is promised; a loaded test machine may take more, but not another order.
    assert!(
        started.elapsed() < Duration::from_millis(500),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn a_file_replaced_by_rename_is_taken() {
    let fixture = Fixture::file("trustDomain: td\n");
    fixture.write("new.tmp", "trustDomain: td\nnodes: [{name: n1}]\n");
    let directory = fixture.directory.path();
    std::fs::rename(directory.join("new.tmp"), directory.join("cluster.yaml")).unwrap();
    fixture.until_nodes(1).await;
}

#[tokio::test]
async fn a_broken_file_keeps_the_last_good_state_and_names_the_line() {
    let fixture = Fixture::file("trustDomain: td\nnodes: [{name: n1}]\n");
    fixture.write(
        "cluster.yaml",
        "trustDomain: td\nnodes:\n- name: n1\n- nam: n2\n",
    );
    let error = fixture.until_error(true).await.unwrap();
    assert!(error.contains("cluster.yaml:4:"), "{error}");
    assert_eq!(fixture.source.cluster().borrow().nodes.len(), 1);

    fixture.write(
        "cluster.yaml",
        "trustDomain: td\nnodes: [{name: n1}, {name: n2}]\n",
    );
    fixture.until_nodes(2).await;
    fixture.until_error(false).await;
}

#[tokio::test]
async fn a_removed_file_keeps_the_last_good_state() {
    let fixture = Fixture::file("trustDomain: td\nnodes: [{name: n1}]\n");
    std::fs::remove_file(fixture.directory.path().join("cluster.yaml")).unwrap();
    fixture.until_error(true).await;
    assert_eq!(fixture.source.cluster().borrow().nodes.len(), 1);
}

#[tokio::test]
async fn files_come_and_go_in_a_directory() {
    let fixture = Fixture::directory("trustDomain: td\nnodes: [{name: n1}]\n");
    fixture.write("more.yaml", "nodes: [{name: n2}]\n");
    let before = fixture.until_nodes(2).await;
    fixture.write("not-read.txt", "nodes: [{name: n3}]\n");
    std::fs::remove_file(fixture.directory.path().join("more.yaml")).unwrap();
    assert!(fixture.until_nodes(1).await > before);
}

#[tokio::test]
async fn what_changes_nothing_wakes_nobody() {
    let fixture = Fixture::directory("trustDomain: td\nnodes: [{name: n1}]\n");
    let mut cluster = fixture.source.cluster();
    cluster.mark_unchanged();
    fixture.write(
        "cluster.yaml",
        "# a comment\ntrustDomain: td\nnodes: [{name: n1}]\n",
    );
    // A fault after it shows that the comment has been read.
    fixture.write("fault.yaml", "x: y\n");
    fixture.until_error(true).await;
    assert!(!cluster.has_changed().unwrap());
}

#[test]
fn a_first_reading_that_fails_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(
        load(directory.path()),
        Err(LoadError::Empty { .. })
    ));
    assert!(matches!(
        load(&directory.path().join("absent.yaml")),
        Err(LoadError::Read { .. })
    ));
}
