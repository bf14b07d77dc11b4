// SPDX-License-Identifier: Apache-2.0
//! Wire types, generated from `proto/` and committed (`cargo xtask codegen`, checked in CI).
//!
//! Nothing here interprets anything: the crate that receives a message is the only one that parses it, by `TryFrom`
//! into the types of `core/`.

#![forbid(unsafe_code)]
#![expect(missing_docs, reason = "the .proto files carry the documentation")]
#![expect(
    clippy::allow_attributes_without_reason,
    clippy::doc_markdown,
    clippy::large_enum_variant,
    reason = "generated code"
)]

/// Workloads and services as Istio's and Cilium's control planes send them.
pub mod istio {
    pub mod security {
        include!("generated/istio.security.rs");
    }
    pub mod workload {
        include!("generated/istio.workload.rs");
        pub mod zds {
            include!("generated/istio.workload.zds.rs");
        }
    }
    pub mod v1 {
        pub mod auth {
            include!("generated/istio.v1.auth.rs");
        }
    }
}

/// The incremental discovery service.
pub mod envoy {
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                include!("generated/envoy.service.discovery.v3.rs");
            }
        }
    }
}

pub mod google {
    pub mod rpc {
        include!("generated/google.rpc.rs");
    }
}

/// Podveil's own services.
pub mod podveil {
    pub mod ca {
        pub mod v1 {
            include!("generated/podveil.ca.v1.rs");
        }
    }
    pub mod node {
        pub mod v1 {
            include!("generated/podveil.node.v1.rs");
        }
    }
}

/// Workloads in one [`Awaited`](podveil::node::v1::Awaited); more is not the protocol.
pub const MAX_AWAITED: usize = 1000;

/// Key in a subscriber's node metadata, and its one value: of all workloads and services only workloads, and of their changes
/// only those that concern whoever captures them. A control plane that does not know it sends everything.
pub const TAKES: &str = "PODVEIL_TAKES";
pub const TAKES_CAPTURED: &str = "captured";

/// Type URLs of the xDS resources.
pub mod type_url {
    pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
    pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
    pub const MESH_CONFIG: &str = "type.googleapis.com/podveil.node.v1.MeshConfig";
    /// `Service.extensions[].config`; its name is [`super::SERVICE_EXTENSION`].
    pub const SERVICE_EXTENSION: &str = "type.googleapis.com/podveil.node.v1.ServiceExtension";
    /// `Workload.extensions[].config`; its name is [`super::WORKLOAD_EXTENSION`].
    pub const WORKLOAD_EXTENSION: &str = "type.googleapis.com/podveil.node.v1.WorkloadExtension";
}

/// Name of our extension in `istio.workload.Service.extensions`.
pub const SERVICE_EXTENSION: &str = "podveil.io/service";
/// Name of our extension in `istio.workload.Workload.extensions`.
pub const WORKLOAD_EXTENSION: &str = "podveil.io/workload";
