// SPDX-License-Identifier: Apache-2.0
//! `docs/podveilctl.md` from the command line's own help: the page cannot say what the tool does not do.

use clap::Command;
use std::fmt::Write;

const HEAD: &str = "\
# podveilctl

Generated from the help texts by `podveilctl docs > docs/podveilctl.md`; change those, not this page.

On a cluster the tool goes the ways that kubectl goes: it reads the kubeconfig, finds Podveil's pods by their
ServiceAccounts, asks their loopback pages through the API's port-forward, and the CA through the API's exec. Nothing of
Podveil is exposed for it. Whoever uses it needs, in Podveil's namespace: `list` on `pods`, `get` on `leases`
(coordination.k8s.io), `get` and `create` on `pods/portforward`, and for what the CA says or does the same on `pods/exec`.
Without the last one the other commands show the rest and say what is missing.

As a kubectl plugin it is the same file under another name: `ln -s $(which podveilctl) /usr/local/bin/kubectl-podveil`, then
`kubectl podveil status`.

`-o json` gives every answer as one JSON document on standard output. Errors are on standard error, and say what could not be
done, why, and what to try; progress is there too, on a terminal only.
";

/// The whole page.
pub fn page(command: &Command) -> String {
    let mut page = HEAD.to_owned();
    let _ = write!(page, "\n## Exit codes\n\n| code | meaning |\n|---|---|\n");
    for line in super::EXIT_CODES.lines().skip(1) {
        if let Some((code, meaning)) = line.trim().split_once("  ") {
            let _ = writeln!(page, "| {code} | {meaning} |");
        }
    }
    let mut command = command.clone().bin_name("podveilctl").term_width(100);
    command.build();
    sections(&mut page, &command);
    page
}

fn sections(page: &mut String, command: &Command) {
    for one in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        if one.get_name() == "help" {
            continue;
        }
        if one.has_subcommands() {
            sections(page, one);
            continue;
        }
        let name = one.get_bin_name().unwrap_or(one.get_name());
        let help = one.clone().term_width(100).render_long_help().to_string();
        let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
        let _ = write!(
            page,
            "\n## {name}\n\n```text\n{}\n```\n",
            lines.join("\n").trim()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arguments;
    use clap::CommandFactory;

    #[test]
    fn the_page_is_what_the_tool_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/podveilctl.md");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == page(&Arguments::command()),
            "docs/podveilctl.md is not what the tool says: `podveilctl docs > docs/podveilctl.md`"
        );
    }
}
