// SPDX-License-Identifier: Apache-2.0
use crate::log;
use nix::sys::resource::{Resource, getrlimit};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGauge, Registry};
use tokio::runtime::{Handle, RuntimeMetrics};

/// Descriptors, memory and the runtime, read when someone asks.
pub struct ProcessMetrics {
    open_fds: IntGauge,
    max_fds: IntGauge,
    resident_bytes: IntGauge,
    workers: IntGauge,
    alive_tasks: IntGauge,
    global_queue: IntGauge,
    runtime: RuntimeMetrics,
}

impl std::fmt::Debug for ProcessMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProcessMetrics")
    }
}

impl ProcessMetrics {
    /// # Panics
    /// If called outside the runtime that it reports on.
    pub fn register(registry: &Registry) {
        let gauge = |name: &str, help: &str| {
            IntGauge::new(name, help).expect("a name that Prometheus takes")
        };
        let this = Self {
            open_fds: gauge("process_open_fds", "Descriptors that are open"),
            max_fds: gauge("process_max_fds", "Descriptors that may be open"),
            resident_bytes: gauge("process_resident_memory_bytes", "Memory in use"),
            workers: gauge("tokio_num_workers", "Threads that carry bytes"),
            alive_tasks: gauge("tokio_num_alive_tasks", "Tasks that have not ended"),
            global_queue: gauge("tokio_global_queue_depth", "Tasks that wait for any thread"),
            runtime: Handle::current().metrics(),
        };
        registry.register(Box::new(this)).expect("registered once");
        registry
            .register(Box::new(log::dropped_lines()))
            .expect("registered once");
    }

    fn gauges(&self) -> [&IntGauge; 6] {
        [
            &self.open_fds,
            &self.max_fds,
            &self.resident_bytes,
            &self.workers,
            &self.alive_tasks,
            &self.global_queue,
        ]
    }
}

impl Collector for ProcessMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges()
            .into_iter()
            .flat_map(Collector::desc)
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let set =
            |gauge: &IntGauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        set(&self.open_fds, open_fds());
        set(
            &self.max_fds,
            getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft),
        );
        set(&self.resident_bytes, resident_bytes().unwrap_or(0));
        set(&self.workers, self.runtime.num_workers() as u64);
        set(&self.alive_tasks, self.runtime.num_alive_tasks() as u64);
        set(&self.global_queue, self.runtime.global_queue_depth() as u64);
        self.gauges()
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}

fn open_fds() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64)
}

/// `VmRSS` of proc_pid_status(5), which is in kB.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}
