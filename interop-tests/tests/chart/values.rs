// SPDX-License-Identifier: Apache-2.0
//! What the chart may be told.

use crate::helm::{chart, default_values, helm, render, values_schema};
use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value, json};

#[test]
#[ignore = "cluster"]
fn the_chart_passes_lint() -> anyhow::Result<()> {
    helm(
        &["lint", "--strict", chart().to_str().context("a path")?],
        "",
    )?;
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn a_wrong_value_is_refused_by_its_path() -> anyhow::Result<()> {
    for (values, path) in [
        (json!({ "bogus": 1 }), "bogus"),
        (
            json!({ "node": { "proxy": { "hold_bound": "5s" } } }),
            "hold_bound",
        ),
        (json!({ "ca": { "leafTtl": "1d" } }), "/ca/leafTtl"),
        (json!({ "ca": { "leafTtl": 24 } }), "/ca/leafTtl"),
        (json!({ "ca": { "replicas": 0 } }), "/ca/replicas"),
        (
            json!({ "controller": { "replicas": "2" } }),
            "/controller/replicas",
        ),
        (
            json!({ "image": { "pullPolicy": "Sometimes" } }),
            "/image/pullPolicy",
        ),
        (json!({ "image": { "tag": "a b" } }), "/image/tag"),
        (json!({ "log": { "format": "xml" } }), "/log/format"),
        (
            json!({ "node": { "maxUnavailable": 0 } }),
            "/node/maxUnavailable",
        ),
        (
            json!({ "node": { "maxUnavailable": "0%" } }),
            "/node/maxUnavailable",
        ),
        (
            json!({ "node": { "terminationGracePeriodSeconds": 5 } }),
            "/node/terminationGracePeriodSeconds",
        ),
        (
            json!({ "node": { "tolerations": [{ "effect": "NoRun" }] } }),
            "/node/tolerations/0/effect",
        ),
        (
            json!({ "ca": { "resources": { "limits": { "memory": "lots" } } } }),
            "/ca/resources/limits/memory",
        ),
        (json!({ "image": { "prefix": "a/" } }), "/image/prefix"),
        (json!({ "log": { "level": "loud" } }), "/log/level"),
        (json!({ "node": null }), "missing property 'node'"),
        (json!({ "node": { "cgroup": "../x" } }), "/node/cgroup"),
        (
            json!({ "node": { "nodeSelector": { "a": true } } }),
            "/node/nodeSelector/a",
        ),
        (
            json!({ "node": { "redirect": { "backEnd": "ipchains" } } }),
            "/node/redirect/backEnd",
        ),
        (
            json!({ "ca": { "rotation": { "timeout": "-1s" } } }),
            "/ca/rotation/timeout",
        ),
        (
            json!({ "controller": { "replicas": 1000 } }),
            "/controller/replicas",
        ),
        (json!({ "trustDomain": "Shop.Example" }), "/trustDomain"),
        (json!({ "trustDomain": null }), "trustDomain"),
    ] {
        let error = match render(&values) {
            Ok(_) => bail!("{values} was taken"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(error.contains(path), "{values}: {error}");
    }
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn values_that_do_not_go_together_are_refused_with_the_reason() -> anyhow::Result<()> {
    for (values, reason) in [
        (
            json!({ "ca": { "leafTtl": "59s" } }),
            "ca.leafTtl is 59s: certificates of less than a minute",
        ),
        (
            json!({ "ca": { "leafTtl": "721h" } }),
            "ca.leafTtl is 721h, which is more than a third of ca.issuingTtl (2160h)",
        ),
        (
            json!({ "ca": { "rootTtl": "2159h" } }),
            "ca.issuingTtl is 2160h, which is more than ca.rootTtl (2159h)",
        ),
        (
            json!({ "node": { "redirect": { "releaseBound": "240s" } } }),
            "node.redirect.releaseBound is 240s, which is not below uninstall.timeout (4m)",
        ),
    ] {
        let error = match render(&values) {
            Ok(_) => bail!("{values} was taken"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(error.contains(reason), "{values}: {error}");
    }
    // At its limit each is taken.
    render(&json!({
        "ca": { "leafTtl": "60s", "issuingTtl": "180s", "rootTtl": "180s" },
        "node": { "redirect": { "releaseBound": "239s" } },
    }))?;
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn every_value_is_described_and_has_a_default() -> anyhow::Result<()> {
    let mut checked = 0;
    let defaults = default_values()?;
    leaves(&values_schema()?, &mut Vec::new(), &mut |path, schema| {
        let text = schema["description"].as_str().unwrap_or_default();
        ensure!(text.len() > 10, "{path:?} is not described");
        let pointer = format!("/{}", path.join("/"));
        ensure!(
            defaults.pointer(&pointer).is_some(),
            "{pointer} is not in values.yaml"
        );
        checked += 1;
        Ok(())
    })?;
    ensure!(checked > 20, "only {checked} values were looked at");
    Ok(())
}

#[test]
#[ignore = "cluster"]
fn every_value_changes_what_is_rendered() -> anyhow::Result<()> {
    // What a switch governs shows only where it is on.
    let base = json!({ "podMonitor": { "enabled": true }, "dashboards": { "enabled": true } });
    let before = render(&base)?;
    let defaults = default_values()?;
    leaves(&values_schema()?, &mut Vec::new(), &mut |path, schema| {
        let pointer = format!("/{}", path.join("/"));
        let default = base.pointer(&pointer).or(defaults.pointer(&pointer));
        let default = default.with_context(|| format!("{pointer} has no default"))?;
        for other in others(path, schema, default)? {
            let mut values = base.clone();
            set(&mut values, path, other.clone());
            let after = render(&values).with_context(|| format!("{pointer} = {other}"))?;
            ensure!(before != after, "{pointer} = {other} changes nothing");
        }
        Ok(())
    })
}

/// Calls `visit` for each value that a person sets: a scalar, a list, or a map of free keys.
fn leaves(
    schema: &Value,
    path: &mut Vec<String>,
    visit: &mut dyn FnMut(&[String], &Value) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Some(properties) = schema["properties"].as_object() else {
        return visit(path, schema);
    };
    ensure!(
        schema["additionalProperties"] == false,
        "{path:?} takes anything"
    );
    for (name, property) in properties {
        // Helm hands it to every chart that is part of another.
        if path.is_empty() && name == "global" {
            continue;
        }
        path.push(name.clone());
        leaves(property, path, visit)?;
        path.pop();
    }
    Ok(())
}

/// Values that the schema allows and that are not `default`.
fn others(path: &[String], schema: &Value, default: &Value) -> anyhow::Result<Vec<Value>> {
    if let Some(choices) = schema["enum"].as_array() {
        let others: Vec<Value> = choices
            .iter()
            .filter(|one| *one != default)
            .cloned()
            .collect();
        ensure!(!others.is_empty(), "{path:?} leaves no choice");
        return Ok(others);
    }
    if let Some(items) = schema.get("items") {
        let item = match items["properties"].is_object() {
            true => {
                json!({ "key": "other", "operator": "Equal", "value": "a", "effect": "NoExecute", "tolerationSeconds": 7 })
            }
            false => json!("other"),
        };
        return Ok(vec![json!([item])]);
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => &kinds[0],
        kind => kind,
    };
    Ok(vec![match kind
        .as_str()
        .with_context(|| format!("{path:?} has no type"))?
    {
        "boolean" => json!(default != &json!(true)),
        "integer" => {
            let least = schema["minimum"].as_i64().context("a least value")?;
            let different = default.as_i64().map_or(least, |default| default + 1);
            json!(different)
        }
        "object" if path.ends_with(&["requests".into()]) || path.ends_with(&["limits".into()]) => {
            json!({ "cpu": "123m" })
        }
        "object" => json!({ "example.org/other": "yes" }),
        "string" => match schema["pattern"].as_str() {
            Some(pattern) if pattern.ends_with("s|m|h)$") => json!(longer(default)?),
            Some(pattern) if pattern.contains("|debug|") => json!("trace"),
            Some(pattern) if pattern.starts_with("^(/") => json!("/run/other/other.sock"),
            _ => json!(format!("{}other", default.as_str().unwrap_or_default())),
        },
        other => bail!("{path:?} is a {other}"),
    }])
}

/// A little more than this duration, so that it still goes together with the others.
fn longer(duration: &Value) -> anyhow::Result<String> {
    let duration = duration.as_str().context("a duration")?;
    let unit = duration.trim_start_matches(|c: char| c.is_ascii_digit());
    let number: u64 = duration[..duration.len() - unit.len()].parse()?;
    Ok(format!("{}{unit}", number + 1))
}

fn set(values: &mut Value, path: &[String], value: Value) {
    let mut place = values;
    for part in path {
        if !place.is_object() {
            *place = Value::Object(Map::new());
        }
        let map = place.as_object_mut().expect("made an object just above");
        place = map.entry(part.clone()).or_insert(Value::Null);
    }
    *place = value;
}
