// SPDX-License-Identifier: Apache-2.0
//! Which connections may go out in plain: a pure function of the state, asked by the path of each connection and by
//! whoever explains what would become of one.

use podveil_model::{Answer, External, Mode, OriginalDst, PlainReason, Workload};
use podveil_state::View;
use std::net::{IpAddr, SocketAddr};

/// Why a connection may not go out in plain.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PlainRefused {
    #[error("{destination} is outside the cluster, and this workload refuses such addresses")]
    External { destination: SocketAddr },
    #[error("{destination} is not enrolled, and this workload is strict")]
    Strict { destination: SocketAddr },
}

/// May `source` send in plain where `answer` says plain? Of a service what was dialled may be listed, or all that the
/// answer offers, by address or by namespace. An answer that is not plain is not looked at.
///
/// # Errors
/// [`PlainRefused`], with the rule.
pub fn check_plain(
    view: &View,
    source: &Workload,
    destination: OriginalDst,
    answer: &Answer,
) -> Result<(), PlainRefused> {
    let listed = |ip| is_listed_as_plain(view, ip);
    let allowed = match answer {
        // Left out of capture by its own ports: the other end wants it so.
        Answer::Enrolled(_)
        | Answer::NotKnown(_)
        | Answer::Plain {
            reason: PlainReason::PortExcluded,
            ..
        } => true,
        Answer::Plain {
            reason: PlainReason::NotEnrolled,
            upstreams,
        } => {
            source.mode == Mode::Permissive
                || listed(destination.ip())
                || upstreams.iter().all(|one| {
                    listed(one.address.ip()) || is_in_listed_namespace(view, &one.workload)
                })
        }
        Answer::Outside => source.external == External::Allow || listed(destination.ip()),
    };
    let destination = destination.0;
    match answer {
        _ if allowed => Ok(()),
        Answer::Outside => Err(PlainRefused::External { destination }),
        _ => Err(PlainRefused::Strict { destination }),
    }
}

fn is_in_listed_namespace(view: &View, workload: &Workload) -> bool {
    view.mesh().is_some_and(|mesh| {
        let listed = &mesh.plain_outbound_namespaces;
        listed.contains(workload.namespace())
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
        mesh.plain_outbound_namespaces = ["monitoring".parse().unwrap()].into();
        view.insert_mesh(mesh.into());
        view.set_synced();
        let plain = |name, ip| workload(name).address(ip).stage(Stage::None);
        view.insert_workload(plain("dns", "10.0.0.53").build());
        view.insert_workload(plain("legacy", "10.0.0.9").build());
        let metrics = plain("metrics", "10.0.0.8").identity("monitoring", "default");
        view.insert_workload(metrics.build());
        view.insert_workload(workload("web").address("10.0.0.2").build());
        let source = |mode| workload("us").address("10.0.0.1").mode(mode).build();
        for (mode, to, allowed) in [
            (Mode::Permissive, "10.0.0.9:80", true),
            (Mode::Strict, "10.0.0.9:80", false),
            (Mode::Strict, "10.0.0.8:80", true),
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

    #[test]
    fn a_workload_that_refuses_external_addresses_reaches_only_what_is_listed_of_them() {
        let mut view = View::default();
        let mut mesh = mesh();
        mesh.plain_outbound_ranges = vec!["192.0.2.1/32".parse().unwrap()];
        view.insert_mesh(mesh.into());
        view.set_synced();
        view.insert_workload(
            workload("legacy")
                .address("10.0.0.9")
                .stage(Stage::None)
                .build(),
        );
        let allows = workload("us").address("10.0.0.1").build();
        let refuses = workload("us").address("10.0.0.1").refuse_external().build();
        for (source, to, expected) in [
            (&allows, "1.1.1.1:443", Ok(())),
            (
                &refuses,
                "1.1.1.1:443",
                Err(PlainRefused::External {
                    destination: "1.1.1.1:443".parse().unwrap(),
                }),
            ),
            (&refuses, "192.0.2.1:443", Ok(())),
            (&refuses, "10.0.0.9:80", Ok(())),
        ] {
            let to = OriginalDst(to.parse().unwrap());
            let answer = view.resolve(source, to);
            assert_eq!(check_plain(&view, source, to, &answer), expected, "{to}");
        }
    }
}
