// SPDX-License-Identifier: Apache-2.0
use crate::{IdentityError, KubernetesName, SpiffeId, TrustDomain};
use std::fmt;

/// One of Podveil's own programs. Of another shape than any workload, so `CreateCertificate` can never issue it.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum ProgramIdentity {
    Ca,
    Controller,
    /// The node program on this node, whatever modules it runs.
    Node(KubernetesName),
}

impl ProgramIdentity {
    pub fn spiffe_id(&self, trust_domain: &TrustDomain) -> SpiffeId {
        let segments: &[&str] = match self {
            Self::Ca => &["podveil", "ca"],
            Self::Controller => &["podveil", "controller"],
            Self::Node(node) => &["podveil", "node", node.as_str()],
        };
        SpiffeId::from_segments(trust_domain.clone(), segments).expect(
            "Kubernetes names are legal path segments and too short to pass the length limit",
        )
    }
}

impl TryFrom<&SpiffeId> for ProgramIdentity {
    type Error = IdentityError;

    fn try_from(id: &SpiffeId) -> Result<Self, IdentityError> {
        let not_a_program = || IdentityError::NotAProgram { id: id.clone() };
        match id.path() {
            "/podveil/ca" => Ok(Self::Ca),
            "/podveil/controller" => Ok(Self::Controller),
            path => {
                let node = path
                    .strip_prefix("/podveil/node/")
                    .ok_or_else(not_a_program)?;
                node.parse().map(Self::Node).map_err(|_| not_a_program())
            }
        }
    }
}

impl fmt::Display for ProgramIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ca => f.write_str("podveil-ca"),
            Self::Controller => f.write_str("podveil-controller"),
            Self::Node(node) => write!(f, "podveil-node on {node}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_id_is_parsed_and_built_again() {
        let trust_domain = TrustDomain::new("cluster.local").unwrap();
        for program in [
            ProgramIdentity::Ca,
            ProgramIdentity::Controller,
            ProgramIdentity::Node("n1".parse().unwrap()),
        ] {
            assert_eq!(
                ProgramIdentity::try_from(&program.spiffe_id(&trust_domain)),
                Ok(program)
            );
        }
    }

    #[test]
    fn a_workload_is_not_a_program() {
        for text in [
            "spiffe://td/ns/a/sa/b",
            "spiffe://td/podveil",
            "spiffe://td/podveil/node/a/b",
            "spiffe://td/podveil/node",
        ] {
            let id = SpiffeId::new(text).unwrap();
            assert!(ProgramIdentity::try_from(&id).is_err(), "{text} was taken");
        }
    }
}
