// SPDX-License-Identifier: Apache-2.0
//! Records for the tests of metrics and the access log.

use podveil_flow::{CloseReason, ConnectionRecord, Direction, End, Protection, Verdict};
use podveil_identity::{TrustDomain, WorkloadIdentity};
use podveil_model::{Epoch, Health, Mode, ServiceKey, Stage, Uid, Workload};
use std::sync::Arc;
use std::time::Duration;

pub fn workload(name: &str, owner: &str, address: &str) -> Arc<Workload> {
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    Arc::new(Workload {
        uid: Uid::from(name),
        name: name.into(),
        identity: WorkloadIdentity::new(trust_domain, "shop", owner).unwrap(),
        addresses: vec![address.parse().unwrap()],
        node: "n1".parse().unwrap(),
        health: Health::Healthy,
        host_network: false,
        stage: Stage::Mandatory,
        epoch: Epoch::default(),
        mode: Mode::Permissive,
        workload_name: owner.into(),
        canonical_name: owner.into(),
        canonical_revision: "v1".into(),
        cluster: "Kubernetes".into(),
        services: Default::default(),
        policies: Default::default(),
        exclude_outbound_ports: Default::default(),
        exclude_inbound_ports: Default::default(),
        plain_inbound_ports: Default::default(),
        node_uid: None,
        probe_ports: Default::default(),
        host_ports: Default::default(),
        locality: Default::default(),
        external: Default::default(),
        capacity: 1,
    })
}

pub fn end(workload: &Arc<Workload>, port: u16) -> End {
    End {
        address: Some((workload.addresses[0], port).into()),
        workload: Some(workload.clone()),
        identity: Some(workload.identity.clone()),
    }
}

/// An encrypted connection from `client-1` to `web-1`, as the client's proxy sees it.
pub fn record() -> ConnectionRecord {
    let destination = end(&workload("web-1", "web", "10.244.2.10"), 8080);
    ConnectionRecord {
        direction: Direction::Outbound,
        source: end(&workload("client-1", "client", "10.244.1.10"), 40000),
        hbone: Some("10.244.2.10:15008".parse().unwrap()),
        destination,
        service: Some(ServiceKey {
            namespace: "shop".parse().unwrap(),
            hostname: "web.shop.svc.cluster.local".into(),
        }),
        protection: Protection::MutualTls {
            cipher: "TLS13_AES_256_GCM_SHA384",
            key_exchange: "X25519MLKEM768",
        },
        verdict: Verdict::Allowed {
            rule: Some("shop/allow-client#0".to_owned()),
        },
        close: CloseReason::Clean,
        received_bytes: 120,
        sent_bytes: 4096,
        duration: Duration::from_millis(7),
    }
}
