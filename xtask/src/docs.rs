// SPDX-License-Identifier: Apache-2.0
//! `docs/configuration.md` from the types that read the configuration: the page cannot say what the program does not do.

use crate::workspace;
use anyhow::{Context, ensure};
use podveil_program::Override;
use schemars::{Schema, schema_for};
use serde_json::Value;
use std::fmt::Write;

const HEAD: &str = "# Configuration\n\nGenerated from the configuration types by `cargo xtask docs`; change the types, not this page.\n\n\
One YAML file per program, named by `--config`. Unknown keys are refused, with their line; a renamed key is answered with \
its new name. Durations are written `200ms`, `5s`, `10m`, `24h`. Variables of the environment go before the file; \
`RUST_LOG` (`info`) says how much is logged, as in `info,podveil_node=debug`.\n";

/// Writes the page, or with `check` fails if the committed one differs.
pub fn run(check: bool) -> anyhow::Result<()> {
    let mut page = HEAD.to_owned();
    for (program, schema, overrides) in programs() {
        write!(page, "\n## {program}\n\n")?;
        section(&mut page, schema.as_value(), schema.as_value(), "")?;
        page.push_str("\n| variable | key |\n|---|---|\n");
        for Override { variable, key } in overrides {
            writeln!(page, "| `{variable}` | `{key}` |")?;
        }
    }
    check_promises()?;
    let path = workspace().join("docs/configuration.md");
    if check {
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        ensure!(
            committed == page,
            "docs/configuration.md is not what the types say: run `cargo xtask docs`"
        );
        return Ok(());
    }
    std::fs::write(&path, page).with_context(|| format!("writing {}", path.display()))
}

fn programs() -> [(&'static str, Schema, &'static [Override]); 3] {
    [
        (
            "podveil-node",
            schema_for!(podveil_node::config::NodeConfig),
            podveil_node::config::OVERRIDES,
        ),
        (
            "podveil-controller",
            schema_for!(podveil_controller::Config),
            podveil_controller::OVERRIDES,
        ),
        (
            "podveil-ca",
            schema_for!(podveil_ca::Config),
            podveil_ca::OVERRIDES,
        ),
    ]
}

fn section(page: &mut String, root: &Value, schema: &Value, prefix: &str) -> anyhow::Result<()> {
    let empty = serde_json::Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    let required: Vec<&str> = schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    page.push_str("| key | type | meaning |\n|---|---|---|\n");
    let mut nested = Vec::new();
    for (key, property) in properties {
        let target = resolve(root, property);
        let description = property["description"]
            .as_str()
            .or(target["description"].as_str())
            .unwrap_or("");
        let text = description
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
            .replace('|', "\\|");
        let must = if required.contains(&key.as_str()) {
            " **Required.**"
        } else {
            ""
        };
        // What says more of its default than the value is left as it is.
        let default = match value(&property["default"]) {
            Some(value) if !text.contains("Default") => format!(" Default `{value}`."),
            _ => String::new(),
        };
        writeln!(
            page,
            "| `{prefix}{key}` | {} | {text}{default}{must} |",
            kind(root, property)
        )?;
        if target["properties"].is_object() {
            nested.push((format!("{prefix}{key}."), target));
        }
    }
    for (prefix, target) in nested {
        page.push('\n');
        section(page, root, target, &prefix)?;
    }
    Ok(())
}

/// A default as it is written in the file; none for what is absent and for whole sections.
fn value(default: &Value) -> Option<String> {
    match default {
        Value::Null | Value::Object(_) => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// Follows `$ref`, and the one inside the `anyOf` of an option.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let reference = |schema: &'a Value| {
        schema["$ref"]
            .as_str()?
            .strip_prefix('#')
            .and_then(|pointer| root.pointer(pointer))
    };
    reference(schema)
        .or_else(|| schema["anyOf"].as_array()?.iter().find_map(reference))
        .unwrap_or(schema)
}

fn kind(root: &Value, property: &Value) -> String {
    let schema = resolve(root, property);
    let variants: Vec<&str> = schema["enum"]
        .as_array()
        .into_iter()
        .flatten()
        .chain(
            schema["oneOf"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|one| &one["const"]),
        )
        .filter_map(Value::as_str)
        .collect();
    if !variants.is_empty() {
        return variants
            .iter()
            .map(|variant| format!("`{variant}`"))
            .collect::<Vec<_>>()
            .join(", ");
    }
    let names: Vec<&str> = match &schema["type"] {
        Value::String(name) => vec![name],
        Value::Array(names) => names
            .iter()
            .filter_map(Value::as_str)
            .filter(|name| *name != "null")
            .collect(),
        _ => Vec::new(),
    };
    match names.as_slice() {
        ["array"] => format!("list of {}", kind(root, &schema["items"])),
        ["string"] if schema["format"] == "duration" => "duration".into(),
        ["object"] => "section".into(),
        names => names.join(" or "),
    }
}

/// Every test that a promise names stands where the page says.
fn check_promises() -> anyhow::Result<()> {
    let page = std::fs::read_to_string(workspace().join("docs/SPECIFICATION.md"))
        .context("reading docs/SPECIFICATION.md")?;
    let mut named = 0;
    for (file, test) in page.split('`').filter_map(|code| code.split_once(".rs::")) {
        let path = workspace().join(format!("{file}.rs"));
        let source = std::fs::read_to_string(&path)
            .with_context(|| format!("docs/SPECIFICATION.md names {}", path.display()))?;
        // A test for several back ends has a parameter.
        let stands = ["(", "<"].map(|next| source.contains(&format!("fn {test}{next}")));
        ensure!(
            stands.contains(&true),
            "docs/SPECIFICATION.md names {test}, which is not in {file}.rs"
        );
        named += 1;
    }
    ensure!(named > 0, "docs/SPECIFICATION.md names no test");
    Ok(())
}
