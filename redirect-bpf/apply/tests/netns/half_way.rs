// SPDX-License-Identifier: Apache-2.0
//! A process that is killed half-way through what it does to a pod, at any step.

use crate::world::{Tested, World};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;

/// Set in the process that is killed.
const VARIABLE: &str = "PODVEIL_TEST_HALF_WAY";
const SIGKILL: i32 = 9;
/// In the place of programs: passes on as many steps as are left, then kills who called. A step is a table of iptables, or a
/// line of ipset.
const SHIM: &str = r#"#!/bin/sh
PATH=${PATH#*:}
here=${0%/*}
name=${0##*/}
case $* in
*restore*) ;;
*) exec "$name" "$@" ;;
esac
case $name in
ipset) end=. ;;
*) end='^COMMIT$' ;;
esac
cat >"$here/input"
left=$(cat "$here/left")
steps=$(grep -c "$end" "$here/input")
if [ "$steps" -ge "$left" ]; then
	awk -v left="$left" -v end="$end" 'left > 0 { print } $0 ~ end { left-- }' "$here/input" | "$name" "$@"
	kill -9 $PPID
	exit
fi
echo $((left - steps)) >"$here/left"
exec "$name" "$@" <"$here/input"
"#;

/// Is this the process to be killed, and what for?
pub fn task() -> Option<String> {
    std::env::var(VARIABLE).ok()
}

pub struct HalfWay {
    programs: PathBuf,
}

impl HalfWay {
    pub fn new() -> Self {
        let programs = std::env::temp_dir().join(format!("podveil-half-{}", std::process::id()));
        fs::create_dir(&programs).unwrap();
        for name in ["xtables-nft-multi", "xtables-legacy-multi", "ipset"] {
            let path = programs.join(name);
            fs::write(&path, SHIM).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { programs }
    }

    /// Runs the test of this name in the pod's namespace with a task, which it is killed in after so many steps; false if
    /// it came to its end.
    pub fn is_killed<B: Tested>(
        &self,
        world: &World<B>,
        test: &str,
        task: &str,
        steps: u32,
    ) -> bool {
        fs::write(self.programs.join("left"), steps.to_string()).unwrap();
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(VARIABLE, task)
            .env("PATH", format!("{}:{path}", self.programs.display()));
        let ended = world.pod.run(|| command.output()).unwrap().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        match ended.status.signal() {
            Some(SIGKILL) => true,
            _ => {
                assert!(
                    ended.status.success() && said.contains("1 passed"),
                    "{said}"
                );
                false
            }
        }
    }
}

impl Drop for HalfWay {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.programs);
    }
}
