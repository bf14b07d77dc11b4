// SPDX-License-Identifier: Apache-2.0
//! The rendered configuration files, read by the programs' own types.

use crate::helm::{find, items, render};
use anyhow::{Context, ensure};
use podveil_node::config::{Module, NodeConfig};
use podveil_program::config;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The rendered files, as in a container's `/etc/podveil`.
struct Files(PathBuf);

impl Files {
    fn new(name: &str, objects: &[Value]) -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("podveil-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let files = Self(folder);
        let data = &find(objects, "ConfigMap", "podveil-config")?["data"];
        for (name, text) in data.as_object().context("no data")? {
            std::fs::write(files.0.join(name), text.as_str().context("a text")?)?;
        }
        Ok(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn node(&self, name: &str) -> anyhow::Result<NodeConfig> {
        let environment = BTreeMap::from([("NODE_NAME", "node-1")]);
        Ok(NodeConfig::load(Some(&self.path(name)), &environment)?)
    }

    fn controller(&self) -> anyhow::Result<podveil_controller::Config> {
        let path = self.path("controller.yaml");
        let none = BTreeMap::<&str, &str>::new();
        Ok(config::load(
            Some(&path),
            podveil_controller::OVERRIDES,
            &[],
            &none,
        )?)
    }

    fn ca(&self) -> anyhow::Result<podveil_ca::Config> {
        let none = BTreeMap::<&str, &str>::new();
        Ok(config::load(
            Some(&self.path("ca.yaml")),
            podveil_ca::OVERRIDES,
            &[],
            &none,
        )?)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _best_effort = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
#[ignore = "cluster"]
fn programs_read_what_the_chart_renders() -> anyhow::Result<()> {
    let files = Files::new("chart-defaults", &render(&json!({}))?)?;
    let proxy = files.node("node-proxy.yaml")?;
    let redirect = files.node("node-redirect.yaml")?;
    ensure!(proxy.module()? == Module::Proxy && redirect.module()? == Module::Redirect);
    ensure!(proxy.zds_socket == redirect.zds_socket);
    ensure!(proxy.holder().is_some() && proxy.holder() == redirect.holder());
    ensure!(proxy.state_dir != redirect.state_dir);
    for address in [
        |config: &NodeConfig| config.admin_address,
        |config: &NodeConfig| config.metrics_address,
        |config: &NodeConfig| config.readiness_address,
    ] {
        // They share the node's network.
        ensure!(address(&proxy).port() != address(&redirect).port());
    }
    ensure!(proxy.admin_address.ip().is_loopback() && redirect.admin_address.ip().is_loopback());
    files.controller()?;
    files.ca()?;
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn values_arrive_in_the_programs() -> anyhow::Result<()> {
    let values = json!({
        "trustDomain": "shop.example",
        "ca": { "leafTtl": "12h", "rotation": { "timeout": "90s" } },
        "node": {
            "terminationGracePeriodSeconds": 65,
            "cgroup": "mine-$(NODE_NAME)",
            "proxy": {
                "holdBound": "3s", "maxConnectionsPerPod": 1_000_000, "workerThreads": 3,
                "onDemand": true, "forgetAfter": "2h",
            },
            "redirect": { "releaseBound": "1m" },
        },
    });
    let objects = render(&values)?;
    let files = Files::new("chart-values", &objects)?;
    let proxy = files.node("node-proxy.yaml")?;
    ensure!(proxy.trust_domain.to_string() == "shop.example");
    ensure!(proxy.proxy.hold_bound.0 == Duration::from_secs(3));
    ensure!(proxy.proxy.max_connections_per_pod == 1_000_000);
    ensure!(proxy.proxy.drain_bound.0 == Duration::from_secs(60));
    ensure!(proxy.worker_threads == Some(3));
    ensure!(proxy.proxy.on_demand && proxy.proxy.forget_after.0 == Duration::from_secs(7200));
    let redirect = files.node("node-redirect.yaml")?;
    ensure!(redirect.redirect.release_bound.0 == Duration::from_secs(60));
    ensure!(redirect.redirect.drain_bound.0 == Duration::from_secs(62));
    let node = &find(&objects, "DaemonSet", "podveil-node")?["spec"]["template"]["spec"];
    for container in ["proxy", "redirect"] {
        let environment = &named(&node["containers"], container)?["env"];
        // The kubelet puts in what stands before it.
        let place = |name: &str| {
            items(environment)
                .iter()
                .position(|one| one["name"] == name)
        };
        ensure!(named(environment, "PODVEIL_CGROUP")?["value"] == "mine-$(NODE_NAME)");
        ensure!(
            place("NODE_NAME") < place("PODVEIL_CGROUP"),
            "{environment}"
        );
    }
    ensure!(files.controller()?.trust_domain == "shop.example");
    let ca = files.ca()?;
    ensure!(ca.trust_domain == "shop.example");
    ensure!(ca.leaf_ttl.0 == Duration::from_secs(12 * 3600));
    ensure!(ca.program_ttl.0 == ca.leaf_ttl.0);
    ensure!(ca.rotation.timeout.0 == Duration::from_secs(90));
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn what_programs_are_told_to_use_is_mounted_and_listened_to() -> anyhow::Result<()> {
    uses_what_is_there(&json!({}))?;
    uses_what_is_there(&json!({ "node": { "surge": true } }))
}

fn uses_what_is_there(values: &Value) -> anyhow::Result<()> {
    let objects = render(values)?;
    let files = Files::new("chart-mounts", &objects)?;
    let node = &find(&objects, "DaemonSet", "podveil-node")?["spec"]["template"]["spec"];
    let controller =
        &find(&objects, "Deployment", "podveil-controller")?["spec"]["template"]["spec"];
    let ca = &find(&objects, "Deployment", "podveil-ca")?["spec"]["template"]["spec"];
    for (container, config) in [
        ("proxy", "node-proxy.yaml"),
        ("redirect", "node-redirect.yaml"),
    ] {
        let container = named(&node["containers"], container)?;
        let config = files.node(config)?;
        check_file(container, config_path(container)?, false)?;
        check_file(container, &config.token, false)?;
        check_file(container, &config.bootstrap_bundle, false)?;
        check_file(container, &config.state_dir, true)?;
        check_file(container, &config.zds_socket, true)?;
        check_file(container, &config.listeners_socket, true)?;
        check_file(container, Path::new("/sys/fs/cgroup/x"), true)?;
        let redirect = &config.redirect;
        if redirect.cni {
            check_file(container, &redirect.cni_socket, true)?;
            check_file(container, &redirect.cni_bin_dir, true)?;
            check_file(container, &redirect.cni_conf_dir, true)?;
        }
        let probe = &container["readinessProbe"];
        match &config.readiness_socket {
            None => {
                let port = &probe["httpGet"]["port"];
                ensure!(port == &json!(config.readiness_address.port()), "{port}");
            }
            Some(socket) => {
                check_file(container, socket, true)?;
                let asked = &probe["exec"]["command"];
                ensure!(asked[1] == "ready" && asked[2] == json!(socket), "{probe}");
                ensure!(config.take_over);
            }
        }
    }
    let config = files.controller()?;
    let container = named(&controller["containers"], "controller")?;
    check_file(container, config_path(container)?, false)?;
    check_file(container, &config.token, false)?;
    check_file(container, &config.bootstrap_bundle, false)?;
    check_file(container, &config.state_dir, true)?;
    check_ports(
        container,
        &[
            ("xds", config.listen.port()),
            ("metrics", config.metrics_address.port()),
            ("health", config.readiness_address.port()),
        ],
    )?;
    let config = files.ca()?;
    let container = named(&ca["containers"], "ca")?;
    check_file(container, config_path(container)?, false)?;
    check_file(container, &config.admin_socket, true)?;
    check_ports(
        container,
        &[
            ("ca", config.listen.port()),
            ("metrics", config.metrics_address.port()),
            ("health", config.readiness_address.port()),
        ],
    )?;
    Ok(())
}

fn named<'a>(list: &'a Value, name: &str) -> anyhow::Result<&'a Value> {
    let found = items(list).iter().find(|item| item["name"] == name);
    found.with_context(|| format!("no {name} in {list}"))
}

fn config_path(container: &Value) -> anyhow::Result<&Path> {
    let arguments = items(&container["args"]);
    ensure!(
        arguments.first().is_some_and(|first| first == "--config"),
        "{arguments:?}"
    );
    let path = arguments.get(1).and_then(Value::as_str);
    Ok(Path::new(path.context("no path")?))
}

/// The path lies in a mount, which may be written to where that is needed.
fn check_file(container: &Value, path: &Path, written: bool) -> anyhow::Result<()> {
    let mount = items(&container["volumeMounts"])
        .iter()
        .filter(|mount| {
            mount["mountPath"]
                .as_str()
                .is_some_and(|folder| path.starts_with(folder))
        })
        .max_by_key(|mount| mount["mountPath"].as_str().map_or(0, str::len))
        .with_context(|| format!("{} is in no mount of {}", path.display(), container["name"]))?;
    let read_only = mount["readOnly"] == true;
    ensure!(read_only != written, "{}: {mount}", path.display());
    Ok(())
}

fn check_ports(container: &Value, wanted: &[(&str, u16)]) -> anyhow::Result<()> {
    for (name, port) in wanted {
        let found = &named(&container["ports"], name)?["containerPort"];
        ensure!(
            found == &json!(port),
            "{name}: {found} is rendered, {port} is listened to"
        );
    }
    Ok(())
}
