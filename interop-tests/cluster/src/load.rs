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

/// What became of the requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    pub total: u64,
    pub failed: u64,
    /// The longest time between the ends of two requests that were served.
    pub longest_gap: Duration,
}

/// Asks the URLs that are its arguments, in turn, until the stop file is there; notes when each was served.
const SCRIPT: &str =
    "rm -f /tmp/stop; total=0; failed=0; echo 0 >/tmp/total; : >/tmp/errors; : >/tmp/served
while [ ! -e /tmp/stop ]; do
    for url; do
        total=$((total + 1))
        if curl -sS --fail --max-time 10 --output /dev/null \"$url\" 2>>/tmp/errors; then
            date +%s%3N >>/tmp/served
        else
            failed=$((failed + 1))
        fi
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
        let (served, said) = self.end()?;
        ensure!(
            served.failed == 0,
            "requests, failures, last errors: {said}"
        );
        Ok(format!("{} requests", served.total))
    }

    /// Ends it where requests may have failed.
    ///
    /// # Errors
    /// If it was no load, or the pod cannot be entered.
    pub fn measure(self) -> anyhow::Result<Served> {
        Ok(self.end()?.0)
    }

    fn end(self) -> anyhow::Result<(Served, String)> {
        self.wait_for(SOME)?;
        let exec = |command: &[&str]| self.cluster.exec(&self.namespace, &self.pod, command);
        exec(&["touch", "/tmp/stop"])?;
        let said = self
            .worker
            .join()
            .map_err(|_| anyhow::anyhow!("the load panicked"))??;
        let times = exec(&["cat", "/tmp/served"])?;
        let times: Vec<u64> = times.lines().filter_map(|line| line.parse().ok()).collect();
        let mut words = said.split_whitespace().map(str::parse);
        let (Some(Ok(total)), Some(Ok(failed))) = (words.next(), words.next()) else {
            anyhow::bail!("the load says {said:?}");
        };
        ensure!(total > 0, "there was no request at all");
        let gap = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
        let served = Served {
            total,
            failed,
            longest_gap: Duration::from_millis(gap.max().unwrap_or_default()),
        };
        Ok((served, said))
    }
}
