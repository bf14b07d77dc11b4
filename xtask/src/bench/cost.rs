// SPDX-License-Identifier: Apache-2.0
use anyhow::Context;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::{SysconfVar, sysconf};

/// Processor time of this process (clients and servers) and the proxies since it was started.
pub struct Cost<'a> {
    proxies: &'a [u32],
    before: f64,
}

impl<'a> Cost<'a> {
    pub fn start(proxies: &'a [u32]) -> anyhow::Result<Self> {
        Ok(Self {
            proxies,
            before: total_milliseconds(proxies)?,
        })
    }

    pub fn milliseconds(&self) -> anyhow::Result<f64> {
        Ok(total_milliseconds(self.proxies)? - self.before)
    }
}

fn total_milliseconds(proxies: &[u32]) -> anyhow::Result<f64> {
    let own = getrusage(UsageWho::RUSAGE_SELF)?;
    let mut total =
        (own.user_time().num_microseconds() + own.system_time().num_microseconds()) as f64 / 1000.0;
    let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the system has no clock tick")? as f64;
    for pid in proxies {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .context("a strange stat file")?
            .1
            .split_whitespace()
            .collect();
        let field = |at: usize| -> anyhow::Result<f64> {
            Ok(fields.get(at).context("a short stat file")?.parse()?)
        };
        // utime and stime, counted from the state field that follows the name.
        total += (field(11)? + field(12)?) / ticks * 1000.0;
    }
    Ok(total)
}

/// Resident memory of the proxies together.
pub fn resident_bytes(proxies: &[u32]) -> anyhow::Result<u64> {
    let page =
        u64::try_from(sysconf(SysconfVar::PAGE_SIZE)?.context("the system has no page size")?)?;
    proxies.iter().try_fold(0, |sum, pid| {
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
        let pages: u64 = statm
            .split_whitespace()
            .nth(1)
            .context("a short statm file")?
            .parse()?;
        Ok(sum + pages * page)
    })
}
