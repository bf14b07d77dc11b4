// SPDX-License-Identifier: Apache-2.0
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::path::PathBuf;

const KUBERNETES: &str = "kubernetes";

/// Where the state of the cluster is read; in configuration one word or path.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(from = "String", into = "String")]
pub enum SourceConfig {
    /// The API of the Kubernetes cluster.
    Kubernetes,
    /// A YAML file or a directory of them.
    File(PathBuf),
}

impl From<String> for SourceConfig {
    fn from(text: String) -> Self {
        if text == KUBERNETES {
            Self::Kubernetes
        } else {
            Self::File(text.into())
        }
    }
}

impl From<SourceConfig> for String {
    fn from(source: SourceConfig) -> Self {
        match source {
            SourceConfig::Kubernetes => KUBERNETES.to_owned(),
            SourceConfig::File(path) => path.to_string_lossy().into_owned(),
        }
    }
}

impl JsonSchema for SourceConfig {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "SourceConfig".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string"})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_is_the_api_and_all_else_a_path() {
        for (text, source) in [
            ("kubernetes", SourceConfig::Kubernetes),
            ("./kubernetes", SourceConfig::File("./kubernetes".into())),
            ("/etc/cluster", SourceConfig::File("/etc/cluster".into())),
        ] {
            assert_eq!(SourceConfig::from(text.to_owned()), source);
            assert_eq!(String::from(source), text);
        }
    }
}
