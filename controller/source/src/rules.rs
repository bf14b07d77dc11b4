// SPDX-License-Identifier: Apache-2.0
//! What labels say about enrolment: the one reading for the controller and for the CA.

use crate::cluster::{Cluster, Namespace, Pod, labels};
use podveil_model::{External, Mode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What holds where a namespace's labels say nothing. The controller and the CA are to be given the same.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// `permissive` or `strict`; label `podveil.io/mode`.
    mode: DefaultMode,
    /// `allow` or `refuse` that a pod opts out; label `podveil.io/pod-opt-out`. Never in strict.
    pod_opt_out: DefaultOptOut,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
enum DefaultMode {
    #[default]
    Permissive,
    Strict,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
enum DefaultOptOut {
    #[default]
    Allow,
    Refuse,
}

/// What holds for every pod of a namespace.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Rules {
    pub mode: Mode,
    /// May its pods opt out, where it is not strict?
    pub pod_opt_out: bool,
}

impl Rules {
    /// What counts where a value cannot be read and no good one is known: nobody is let out or let in by a typing error.
    pub const STRICTEST: Self = Self {
        mode: Mode::Strict,
        pod_opt_out: false,
    };
}

impl Defaults {
    pub fn rules(self) -> Rules {
        Rules {
            mode: match self.mode {
                DefaultMode::Permissive => Mode::Permissive,
                DefaultMode::Strict => Mode::Strict,
            },
            pod_opt_out: self.pod_opt_out == DefaultOptOut::Allow,
        }
    }
}

impl Default for Rules {
    fn default() -> Self {
        Defaults::default().rules()
    }
}

impl Namespace {
    /// Has the label that enrols, whatever becomes of it.
    pub fn is_labelled(&self) -> bool {
        self.labels
            .get(labels::ENROL)
            .is_some_and(|value| value == "true")
    }

    /// Are its pods enrolled, those apart that have a reason of their own not to be? See [`Cluster::enrolment`].
    pub fn enrols(&self) -> bool {
        self.is_labelled() && !self.own
    }

    /// `None` where nothing is said.
    ///
    /// # Errors
    /// For a value that is neither `allow` nor `refuse`.
    pub fn external(&self) -> Result<Option<External>, BadLabel> {
        self.one_of(
            labels::EXTERNAL,
            [("allow", External::Allow), ("refuse", External::Refuse)],
        )
    }

    /// `None` where nothing is said.
    ///
    /// # Errors
    /// For a value that is neither `permissive` nor `strict`.
    pub fn mode(&self) -> Result<Option<Mode>, BadLabel> {
        self.one_of(
            labels::MODE,
            [("permissive", Mode::Permissive), ("strict", Mode::Strict)],
        )
    }

    /// `None` where nothing is said.
    ///
    /// # Errors
    /// For a value that is neither `allow` nor `refuse`.
    pub fn pod_opt_out(&self) -> Result<Option<bool>, BadLabel> {
        self.one_of(labels::POD_OPT_OUT, [("allow", true), ("refuse", false)])
    }

    /// A value that cannot be read counts as in `last`, the rules of the namespace while it was enrolled before, else as
    /// in [`Rules::STRICTEST`]; the faults say which.
    pub fn rules(&self, last: Option<Rules>, defaults: Defaults) -> (Rules, Vec<BadLabel>) {
        let defaults = defaults.rules();
        let last = last.unwrap_or(Rules::STRICTEST);
        let mut bad = Vec::new();
        let rules = Rules {
            mode: read(self.mode(), defaults.mode, last.mode, &mut bad),
            pod_opt_out: read(
                self.pod_opt_out(),
                defaults.pod_opt_out,
                last.pod_opt_out,
                &mut bad,
            ),
        };
        (rules, bad)
    }

    fn one_of<T>(
        &self,
        label: &'static str,
        [(first, one), (second, other)]: [(&'static str, T); 2],
    ) -> Result<Option<T>, BadLabel> {
        match self.labels.get(label) {
            None => Ok(None),
            Some(value) if value == first => Ok(Some(one)),
            Some(value) if value == second => Ok(Some(other)),
            Some(value) => Err(BadLabel {
                label,
                value: value.clone(),
                known: [first, second],
            }),
        }
    }
}

fn read<T>(said: Result<Option<T>, BadLabel>, default: T, last: T, bad: &mut Vec<BadLabel>) -> T {
    match said {
        Ok(said) => said.unwrap_or(default),
        Err(fault) => {
            bad.push(fault);
            last
        }
    }
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("label {label} is {value:?}, not {:?} or {:?}", known[0], known[1])]
pub struct BadLabel {
    pub label: &'static str,
    pub value: String,
    known: [&'static str; 2],
}

impl Cluster {
    /// Should this pod be enrolled, by the labels as they stand?
    pub fn wants_enrolment(&self, pod: &Pod) -> bool {
        self.namespace(&pod.namespace).is_some_and(|namespace| {
            let (rules, _) = namespace.rules(None, self.defaults);
            self.enrolment(pod, namespace, rules).is_ok()
        })
    }

    /// The one rule about who is enrolled, for whoever has settled the namespace's rules.
    ///
    /// # Errors
    /// Why not.
    pub fn enrolment(
        &self,
        pod: &Pod,
        namespace: &Namespace,
        rules: Rules,
    ) -> Result<(), NotEnrolled> {
        if namespace.own {
            Err(NotEnrolled::OwnNamespace)
        } else if !namespace.is_labelled() {
            Err(NotEnrolled::NotLabelled)
        } else if self.released.is_some() {
            Err(NotEnrolled::Released)
        } else if pod.phase.is_finished() {
            Err(NotEnrolled::Finished)
        } else if pod.host_network {
            Err(NotEnrolled::HostNetwork)
        } else if rules.let_out(pod) {
            Err(NotEnrolled::OptedOut)
        } else {
            Ok(())
        }
    }
}

impl Rules {
    fn let_out(self, pod: &Pod) -> bool {
        pod.opts_out() && self.mode != Mode::Strict && self.pod_opt_out
    }
}

/// Why a pod is not enrolled.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum NotEnrolled {
    #[error("the pod has finished")]
    Finished,
    #[error("the pod shares its node's network")]
    HostNetwork,
    #[error("the namespace has no label io.cilium/mtls-enabled=true")]
    NotLabelled,
    #[error("the pod's label io.cilium/mtls-enabled=false opts out")]
    OptedOut,
    #[error("Podveil's own namespace is never enrolled")]
    OwnNamespace,
    #[error("Podveil is being uninstalled")]
    Released,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(labels: &[(&str, &str)]) -> Namespace {
        Namespace {
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..Namespace::default()
        }
    }

    #[test]
    fn a_label_comes_before_the_default_and_a_bad_one_keeps_the_last_good_or_is_the_strictest() {
        let strict: Defaults =
            serde_json::from_value(serde_json::json!({"mode": "strict", "pod_opt_out": "refuse"}))
                .unwrap();
        assert_eq!(
            namespace(&[]).rules(None, strict).0,
            Rules {
                mode: Mode::Strict,
                pod_opt_out: false
            }
        );
        let said = namespace(&[(labels::MODE, "permissive"), (labels::POD_OPT_OUT, "allow")]);
        assert_eq!(said.rules(None, strict).0, Rules::default());
        let bad = namespace(&[(labels::MODE, "Strict"), (labels::POD_OPT_OUT, "no")]);
        let (rules, faults) = bad.rules(Some(Rules::default()), strict);
        assert_eq!((rules, faults.len()), (Rules::default(), 2));
        let (rules, _) = bad.rules(None, Defaults::default());
        assert_eq!(rules, Rules::STRICTEST, "no good one is known");
        assert_eq!(
            faults[0].to_string(),
            r#"label podveil.io/mode is "Strict", not "permissive" or "strict""#
        );
    }
}
