// SPDX-License-Identifier: Apache-2.0
//! The objects, of the size that real ones have: a pod of a Deployment with two containers is about 8 KiB once the API
//! server has added its own.

use crate::size::{Size, node_address, node_range};
use serde_json::{Value, json};

/// As the controller that makes slices does it.
const ENDPOINTS_OF_SLICE: usize = 100;
pub(crate) const CREATED: &str = "2026-01-01T00:00:00Z";

pub(crate) fn node_name(node: usize) -> String {
    format!("node-{node}")
}

pub(crate) fn app(service: usize) -> String {
    format!("app-{service}")
}

pub(crate) fn pod_name(size: &Size, pod: usize) -> String {
    format!("{}-7d9f8b6c54-{pod}", app(size.service_of(pod)))
}

pub(crate) fn namespace(name: &str) -> Value {
    json!({ "metadata": { "name": name, "labels": { "io.cilium/mtls-enabled": "true" } } })
}

pub(crate) fn node(node: usize) -> Value {
    let zone = format!("zone-{}", node % 3);
    json!({
        "metadata": {
            "name": node_name(node),
            "labels": {
                "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "kubernetes.io/hostname": node_name(node),
                "node.kubernetes.io/instance-type": "m5.4xlarge",
                "topology.kubernetes.io/region": "region-1", "topology.kubernetes.io/zone": zone,
            },
        },
        "spec": { "podCIDR": format!("{}/24", node_range(node)), "podCIDRs": [format!("{}/24", node_range(node))] },
        "status": {
            "addresses": [
                { "type": "InternalIP", "address": node_address(node) },
                { "type": "Hostname", "address": node_name(node) },
            ],
            "capacity": { "cpu": "16", "memory": "64Gi", "pods": "110" },
            "allocatable": { "cpu": "15", "memory": "60Gi", "pods": "110" },
            "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady",
                "lastHeartbeatTime": CREATED, "lastTransitionTime": CREATED }],
        },
    })
}

pub(crate) fn service_account(service: usize) -> Value {
    json!({ "metadata": { "name": app(service) } })
}

pub(crate) fn service(service: usize) -> Value {
    json!({
        "metadata": { "name": app(service), "labels": { "app": app(service) } },
        "spec": {
            "selector": { "app": app(service) },
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }],
        },
    })
}

pub(crate) fn pod(size: &Size, pod: usize) -> Value {
    let app = app(size.service_of(pod));
    let container = |name: &str, port: u16| {
        json!({
            "name": name,
            "image": format!("registry.example.com/team/{name}:v1.42.0"),
            "args": ["--config=/etc/app/config.yaml", "--log-level=info"],
            "ports": [{ "name": name, "containerPort": port }],
            "env": (0..8).map(|at| json!({ "name": format!("SETTING_{at}"), "value": format!("the value of setting {at}") }))
                .collect::<Vec<_>>(),
            "resources": { "requests": { "cpu": "100m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
            "readinessProbe": { "httpGet": { "path": "/ready", "port": name }, "periodSeconds": 10 },
            "livenessProbe": { "httpGet": { "path": "/live", "port": name }, "periodSeconds": 10 },
            "volumeMounts": [{ "name": "config", "mountPath": "/etc/app" }],
        })
    };
    json!({
        "metadata": {
            "name": pod_name(size, pod),
            "labels": { "app": app, "pod-template-hash": "7d9f8b6c54", "app.kubernetes.io/version": "v1.42.0", "tier": "backend" },
            "annotations": {
                "prometheus.io/scrape": "true", "prometheus.io/port": "9090",
                "example.com/checksum": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-7d9f8b6c54"),
                "uid": format!("00000000-0000-4000-8000-{:012}", size.service_of(pod)), "controller": true,
                "blockOwnerDeletion": true,
            }],
        },
        "spec": {
            "nodeName": node_name(size.node_of(pod)),
            "serviceAccountName": app,
            "containers": [container("http", 8080), container("metrics", 9090)],
            "volumes": [{ "name": "config", "configMap": { "name": app } }],
        },
    })
}

/// As the kubelet writes it.
pub(crate) fn pod_status(size: &Size, pod: usize, ready: bool) -> Value {
    let ip = size.pod_address(pod);
    let condition = |kind: &str, status: bool| {
        json!({ "type": kind, "status": if status { "True" } else { "False" },
            "lastProbeTime": null, "lastTransitionTime": CREATED })
    };
    let container = |name: &str| {
        json!({
            "name": name, "ready": ready, "started": true, "restartCount": 0,
            "image": format!("registry.example.com/team/{name}:v1.42.0"),
            "imageID": format!("registry.example.com/team/{name}@sha256:{:064}", 7),
            "containerID": format!("containerd://{:064}", pod),
            "state": { "running": { "startedAt": CREATED } },
        })
    };
    let node = node_address(size.node_of(pod));
    json!({ "status": {
        "phase": "Running",
        "hostIP": node, "hostIPs": [{ "ip": node }],
        "podIP": ip, "podIPs": [{ "ip": ip }],
        "startTime": CREATED,
        "conditions": [
            condition("PodReadyToStartContainers", true), condition("Initialized", true), condition("Ready", ready),
            condition("ContainersReady", ready), condition("PodScheduled", true),
        ],
        "containerStatuses": [container("http"), container("metrics")],
        "qosClass": "Burstable",
    } })
}

/// The slices of a service, whose pods have these uids.
pub(crate) fn slices(size: &Size, service: usize, uids: &[String]) -> Vec<Value> {
    let pods: Vec<usize> = size.behind(service).collect();
    let namespace = size.namespace(service);
    pods.chunks(ENDPOINTS_OF_SLICE)
        .enumerate()
        .map(|(number, pods)| {
            let endpoint = |pod: &usize| {
                json!({
                    "addresses": [size.pod_address(*pod)],
                    "conditions": { "ready": true, "serving": true, "terminating": false },
                    "nodeName": node_name(size.node_of(*pod)),
                    "targetRef": { "kind": "Pod", "namespace": namespace, "name": pod_name(size, *pod), "uid": uids[*pod] },
                })
            };
            json!({
                "metadata": {
                    "name": format!("{}-{number}", app(service)),
                    "labels": {
                        "kubernetes.io/service-name": app(service),
                        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    },
                },
                "addressType": "IPv4",
                "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
                "endpoints": pods.iter().map(endpoint).collect::<Vec<_>>(),
            })
        })
        .collect()
}
