// SPDX-License-Identifier: Apache-2.0
//! What is rendered: privileges, rights, and names that must agree with other parts of the tree.

use crate::helm::{chart, find, items, render};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// Pod specs with the name of what makes them.
fn pods(objects: &[Value]) -> Vec<(String, &Value)> {
    objects
        .iter()
        .filter_map(|object| {
            let spec = match object["kind"].as_str()? {
                "DaemonSet" | "Deployment" | "Job" => &object["spec"]["template"]["spec"],
                "Pod" => &object["spec"],
                _ => return None,
            };
            Some((object["metadata"]["name"].as_str()?.to_owned(), spec))
        })
        .collect()
}

#[test]
#[ignore = "cluster"]
fn only_the_node_program_has_privileges_and_each_is_listed_in_the_docs() -> anyhow::Result<()> {
    let objects = render(&json!({}))?;
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/privileges.md");
    let docs = std::fs::read_to_string(docs).context("docs/privileges.md")?;
    let pods = pods(&objects);
    ensure!(pods.len() == 5, "{} pods are rendered", pods.len());
    for (name, pod) in pods {
        let node = name == "podveil-node";
        for container in items(&pod["containers"]) {
            let context = &container["securityContext"];
            let what = format!("{name}/{}", container["name"]);
            ensure!(context["allowPrivilegeEscalation"] == false, "{what}");
            ensure!(context["readOnlyRootFilesystem"] == true, "{what}");
            ensure!(context["capabilities"]["drop"] == json!(["ALL"]), "{what}");
            ensure!(context.get("privileged").is_none(), "{what}");
            let added = items(&context["capabilities"]["add"]);
            ensure!(node || added.is_empty(), "{what} adds {added:?}");
            for capability in added {
                let listed = format!("CAP_{}", capability.as_str().context("a name")?);
                ensure!(docs.contains(&listed), "{what}: {listed} is not explained");
            }
        }
        if node {
            for volume in items(&pod["volumes"]) {
                let Some(path) = volume["hostPath"]["path"].as_str() else {
                    continue;
                };
                ensure!(
                    docs.contains(&format!("`{path}`")),
                    "{path} is not explained"
                );
            }
            ensure!(
                pod["automountServiceAccountToken"] == false,
                "the node reaches the API"
            );
        } else {
            ensure!(pod["securityContext"]["runAsNonRoot"] == true, "{name}");
            let profile = &pod["securityContext"]["seccompProfile"]["type"];
            ensure!(profile == "RuntimeDefault", "{name}");
            for key in ["hostNetwork", "hostPID", "hostIPC"] {
                ensure!(pod.get(key).is_none(), "{name} has {key}");
            }
            for volume in items(&pod["volumes"]) {
                ensure!(
                    volume.get("hostPath").is_none(),
                    "{name} mounts a host path"
                );
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn rights_are_to_named_objects_or_to_read() -> anyhow::Result<()> {
    let objects = render(&json!({}))?;
    let mut rules = 0;
    for object in &objects {
        let kind = object["kind"].as_str().unwrap_or_default();
        if !matches!(kind, "ClusterRole" | "Role") {
            continue;
        }
        // Its rights exist only while `helm test` runs.
        let hook = object["metadata"]["annotations"]["helm.sh/hook"].is_string();
        for rule in items(&object["rules"]) {
            rules += 1;
            let words = |key: &str| -> BTreeSet<&str> {
                items(&rule[key]).iter().filter_map(Value::as_str).collect()
            };
            let (resources, verbs) = (words("resources"), words("verbs"));
            let named = !words("resourceNames").is_empty();
            ensure!(!resources.contains("*") && !verbs.contains("*"), "{rule}");
            ensure!(!words("apiGroups").contains("*"), "{rule}");
            if resources.contains("secrets") {
                ensure!(kind == "Role" && named, "{rule} reads secrets");
            }
            let reads: BTreeSet<&str> = ["get", "list", "watch"].into();
            let free = resources == ["events"].into() || resources == ["tokenreviews"].into();
            ensure!(verbs.is_subset(&reads) || named || free || hook, "{rule}");
            ensure!(!verbs.contains("create") || free || hook, "{rule}");
        }
    }
    ensure!(rules > 8, "only {rules} rules were looked at");
    let nodes_binding = objects.iter().any(|object| {
        items(&object["subjects"])
            .iter()
            .any(|subject| subject["name"] == "podveil-node")
    });
    ensure!(!nodes_binding, "the node program needs no right at all");
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn images_are_those_that_xtask_makes() -> anyhow::Result<()> {
    let objects = render(&json!({}))?;
    let mut seen = BTreeSet::new();
    for (_, pod) in pods(&objects) {
        for container in items(&pod["containers"]) {
            seen.insert(container["image"].as_str().context("an image")?.to_owned());
        }
    }
    let version = env!("CARGO_PKG_VERSION");
    let made = ["ca", "controller", "node"].map(|name| format!("podveil/{name}:{version}"));
    ensure!(seen == made.into(), "{seen:?}");
    let chart = std::fs::read_to_string(chart().join("Chart.yaml"))?;
    let chart: Value = serde_saphyr::from_str(&chart)?;
    ensure!(
        chart["version"] == version && chart["appVersion"] == version,
        "{chart}"
    );
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn a_single_replica_has_no_budget_that_would_hold_up_a_drain() -> anyhow::Result<()> {
    let one = json!({ "ca": { "replicas": 1 }, "controller": { "replicas": 1 } });
    for (values, wanted) in [(json!({}), 2), (one, 0)] {
        let objects = render(&values)?;
        let budgets = objects
            .iter()
            .filter(|object| object["kind"] == "PodDisruptionBudget")
            .count();
        ensure!(budgets == wanted, "{budgets} budgets");
    }
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn selectors_match_the_pods_they_are_for() -> anyhow::Result<()> {
    let objects = render(&json!({ "podMonitor": { "enabled": true } }))?;
    let matches = |selector: &Value, kind: &str, name: &str| -> anyhow::Result<bool> {
        let labels = &find(&objects, kind, name)?["spec"]["template"]["metadata"]["labels"];
        let selector = selector.as_object().context("a selector")?;
        ensure!(!selector.is_empty(), "an empty selector");
        Ok(selector.iter().all(|(key, value)| &labels[key] == value))
    };
    for (service, program) in [
        ("podveil-ca", "podveil-ca"),
        ("podveil-controller", "podveil-controller"),
        ("podveil-controller-replicas", "podveil-controller"),
    ] {
        let selector = &find(&objects, "Service", service)?["spec"]["selector"];
        ensure!(
            matches(selector, "Deployment", program)?,
            "Service {service}"
        );
        for other in ["podveil-ca", "podveil-controller"] {
            let hit = matches(selector, "Deployment", other)?;
            ensure!(hit == (other == program), "Service {service} and {other}");
        }
    }
    for (program, kind) in [
        ("podveil-ca", "Deployment"),
        ("podveil-controller", "Deployment"),
        ("podveil-node", "DaemonSet"),
    ] {
        let own = &find(&objects, kind, program)?["spec"]["selector"]["matchLabels"];
        ensure!(matches(own, kind, program)?, "{kind} {program}");
        let monitor = &find(&objects, "PodMonitor", program)?["spec"]["selector"]["matchLabels"];
        ensure!(matches(monitor, kind, program)?, "PodMonitor {program}");
    }
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn dashboards_ask_for_metrics_that_are_exported() -> anyhow::Result<()> {
    let objects = render(&json!({ "dashboards": { "enabled": true } }))?;
    let data = &find(&objects, "ConfigMap", "podveil-dashboards")?["data"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut sources = String::new();
    for folder in [
        "controller/app/src",
        "identity-ca/server/src",
        "proxy/app/src",
        "redirect-bpf/node/src",
    ] {
        read_sources(&root.join(folder), &mut sources)?;
    }
    let mut asked = BTreeSet::new();
    for (_, text) in data.as_object().context("dashboards")? {
        let dashboard: Value = serde_json::from_str(text.as_str().context("a text")?)?;
        for panel in items(&dashboard["panels"]) {
            for target in items(&panel["targets"]) {
                let query = target["expr"].as_str().context("a query")?;
                let names = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                let prefixes = ["istio_", "podveil_", "process_", "workload_manager_"];
                asked.extend(
                    names
                        .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
                        .map(str::to_owned),
                );
            }
        }
    }
    ensure!(asked.len() > 12, "{asked:?}");
    for name in asked {
        ensure!(
            sources.contains(&format!("\"{name}\"")),
            "nothing exports {name}"
        );
    }
    Ok(())
}

fn read_sources(folder: &Path, all: &mut String) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            read_sources(&path, all)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&std::fs::read_to_string(path)?);
        }
    }
    Ok(())
}
