// SPDX-License-Identifier: Apache-2.0
use crate::Cluster;
use anyhow::{Context, ensure};
use podveil_sim::eventually;
use std::thread::JoinHandle;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
/// Requests before and after whatever happens under load.
const SOME: u64 = 20;

/// Requests from a pod, one after the other, each on a connection of its own, until it is finished.
#[derive(Debug)]
pub struct Load<'a> {
    cluster: &'a Cluster,
    namespace: String,
    pod: String,
    worker: JoinHandle<anyhow::Result<String>>,
}

/// Asks the URLs that are its arguments, in turn, until the stop file is there.
const SCRIPT: &str = "rm -f /tmp/stop; total=0; failed=0; echo 0 >/tmp/total; : >/tmp/errors
while [ ! -e /tmp/stop ]; do
    for url; do
        total=$((total + 1))
        curl -sS --fail --max-time 10 --output /dev/null \"$url\" 2>>/tmp/errors || failed=$((failed + 1))
        echo $total >/tmp/total
    done
done
echo $total $failed $(tail -n 3 /tmp/errors)";

impl<'a> Load<'a> {
    /// # Errors
    /// If the pod cannot be entered.
    pub fn start(
        cluster: &'a Cluster,
        namespace: &str,
        pod: &str,
        urls: &[&str],
    ) -> anyhow::Result<Self> {
        cluster.exec(
            namespace,
            pod,
            &["sh", "-c", "mkdir -p /tmp; rm -f /tmp/total"],
        )?;
        let kubectl = cluster.kubectl_command()?;
        let mut exec = vec![
            format!("--namespace={namespace}"),
            "exec".to_owned(),
            pod.to_owned(),
            "--".to_owned(),
        ];
        exec.extend(["sh", "-c", SCRIPT, "sh"].map(str::to_owned));
        exec.extend(urls.iter().map(|url| (*url).to_owned()));
        let worker = std::thread::spawn(move || {
            let (program, arguments) = kubectl.split_first().context("a command has a name")?;
            podveil_sim::run(program, arguments.iter().chain(&exec))
        });
        let load = Self {
            cluster,
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            worker,
        };
        load.wait_for(SOME)?;
        Ok(load)
    }

    /// Waits until this many requests more have been made: whatever is done meanwhile lies between requests.
    fn wait_for(&self, more: u64) -> anyhow::Result<()> {
        let total = || -> anyhow::Result<u64> {
            let said = self
                .cluster
                .exec(&self.namespace, &self.pod, &["cat", "/tmp/total"])?;
            Ok(said.trim().parse()?)
        };
        let before = total().unwrap_or(0);
        eventually(PATIENCE, "requests are made", || {
            let now = total()?;
            ensure!(now >= before + more, "{now} requests, {before} before");
            Ok(())
        })
    }

    /// Ends it; returns how many requests there were.
    ///
    /// # Errors
    /// If one has failed, with the last that curl said.
    pub fn finish(self) -> anyhow::Result<String> {
        self.wait_for(SOME)?;
        self.cluster
            .exec(&self.namespace, &self.pod, &["touch", "/tmp/stop"])?;
        let said = self
            .worker
            .join()
            .map_err(|_| anyhow::anyhow!("the load panicked"))??;
        let mut words = said.split_whitespace();
        let (total, failed) = (words.next(), words.next());
        ensure!(
            failed == Some("0"),
            "requests, failures, last errors: {said}"
        );
        ensure!(total != Some("0"), "there was no request at all");
        Ok(format!("{} requests", total.unwrap_or_default()))
    }
}
