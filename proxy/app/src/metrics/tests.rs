// SPDX-License-Identifier: Apache-2.0
use super::*;
use crate::testing::{record, workload};
use podveil_flow::{CloseReason, ConnectionRecord, Direction, DropReason, End, Verdict};
use podveil_net::Counters;
use prometheus::{Registry, TextEncoder};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const KEPT: Duration = Duration::from_secs(300);

fn lines(registry: &Registry, start: &str) -> Vec<String> {
    let text = TextEncoder::new()
        .encode_to_string(&registry.gather())
        .unwrap();
    text.lines()
        .filter(|line| line.starts_with(start))
        .map(str::to_owned)
        .collect()
}

fn dropped(reason: DropReason) -> ConnectionRecord {
    ConnectionRecord {
        verdict: Verdict::Dropped {
            reason,
            detail: "denied by shop/deny-all".to_owned(),
        },
        close: CloseReason::Dropped,
        ..record()
    }
}

#[test]
fn the_exported_lines_have_istios_names_and_labels() {
    let registry = Registry::new();
    let traffic = TrafficMetrics::new(&registry, 10, KEPT);
    let counters = traffic.opened(&record());
    let labels = "connection_security_policy=\"mutual_tls\",\
        destination_app=\"web\",\
        destination_canonical_revision=\"v1\",\
        destination_canonical_service=\"web\",\
        destination_cluster=\"Kubernetes\",\
        destination_principal=\"spiffe://cluster.local/ns/shop/sa/web\",\
        destination_service=\"web.shop.svc.cluster.local\",\
        destination_service_name=\"web\",\
        destination_service_namespace=\"shop\",\
        destination_version=\"v1\",\
        destination_workload=\"web\",\
        destination_workload_namespace=\"shop\",\
        reporter=\"source\",\
        request_protocol=\"tcp\",\
        response_flags=\"-\",\
        source_app=\"client\",\
        source_canonical_revision=\"v1\",\
        source_canonical_service=\"client\",\
        source_cluster=\"Kubernetes\",\
        source_principal=\"spiffe://cluster.local/ns/shop/sa/client\",\
        source_version=\"v1\",\
        source_workload=\"client\",\
        source_workload_namespace=\"shop\"";
    assert_eq!(
        lines(&registry, "istio_tcp_connections_opened_total"),
        [format!("istio_tcp_connections_opened_total{{{labels}}} 1")]
    );
    assert_eq!(
        lines(&registry, "istio_tcp_sockets_open"),
        [
            "istio_tcp_sockets_open{reporter=\"destination\"} 0",
            "istio_tcp_sockets_open{reporter=\"source\"} 1",
        ]
    );
    traffic.closed(&record(), &counters);
    for (name, value) in [
        ("istio_tcp_connections_closed_total", 1),
        // These are counted while the connection lives.
        ("istio_tcp_received_bytes_total", 0),
        ("istio_tcp_sent_bytes_total", 0),
    ] {
        assert_eq!(
            lines(&registry, name),
            [format!("{name}{{{labels}}} {value}")]
        );
    }
    assert_eq!(
        lines(&registry, "istio_tcp_sockets_open{reporter=\"source\"}"),
        ["istio_tcp_sockets_open{reporter=\"source\"} 0"]
    );
}

#[test]
fn a_refusal_is_counted_by_its_reason_and_by_istios_flag() {
    let registry = Registry::new();
    let traffic = TrafficMetrics::new(&registry, 10, KEPT);
    traffic.failed(&dropped(DropReason::PolicyDenied));
    let counted = lines(&registry, "podveil_connections_refused_total")
        .into_iter()
        .filter(|line| !line.ends_with(" 0"))
        .collect::<Vec<_>>();
    assert_eq!(
        counted,
        ["podveil_connections_refused_total{reason=\"policy_denied\",reporter=\"source\"} 1"]
    );
    let [failed] = lines(&registry, "istio_tcp_connections_failed_total")
        .try_into()
        .unwrap();
    assert!(failed.contains("response_flags=\"DENY\""), "{failed}");
    assert!(lines(&registry, "istio_tcp_connections_closed_total").is_empty());
}

#[test]
fn a_connection_given_up_while_held_was_never_open() {
    let registry = Registry::new();
    let traffic = TrafficMetrics::new(&registry, 10, KEPT);
    traffic.failed(&ConnectionRecord {
        close: CloseReason::Abandoned,
        ..record()
    });
    assert_eq!(
        lines(&registry, "istio_tcp_sockets_open{reporter=\"source\"}"),
        ["istio_tcp_sockets_open{reporter=\"source\"} 0"]
    );
    assert_eq!(
        lines(&registry, "istio_tcp_connections_failed_total").len(),
        1
    );
}

#[test]
fn an_unknown_peer_is_unknown_in_every_label() {
    let registry = Registry::new();
    let traffic = TrafficMetrics::new(&registry, 10, KEPT);
    let record = ConnectionRecord {
        direction: Direction::Inbound,
        source: End::default(),
        service: None,
        ..record()
    };
    traffic.opened(&record);
    let [line] = lines(&registry, "istio_tcp_connections_opened_total")
        .try_into()
        .unwrap();
    assert_eq!(line.matches("source_").count(), 8);
    assert_eq!(line.matches("=\"unknown\"").count(), 11, "{line}");
}

#[test]
fn series_of_gone_workloads_are_taken_out_after_a_time() {
    let registry = Registry::new();
    let traffic = TrafficMetrics::new(&registry, 10, KEPT);
    let both = ["client", "web"].map(|owner| ("shop".to_owned(), owner.to_owned()));
    let open = traffic.opened(&record());
    let name = "istio_tcp_connections_opened_total";
    let start = Instant::now();
    for time in [KEPT * 2, KEPT * 4] {
        traffic.sweep(start + time, &LiveWorkloads::new());
    }
    assert_eq!(lines(&registry, name).len(), 1, "a connection is open");
    traffic.closed(&record(), &open);
    drop(open);
    // Another connection, to begin anew.
    drop(traffic.opened(&record()));
    traffic.sweep(start + KEPT * 2, &both.clone().into());
    assert_eq!(lines(&registry, name).len(), 1, "both workloads live");
    let only_web: LiveWorkloads = [both[1].clone()].into();
    traffic.sweep(start + KEPT * 3, &only_web);
    assert_eq!(lines(&registry, name).len(), 1, "gone only just now");
    traffic.sweep(start + KEPT * 4, &only_web);
    for name in [
        name,
        "istio_tcp_connections_closed_total",
        "istio_tcp_sent_bytes_total",
        "istio_tcp_received_bytes_total",
    ] {
        assert!(lines(&registry, name).is_empty(), "{name} is left");
    }
}

#[test]
fn past_the_bound_connections_are_counted_without_their_workloads() {
    let registry = Registry::new();
    let traffic = TrafficMetrics::new(&registry, 1, KEPT);
    traffic.opened(&record());
    for owner in ["a", "b", "c"] {
        let destination = crate::testing::end(&workload(owner, owner, "10.244.2.11"), 80);
        traffic.opened(&ConnectionRecord {
            destination,
            ..record()
        });
    }
    let counted = lines(&registry, "istio_tcp_connections_opened_total");
    assert_eq!(counted.len(), 2, "{counted:?}");
    assert!(
        counted
            .iter()
            .any(|line| line.contains("source_workload=\"unknown\"") && line.ends_with(" 3"))
    );
    assert_eq!(
        lines(&registry, "podveil_traffic_series_overflow_total"),
        ["podveil_traffic_series_overflow_total 3"]
    );
}

#[tokio::test]
async fn the_process_is_measured_when_asked() {
    let registry = Registry::new();
    ProcessMetrics::register(&registry);
    for name in [
        "process_open_fds",
        "process_max_fds",
        "process_resident_memory_bytes",
        "tokio_num_workers",
    ] {
        let [line] = lines(&registry, name).try_into().unwrap();
        assert!(!line.ends_with(" 0"), "{line}");
    }
}

#[test]
fn the_build_is_found_where_dashboards_look() {
    let registry = Registry::new();
    NodeMetrics::new(&registry);
    assert_eq!(
        lines(&registry, "istio_build"),
        [format!(
            "istio_build{{component=\"ztunnel\",tag=\"podveil-{}\"}} 1",
            env!("CARGO_PKG_VERSION")
        )]
    );
}

#[test]
fn bytes_are_counted_while_the_connection_lives_and_once() {
    let registry = Registry::new();
    let traffic = TrafficMetrics::new(&registry, 10, KEPT);
    let pod = traffic.pod();
    let carried = Arc::new(Counters::default());
    let id = pod.open(&record(), &carried, traffic.opened(&record()));
    let value = |name: &str| {
        let [line] = lines(&registry, name).try_into().unwrap();
        line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()
    };
    for (received, sent) in [(0, 0), (100, 0), (100, 4096), (150, 5000)] {
        carried.set(received, sent);
        assert_eq!(value("istio_tcp_received_bytes_total"), received);
        assert_eq!(value("istio_tcp_sent_bytes_total"), sent);
        let shown = pod.shown(10);
        assert_eq!(
            (shown[0].received_bytes, shown[0].sent_bytes),
            (received, sent)
        );
    }
    carried.set(151, 5001);
    let counters = pod.close(id).unwrap();
    traffic.closed(&record(), &counters);
    assert!(pod.close(id).is_none());
    assert_eq!(pod.count(), 0);
    assert_eq!(value("istio_tcp_received_bytes_total"), 151);
    assert_eq!(value("istio_tcp_sent_bytes_total"), 5001);
    assert_eq!(value("istio_tcp_connections_closed_total"), 1);
}

#[test]
fn messages_of_the_control_plane_are_counted_under_the_peers_names() {
    let registry = Registry::new();
    XdsMetrics::register(&registry, Arc::default());
    assert_eq!(
        lines(&registry, "istio_xds_message_total"),
        [
            "istio_xds_message_total{url=\"type.googleapis.com/istio.security.Authorization\"} 0",
            "istio_xds_message_total{url=\"type.googleapis.com/istio.workload.Address\"} 0",
            "istio_xds_message_total{url=\"type.googleapis.com/podveil.node.v1.MeshConfig\"} 0",
        ]
    );
    assert_eq!(lines(&registry, "istio_xds_message_bytes_total").len(), 3);
    assert_eq!(
        lines(
            &registry,
            "istio_xds_connection_terminations_total{reason=\"Error\"}"
        ),
        ["istio_xds_connection_terminations_total{reason=\"Error\"} 0"]
    );
}
