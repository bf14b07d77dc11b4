// SPDX-License-Identifier: Apache-2.0
//! Which connections may go out in plain: a pure function of the state, asked by the path of each connection and by
//! whoever explains what would become of one.

use podveil_model::{Answer, Mode, OriginalDst, PlainReason, Workload};
use podveil_state::View;
use std::net::{IpAddr, SocketAddr};

/// Why a connection may not go out in plain.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PlainRefused {
    #[error("{destination} is not enrolled, and this workload is strict")]
    Strict { destination: SocketAddr },
}

/// May `source` send in plain where `answer` says plain? Of a service what was dialled may be listed, or all that the
/// answer offers. An answer that is not plain is not looked at.
///
/// # Errors
/// [`PlainRefused`], with the rule.
pub fn check_plain(
    view: &View,
    source: &Workload,
    destination: OriginalDst,
    answer: &Answer,
) -> Result<(), PlainRefused> {
    let Answer::Plain {
        reason: PlainReason::NotEnrolled,
        upstreams,
    } = answer
    else {
        return Ok(());
    };
    let listed = |ip| is_listed_as_plain(view, ip);
    if source.mode == Mode::Permissive
        || listed(destination.ip())
        || upstreams.iter().all(|one| listed(one.address.ip()))
    {
        return Ok(());
    }
    Err(PlainRefused::Strict {
        destination: destination.0,
    })
}

fn is_listed_as_plain(view: &View, ip: IpAddr) -> bool {
    view.mesh().is_some_and(|mesh| {
        let mut ranges = mesh.plain_outbound_ranges.iter();
        ranges.any(|range| range.contains(&ip))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_model::Stage;
    use podveil_testing::{mesh, workload};

    #[test]
    fn a_strict_workload_sends_in_plain_only_to_what_is_listed() {
        let mut view = View::default();
        let mut mesh = mesh();
        mesh.plain_outbound_ranges = vec!["10.0.0.53/32".parse().unwrap()];
        view.insert_mesh(mesh.into());
        let plain = |name, ip| workload(name).address(ip).stage(Stage::None).build();
        view.insert_workload(plain("dns", "10.0.0.53"));
        view.insert_workload(plain("legacy", "10.0.0.9"));
        view.insert_workload(workload("web").address("10.0.0.2").build());
        let source = |mode| workload("us").address("10.0.0.1").mode(mode).build();
        for (mode, to, allowed) in [
            (Mode::Permissive, "10.0.0.9:80", true),
            (Mode::Strict, "10.0.0.9:80", false),
            (Mode::Strict, "10.0.0.53:53", true),
            (Mode::Strict, "10.0.0.2:80", true),
            (Mode::Strict, "1.1.1.1:443", true),
        ] {
            let (source, to) = (source(mode), OriginalDst(to.parse().unwrap()));
            let answer = view.resolve(&source, to);
            let checked = check_plain(&view, &source, to, &answer);
            assert_eq!(checked.is_ok(), allowed, "{mode:?} to {to}");
        }
    }
}
