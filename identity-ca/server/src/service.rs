// SPDX-License-Identifier: Apache-2.0
//! The gRPC services: from the wire's types into ours and back, nothing decided here.

mod admin;
mod bundles;
mod certificates;

pub(crate) use admin::AdminService;
pub(crate) use bundles::BundlesService;
pub(crate) use certificates::CertificatesService;

use podveil_ca_client::transport::Peer;
use podveil_identity::SpiffeId;
use tonic::Request;

/// Who the connection's certificate proved the caller to be.
fn peer<T>(request: &Request<T>) -> Option<SpiffeId> {
    request.extensions().get::<Peer>()?.id.clone()
}
