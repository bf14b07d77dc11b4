// SPDX-License-Identifier: Apache-2.0

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident => $label:literal, $flag:literal;)*) => {
        /// Why a connection was refused: a closed list, one label each in logs, metrics and flows.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The label in metrics, logs and flows.
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)* }
            }

            /// Istio's `response_flags`, so that existing dashboards count it where they look.
            pub fn response_flags(self) -> &'static str {
                match self { $(Self::$variant => $flag,)* }
            }
        }

        impl std::fmt::Display for DropReason {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.label())
            }
        }
    };
}

reasons! {
    /// The CONNECT's authority is missing, malformed or names something we never dial.
    BadTarget => "bad_target", "-";
    /// Our own certificate is not there, within the hold bound.
    CertificateMissing => "certificate_missing", "IDENTITY_ERROR";
    /// The destination application refused or did not answer.
    ConnectFailed => "connect_failed", "CONNECT";
    /// Outside the cluster, which this workload's namespace refuses.
    ExternalRefused => "external_refused", "DENY";
    /// The pool, the held connections or the streams of this pod are at their bound.
    LimitReached => "limit_reached", "-";
    /// Nothing is known about the destination although it may be inside the cluster.
    NotKnown => "not_known", "-";
    /// The kernel has no original destination for a captured connection.
    NoOriginalDestination => "no_original_destination", "-";
    /// The peer's address belongs to no workload of the identity it proved.
    PeerAddressMismatch => "peer_address_mismatch", "IDENTITY_ERROR";
    /// The peer's certificate was refused.
    PeerIdentity => "peer_identity", "TLS_FAILURE";
    /// Plain between two mandatory workloads.
    PlaintextMandatory => "plaintext_mandatory", "DENY";
    /// Plain where the mode is strict.
    PlaintextStrict => "plaintext_strict", "DENY";
    /// A policy denied it.
    PolicyDenied => "policy_denied", "DENY";
    /// The service has no endpoint that can take a connection.
    NoEndpoint => "no_endpoint", "-";
    /// A captured connection came from an address that is not the pod's own.
    SourceNotOwn => "source_not_own", "-";
    /// The tunnel could not be made: TCP, TLS or HTTP/2 failed or took too long.
    TunnelFailed => "tunnel_failed", "TLS_FAILURE";
    /// The other proxy refused the CONNECT.
    UpstreamRefused => "upstream_refused", "CONNECT";
    /// This pod's workload is not known here yet, within the hold bound.
    WorkloadNotKnown => "workload_not_known", "-";
}
