// SPDX-License-Identifier: Apache-2.0
use podveil_flow::{CloseReason, ConnectionRecord, Direction, Protection, Verdict};
use std::borrow::Cow;
use tracing::Level;

/// Emits one event with the fields that peers' access logs have, in their order, and then ours.
macro_rules! line {
    ($level:expr, $record:expr, $error:expr, $message:literal) => {{
        let record: &ConnectionRecord = $record;
        let (source, destination) = (&record.source, &record.destination);
        // With a tunnel the peer's address is the tunnel's, and what it carries stands beside it.
        let address = record.hbone.or(destination.address);
        let inside = record.hbone.and(destination.address);
        let service = record.service.as_ref().map(|key| &*key.hostname);
        let (sent, received) = bytes(record);
        let tls = tls(record);
        tracing::event!(
            target: "access",
            parent: None,
            $level,
            src.addr = source.address.map(display),
            src.workload = source.workload.as_ref().map(|workload| &*workload.name),
            src.namespace = source.workload.as_ref().map(|workload| workload.namespace().as_str()),
            src.identity = source.identity.as_ref().map(ToString::to_string),
            src.cluster = source.workload.as_ref().map(|workload| &*workload.cluster),
            dst.addr = address.map(display),
            dst.hbone_addr = inside.map(display),
            dst.service = service,
            dst.workload = destination.workload.as_ref().map(|workload| &*workload.name),
            dst.namespace = destination.workload.as_ref().map(|workload| workload.namespace().as_str()),
            dst.identity = destination.identity.as_ref().map(ToString::to_string),
            dst.cluster = destination.workload.as_ref().map(|workload| &*workload.cluster),
            direction = direction(record.direction),
            bytes_sent = sent,
            bytes_recv = received,
            duration = format!("{}ms", record.duration.as_millis()),
            error = $error,
            security = if tls.is_some() { "mutual_tls" } else { "plain" },
            tls.cipher = tls.map(|(cipher, _)| cipher),
            tls.key_exchange = tls.map(|(_, key_exchange)| key_exchange),
            rule = rule(record),
            reason = reason(record),
            close = record.close.label(),
            $message
        )
    }};
}

/// Both sides can tell the moment at which bytes may flow; only for those who debug.
pub fn opened(record: &ConnectionRecord) {
    line!(Level::DEBUG, record, None::<&str>, "connection opened");
}

/// One line at the end of each connection.
pub fn closed(record: &ConnectionRecord) {
    let error = error(record);
    let error = error.as_deref();
    let known = record.source.workload.is_some() && record.destination.workload.is_some();
    match &record.verdict {
        Verdict::Dropped { .. } if !known => {
            line!(Level::WARN, record, error, "connection failed");
        }
        Verdict::Allowed { .. } if error.is_none() => {
            line!(Level::INFO, record, error, "connection complete");
        }
        _ => line!(Level::ERROR, record, error, "connection complete"),
    }
}

fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "inbound",
        Direction::Outbound => "outbound",
    }
}

/// Sent and received as the workload that this proxy serves sees them.
fn bytes(record: &ConnectionRecord) -> (u64, u64) {
    match record.direction {
        Direction::Inbound => (record.sent_bytes, record.received_bytes),
        Direction::Outbound => (record.received_bytes, record.sent_bytes),
    }
}

fn tls(record: &ConnectionRecord) -> Option<(&'static str, &'static str)> {
    match record.protection {
        Protection::MutualTls {
            cipher,
            key_exchange,
        } => Some((cipher, key_exchange)),
        Protection::Plain => None,
    }
}

fn rule(record: &ConnectionRecord) -> Option<&str> {
    match &record.verdict {
        Verdict::Allowed { rule } => rule.as_deref(),
        Verdict::Dropped { .. } => None,
    }
}

fn reason(record: &ConnectionRecord) -> Option<&'static str> {
    match record.verdict {
        Verdict::Allowed { .. } => None,
        Verdict::Dropped { reason, .. } => Some(reason.label()),
    }
}

/// What went wrong, for a person; nothing if nothing did.
fn error(record: &ConnectionRecord) -> Option<Cow<'_, str>> {
    if let Verdict::Dropped { detail, .. } = &record.verdict {
        return Some(Cow::Borrowed(detail));
    }
    let text = match record.close {
        CloseReason::Abandoned => "the source gave up before the destination was reached",
        CloseReason::Clean => return None,
        CloseReason::Dropped => "refused",
        CloseReason::Drained => "closed because the proxy stopped",
        CloseReason::PolicyChanged => "closed because policy or mode no longer permits it",
        CloseReason::ResetByDestination => "reset by the destination",
        CloseReason::ResetBySource => "reset by the source",
        CloseReason::TunnelLost => "the tunnel was lost",
        CloseReason::WorkloadGone => "closed because the workload is gone",
    };
    Some(Cow::Borrowed(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::tests::capture;
    use crate::testing::record;
    use podveil_flow::{DropReason, End};
    use podveil_program::LogFormat;

    #[test]
    fn a_text_line_has_the_peers_fields_in_their_order() {
        assert_eq!(
            capture(LogFormat::Plain, || closed(&record())),
            "2026-01-02T03:04:05.678901Z\tinfo\taccess\tconnection complete\t\
            src.addr=10.244.1.10:40000 src.workload=\"client-1\" src.namespace=\"shop\" \
            src.identity=\"spiffe://cluster.local/ns/shop/sa/client\" src.cluster=\"Kubernetes\" \
            dst.addr=10.244.2.10:15008 dst.hbone_addr=10.244.2.10:8080 \
            dst.service=\"web.shop.svc.cluster.local\" dst.workload=\"web-1\" dst.namespace=\"shop\" \
            dst.identity=\"spiffe://cluster.local/ns/shop/sa/web\" dst.cluster=\"Kubernetes\" \
            direction=\"outbound\" bytes_sent=120 bytes_recv=4096 duration=\"7ms\" \
            security=\"mutual_tls\" tls.cipher=\"TLS13_AES_256_GCM_SHA384\" tls.key_exchange=\"X25519MLKEM768\" \
            rule=\"shop/allow-client#0\" close=\"clean\"\n"
        );
    }

    #[test]
    fn a_json_line_is_one_object_with_the_same_names() {
        let line = capture(LogFormat::Json, || closed(&record()));
        assert!(
            line.starts_with(
                "{\"level\":\"info\",\"time\":\"2026-01-02T03:04:05.678901Z\",\"scope\":\"access\",\
                \"message\":\"connection complete\",\"src.addr\":\"10.244.1.10:40000\""
            ),
            "{line}"
        );
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["bytes_recv"], 4096);
        assert_eq!(object["dst.hbone_addr"], "10.244.2.10:8080");
        assert_eq!(object.get("error"), None);
    }

    #[test]
    fn a_refusal_names_its_reason() {
        let refused = ConnectionRecord {
            direction: Direction::Inbound,
            source: End {
                address: Some("10.9.9.9:1".parse().unwrap()),
                ..End::default()
            },
            hbone: None,
            protection: Protection::Plain,
            verdict: Verdict::Dropped {
                reason: DropReason::PlaintextStrict,
                detail: "plain \"text\" is refused: the mode is strict".to_owned(),
            },
            close: CloseReason::Dropped,
            ..record()
        };
        let line = capture(LogFormat::Plain, || closed(&refused));
        assert!(
            line.contains(
                "\twarn\taccess\tconnection failed\tsrc.addr=10.9.9.9:1 dst.addr=10.244.2.10:8080 "
            ),
            "{line}"
        );
        assert!(line.contains(" error=\"plain \\\"text\\\" is refused: the mode is strict\" security=\"plain\" reason=\"plaintext_strict\" close=\"dropped\"\n"), "{line}");
    }
}
