// SPDX-License-Identifier: Apache-2.0
use crate::Snapshot;
use crate::published::{Kind, Published};
use podveil_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use prost::Message;

impl Snapshot {
    /// The whole of it as a new subscriber would receive it: one response for each type, in the order of sending.
    pub fn into_responses(self) -> Vec<DeltaDiscoveryResponse> {
        let published = Published::default()
            .next(self)
            .expect("the first snapshot always counts");
        [Kind::MeshConfig, Kind::Authorization, Kind::Address]
            .map(|kind| DeltaDiscoveryResponse {
                type_url: kind.type_url().to_owned(),
                resources: published
                    .set(kind)
                    .iter()
                    .map(|entry| Resource::decode(&*entry.wire).expect("it was encoded here"))
                    .collect(),
                ..Default::default()
            })
            .into()
    }
}
