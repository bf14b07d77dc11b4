// SPDX-License-Identifier: Apache-2.0
//! The parameters of a call, which the runtime gives in the environment.

use std::fmt;
use std::str::FromStr;

/// Longer than any parameter that is meant: `CNI_ARGS` holds a pod's name, namespace and uid.
const MAX_BYTES: usize = 4096;

/// `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verb {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum EnvironmentError {
    #[error("{name} is not set")]
    Missing { name: &'static str },
    #[error("{name} has more than {MAX_BYTES} bytes")]
    TooLong { name: &'static str },
    #[error("CNI_COMMAND is {0:?}")]
    Verb(String),
    #[error("CNI_ARGS: {0:?} is not KEY=VALUE")]
    Argument(String),
    #[error("CNI_ARGS names no {0}")]
    NotNamed(&'static str),
}

impl FromStr for Verb {
    type Err = EnvironmentError;

    fn from_str(text: &str) -> Result<Self, EnvironmentError> {
        Ok(match text {
            "ADD" => Self::Add,
            "CHECK" => Self::Check,
            "DEL" => Self::Del,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            other => return Err(EnvironmentError::Verb(other.chars().take(32).collect())),
        })
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        })
    }
}

/// What `CNI_ARGS` says of the pod, as container runtimes for Kubernetes write it. `None`: no Kubernetes pod.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Arguments {
    pub namespace: String,
    pub pod: String,
    pub uid: String,
}

impl Arguments {
    /// Parses `KEY=VALUE;..`. Unknown keys are for other plugins.
    /// # Errors
    /// [`EnvironmentError::Argument`]; [`EnvironmentError::NotNamed`] for a pod without name or uid.
    pub fn parse(text: &str) -> Result<Option<Self>, EnvironmentError> {
        let mut found = Self::default();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                let part = part.chars().take(64).collect();
                return Err(EnvironmentError::Argument(part));
            };
            let field = match key {
                "K8S_POD_NAMESPACE" => &mut found.namespace,
                "K8S_POD_NAME" => &mut found.pod,
                "K8S_POD_UID" => &mut found.uid,
                _ => continue,
            };
            value.clone_into(field);
        }
        if found.namespace.is_empty() {
            return Ok(None);
        }
        for (value, name) in [(&found.pod, "K8S_POD_NAME"), (&found.uid, "K8S_POD_UID")] {
            if value.is_empty() {
                return Err(EnvironmentError::NotNamed(name));
            }
        }
        Ok(Some(found))
    }
}

/// The interface in the sandbox that the call is about.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attachment {
    pub container: String,
    pub interface: String,
    /// Path of the network namespace; DEL may come without one.
    pub netns: Option<String>,
    pub pod: Option<Arguments>,
}

impl Attachment {
    /// # Errors
    /// See [`EnvironmentError`].
    pub fn read(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, EnvironmentError> {
        let required = |name| bounded(variable, name)?.ok_or(EnvironmentError::Missing { name });
        let arguments = bounded(variable, "CNI_ARGS")?.unwrap_or_default();
        Ok(Self {
            container: required("CNI_CONTAINERID")?,
            interface: required("CNI_IFNAME")?,
            netns: bounded(variable, "CNI_NETNS")?,
            pod: Arguments::parse(&arguments)?,
        })
    }
}

/// `None` where it is not set or empty.
pub(crate) fn bounded(
    variable: &dyn Fn(&str) -> Option<String>,
    name: &'static str,
) -> Result<Option<String>, EnvironmentError> {
    let value = variable(name).filter(|value| !value.is_empty());
    match value {
        Some(value) if value.len() > MAX_BYTES => Err(EnvironmentError::TooLong { name }),
        value => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_a_pod_or_none_at_all() {
        let pod = Arguments {
            namespace: "shop".into(),
            pod: "web".into(),
            uid: "u-1".into(),
        };
        let all = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u-1";
        for (text, parsed) in [
            (all, Ok(Some(pod))),
            ("", Ok(None)),
            (";;", Ok(None)),
            ("IgnoreUnknown=1", Ok(None)),
            (
                "IgnoreUnknown",
                Err(EnvironmentError::Argument("IgnoreUnknown".into())),
            ),
            (
                "K8S_POD_NAMESPACE=shop;K8S_POD_UID=u",
                Err(EnvironmentError::NotNamed("K8S_POD_NAME")),
            ),
            (
                "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web",
                Err(EnvironmentError::NotNamed("K8S_POD_UID")),
            ),
        ] {
            assert_eq!(Arguments::parse(text), parsed, "{text}");
        }
    }

    #[test]
    fn a_parameter_of_absurd_length_is_refused() {
        let variable = |name: &str| {
            Some(if name == "CNI_ARGS" {
                "A=b;".repeat(2000)
            } else {
                "x".into()
            })
        };
        let name = "CNI_ARGS";
        assert_eq!(
            Attachment::read(&variable),
            Err(EnvironmentError::TooLong { name })
        );
    }
}
