// SPDX-License-Identifier: Apache-2.0
use podveil_ca_client::transport::Peer;
use podveil_identity::{KubernetesName, ProgramIdentity};
use tonic::{Extensions, Status};

/// The node that the transport proved the caller to be.
///
/// # Errors
/// `Unauthenticated` without a proof, `PermissionDenied` for anyone but a node.
pub(crate) fn node(extensions: &Extensions) -> Result<KubernetesName, Status> {
    let id = extensions
        .get::<Peer>()
        .and_then(|peer| peer.id.as_ref())
        .ok_or_else(|| Status::unauthenticated("no certificate was shown"))?;
    match ProgramIdentity::try_from(id) {
        Ok(ProgramIdentity::Node(node)) => Ok(node),
        Ok(ProgramIdentity::Ca | ProgramIdentity::Controller) | Err(_) => {
            tracing::warn!(%id, "refused a caller that is not a node");
            Err(Status::permission_denied("only nodes are served"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_identity::SpiffeId;

    #[test]
    fn only_nodes_are_let_in() {
        for (id, expected) in [
            (Some("spiffe://td/podveil/node/n1"), Ok("n1")),
            (
                Some("spiffe://td/podveil/ca"),
                Err(tonic::Code::PermissionDenied),
            ),
            (
                Some("spiffe://td/podveil/controller"),
                Err(tonic::Code::PermissionDenied),
            ),
            (
                Some("spiffe://td/ns/shop/sa/web"),
                Err(tonic::Code::PermissionDenied),
            ),
            (None, Err(tonic::Code::Unauthenticated)),
        ] {
            let mut extensions = Extensions::new();
            extensions.insert(Peer {
                id: id.map(|id| SpiffeId::new(id).unwrap()),
                address: "127.0.0.1:1".parse().unwrap(),
            });
            let node = node(&extensions);
            let got = node
                .as_ref()
                .map(KubernetesName::as_str)
                .map_err(Status::code);
            assert_eq!(got, expected, "{id:?}");
        }
    }
}
