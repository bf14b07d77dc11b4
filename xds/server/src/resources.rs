// SPDX-License-Identifier: Apache-2.0
use crate::published::{Kind, Published};
use crate::{Publisher, Snapshot};
use podveil_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use prost::Message;

impl Snapshot {
    /// The whole of it as a new subscriber would receive it: one response for each type, in the order of sending.
    pub fn into_responses(self) -> Vec<DeltaDiscoveryResponse> {
        let published = Published::default()
            .next(self)
            .expect("the first snapshot always counts");
        published.responses()
    }
}

impl Publisher {
    /// The same for the snapshot in place; nothing before the first.
    pub fn responses(&self) -> Vec<DeltaDiscoveryResponse> {
        let published = self.subscribe().borrow().clone();
        published.map_or_else(Vec::new, |published| published.responses())
    }
}

impl Published {
    fn responses(&self) -> Vec<DeltaDiscoveryResponse> {
        [Kind::MeshConfig, Kind::Authorization, Kind::Address]
            .map(|kind| DeltaDiscoveryResponse {
                type_url: kind.type_url().to_owned(),
                resources: self
                    .set(kind)
                    .iter()
                    .map(|entry| Resource::decode(&*entry.wire).expect("it was encoded here"))
                    .collect(),
                ..Default::default()
            })
            .into()
    }
}

/// Each with its length before it, so that whoever asks a program what it knows reads it with the parser that nodes use.
pub fn delimited(responses: impl IntoIterator<Item = DeltaDiscoveryResponse>) -> Vec<u8> {
    let responses = responses.into_iter();
    responses
        .flat_map(|response| response.encode_length_delimited_to_vec())
        .collect()
}
