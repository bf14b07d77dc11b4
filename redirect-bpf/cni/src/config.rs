// SPDX-License-Identifier: Apache-2.0
//! The configuration that the runtime writes to a plugin's standard input.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::IpAddr;
use std::path::PathBuf;

/// Versions of the specification that are answered.
pub(crate) const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
pub(crate) const NEWEST: &str = VERSIONS[3];
/// Results are a few kilobytes.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// More than any pod has.
const MAX_ADDRESSES: usize = 32;

/// What the node program writes into the plugin's entry of the list.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// Of the node program.
    pub socket: PathBuf,
    /// A pod that cannot be asked about does not start.
    pub fail_closed: bool,
    /// Never asked about, so that a cold cluster starts.
    pub exempt_namespaces: Vec<String>,
}

/// One call's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub cni_version: String,
    pub settings: Settings,
    /// The result of the plugins before this one, as it was written.
    pub previous: Option<Value>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("it is no JSON object as a plugin gets it")]
    Json(#[from] serde_json::Error),
    #[error("it is chained after no plugin: there is no prevResult")]
    NoPrevious,
    #[error("it has more than {MAX_BYTES} bytes")]
    TooLong,
    #[error("version {0:?} of CNI is not spoken, 0.3.1 to 1.1.0 are")]
    Version(String),
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default, rename = "cniVersion")]
    cni_version: String,
    #[serde(default, rename = "prevResult")]
    previous: Option<Value>,
    #[serde(flatten)]
    settings: Settings,
}

#[derive(Deserialize)]
struct VersionOnly {
    #[serde(default, rename = "cniVersion")]
    cni_version: String,
}

impl Config {
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() > MAX_BYTES {
            return Err(ConfigError::TooLong);
        }
        let wire: Wire = serde_json::from_slice(bytes)?;
        if !VERSIONS.contains(&wire.cni_version.as_str()) {
            return Err(ConfigError::Version(
                wire.cni_version.chars().take(32).collect(),
            ));
        }
        Ok(Self {
            cni_version: wire.cni_version,
            settings: wire.settings,
            previous: wire.previous,
        })
    }

    /// The version that an answer should be in, of whatever was written.
    pub(crate) fn version_of(bytes: &[u8]) -> String {
        let asked = serde_json::from_slice::<VersionOnly>(bytes).map(|wire| wire.cni_version);
        asked
            .ok()
            .filter(|version| VERSIONS.contains(&version.as_str()))
            .unwrap_or_else(|| NEWEST.to_owned())
    }

    /// # Errors
    /// [`ConfigError::NoPrevious`].
    pub fn previous(&self) -> Result<&Value, ConfigError> {
        self.previous.as_ref().ok_or(ConfigError::NoPrevious)
    }

    /// The pod's addresses by the result before; the same place in each version.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let ips = self
            .previous
            .as_ref()
            .and_then(|result| result["ips"].as_array());
        ips.into_iter()
            .flatten()
            .filter_map(|entry| entry["address"].as_str()?.split('/').next()?.parse().ok())
            .take(MAX_ADDRESSES)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(version: &str, previous: Option<Value>) -> Value {
        let mut entry = json!({
            "cniVersion": version,
            "name": "pods",
            "type": "podveil-cni",
            "socket": "/run/podveil/cni/cni.sock",
            "failClosed": true,
            "exemptNamespaces": ["kube-system"],
        });
        if let Some(previous) = previous {
            entry["prevResult"] = previous;
        }
        entry
    }

    #[test]
    fn addresses_are_read_from_the_results_of_each_version() {
        let with_family = json!({"ips": [
            {"version": "4", "address": "10.244.1.2/24", "gateway": "10.244.1.1", "interface": 0},
            {"version": "6", "address": "fd00::2/64"},
        ]});
        let without = json!({"ips": [{"address": "10.244.1.2/24"}, {"address": "fd00::2/64"}]});
        let addresses: Vec<IpAddr> =
            vec!["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        for (version, previous, expected) in [
            ("0.3.1", with_family.clone(), addresses.clone()),
            ("0.4.0", with_family, addresses.clone()),
            ("1.0.0", without.clone(), addresses.clone()),
            ("1.1.0", without, addresses),
            (
                "1.1.0",
                json!({"ips": [{"address": 7}, {"address": "x/24"}, 7]}),
                vec![],
            ),
            ("1.1.0", json!({"ips": 7}), vec![]),
            ("1.1.0", json!(7), vec![]),
        ] {
            let bytes = entry(version, Some(previous)).to_string();
            let config = Config::parse(bytes.as_bytes()).unwrap();
            assert_eq!(config.addresses(), expected, "{bytes}");
        }
    }

    #[test]
    fn what_is_not_spoken_or_not_written_as_it_should_be_is_refused() {
        let parse = |text: &str| Config::parse(text.as_bytes());
        for version in ["0.2.0", "0.3.0", "1.2.0", "2.0.0", ""] {
            let text = entry(version, None).to_string();
            assert!(
                matches!(parse(&text), Err(ConfigError::Version(_))),
                "{text}"
            );
        }
        for text in [
            "",
            "{",
            "[]",
            "{\"cniVersion\": \"1.1.0\"}",
            "{\"cniVersion\": 1}",
        ] {
            assert!(matches!(parse(text), Err(ConfigError::Json(_))), "{text}");
        }
        let long = " ".repeat(MAX_BYTES + 1);
        assert!(matches!(parse(&long), Err(ConfigError::TooLong)));
        let unchained = parse(&entry("1.1.0", None).to_string()).unwrap();
        assert!(matches!(unchained.previous(), Err(ConfigError::NoPrevious)));
    }
}
