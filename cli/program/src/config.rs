// SPDX-License-Identifier: Apache-2.0
//! One typed YAML file per program, with overrides from the environment.
//!
//! The type is the only schema: it refuses unknown keys (`#[serde(deny_unknown_fields)]`) and holds the defaults. The
//! environment is read through [`Environment`], so that tests hand in a map and never touch the process.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Larger than any honest configuration.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where variables come from.
pub trait Environment {
    fn variable(&self, name: &str) -> Option<String>;
}

/// The variables of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessEnvironment;

impl Environment for ProcessEnvironment {
    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }
}

impl Environment for BTreeMap<&str, &str> {
    fn variable(&self, name: &str) -> Option<String> {
        self.get(name).map(|value| (*value).to_owned())
    }
}

/// A variable that overrides a key; nested keys are written with dots, `proxy.hold_bound`.
#[derive(Clone, Copy, Debug)]
pub struct Override {
    pub variable: &'static str,
    pub key: &'static str,
}

/// Why a program cannot start: always for the operator to mend.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {message}", path.display())]
    Invalid { path: PathBuf, message: String },
    #[error("{}: the key {old} is now called {new}", path.display())]
    Renamed {
        path: PathBuf,
        old: &'static str,
        new: &'static str,
    },
    #[error("the configuration, with its environment overrides, is not valid: {message}")]
    Merged { message: String },
    #[error("reading the configuration {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the configuration {} is larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge { path: PathBuf },
}

/// Reads `path` (nothing but the environment if `None`) into `T`.
///
/// # Errors
/// [`ConfigError`], with file and line where the fault lies in the file.
pub fn load<T: DeserializeOwned>(
    path: Option<&Path>,
    overrides: &[Override],
    renamed: &[(&'static str, &'static str)],
    environment: &dyn Environment,
) -> Result<T, ConfigError> {
    let Some(path) = path else {
        return merge(Value::Object(Map::new()), overrides, environment);
    };
    let read_error = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(read_error)?.len() > MAX_FILE_BYTES {
        return Err(ConfigError::TooLarge {
            path: path.to_owned(),
        });
    }
    let text = std::fs::read_to_string(path).map_err(read_error)?;
    let invalid = |error: serde_saphyr::Error| ConfigError::Invalid {
        path: path.to_owned(),
        message: error.to_string(),
    };
    let value: Value = parse(&text).map_err(invalid)?;
    for (old, new) in renamed {
        if value.get(old).is_some() {
            return Err(ConfigError::Renamed {
                path: path.to_owned(),
                old,
                new,
            });
        }
    }
    merge(value, overrides, environment).map_err(|merged| {
        match parse::<T>(&text) {
            // The fault is in the file itself: say on which line.
            Err(error) => invalid(error),
            Ok(_) => merged,
        }
    })
}

/// One sentence with line and column is enough of an error: whoever reads it has the file, and a log has one line.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, serde_saphyr::Error> {
    let mut options = serde_saphyr::Options::default();
    options.with_snippet = false;
    serde_saphyr::from_str_with_options(text, options)
}

fn merge<T: DeserializeOwned>(
    mut value: Value,
    overrides: &[Override],
    environment: &dyn Environment,
) -> Result<T, ConfigError> {
    if value.is_null() {
        value = Value::Object(Map::new());
    }
    for Override { variable, key } in overrides {
        if let Some(text) = environment.variable(variable) {
            set(&mut value, key, &text);
        }
    }
    serde_json::from_value(value).map_err(|error| ConfigError::Merged {
        message: error.to_string(),
    })
}

fn set(value: &mut Value, key: &str, text: &str) {
    let mut place = value;
    for part in key.split('.') {
        if !place.is_object() {
            *place = Value::Object(Map::new());
        }
        place = place
            .as_object_mut()
            .expect("made an object just above")
            .entry(part)
            .or_insert(Value::Null);
    }
    // A number or a boolean stays one; everything else is the text as it is.
    *place = match serde_json::from_str(text) {
        Ok(scalar @ (Value::Bool(_) | Value::Number(_))) => scalar,
        _ => Value::String(text.to_owned()),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Example {
        node: String,
        #[serde(default)]
        proxy: Nested,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Nested {
        #[serde(default)]
        backlog: u32,
    }

    const OVERRIDES: &[Override] = &[
        Override {
            variable: "NODE_NAME",
            key: "node",
        },
        Override {
            variable: "BACKLOG",
            key: "proxy.backlog",
        },
    ];

    fn read(text: &str, environment: &BTreeMap<&str, &str>) -> Result<Example, ConfigError> {
        let folder =
            std::env::temp_dir().join(format!("podveil-config-{}-{:p}", std::process::id(), text));
        std::fs::write(&folder, text).unwrap();
        let result = load(
            Some(&folder),
            OVERRIDES,
            &[("node_name", "node")],
            environment,
        );
        std::fs::remove_file(folder).unwrap();
        result
    }

    #[test]
    fn the_environment_overrides_the_file() {
        let environment = BTreeMap::from([("NODE_NAME", "n2"), ("BACKLOG", "7")]);
        let parsed = read("node: n1\nproxy: {backlog: 1}\n", &environment).unwrap();
        assert_eq!(
            parsed,
            Example {
                node: "n2".into(),
                proxy: Nested { backlog: 7 }
            }
        );
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = read("node: n1\n\nnoed: n2\n", &BTreeMap::new())
            .unwrap_err()
            .to_string();
        // Once, on one line, and in no file of another name.
        assert_eq!(error.matches("noed").count(), 1, "{error}");
        assert!(error.contains("line 3") && !error.contains('\n'), "{error}");
        assert!(!error.contains("<input>"), "{error}");
    }

    #[test]
    fn a_renamed_key_is_answered_with_its_new_name() {
        let error = read("node_name: n1\n", &BTreeMap::new())
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("the key node_name is now called node"),
            "{error}"
        );
    }
}
