// SPDX-License-Identifier: Apache-2.0
use crate::published::{Entry, Kind};
use bytes::{BufMut, Bytes, BytesMut};
use podveil_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use prost::Message;
use std::sync::Arc;

/// About as many bytes are put together at once: one frame of HTTP/2 as peers take them.
const CHUNK_BYTES: usize = 16 * 1024;
/// SPEC: before each message of gRPC stands whether it is compressed, and its length in four bytes.
pub(crate) const PREFIX_BYTES: usize = 5;
/// `DeltaDiscoveryResponse.resources`: field 2, length-delimited.
const RESOURCES_KEY: u8 = 2 << 3 | 2;

/// What one response says, by reference: the same may be on its way to thousands of nodes at once, and each of them may
/// take its time.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) version: String,
    pub(crate) kind: Kind,
    pub(crate) nonce: String,
    pub(crate) resources: Vec<Named>,
    pub(crate) removed: Vec<String>,
}

/// A resource, and by what other names it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub(crate) entry: Arc<Entry>,
    pub(crate) aliases: Vec<String>,
}

#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("a response of {bytes} bytes is longer than a message may be")]
pub(crate) struct TooLong {
    bytes: usize,
}

impl Response {
    /// As a message of gRPC, piece by piece.
    ///
    /// # Errors
    /// [`TooLong`]: no message is.
    pub(crate) fn into_chunks(self) -> Result<Chunks, TooLong> {
        // SPEC: Protobuf messages one behind the other are one message with the fields of all.
        let rest = DeltaDiscoveryResponse {
            system_version_info: self.version,
            resources: Vec::new(),
            type_url: self.kind.type_url().to_owned(),
            nonce: self.nonce,
            removed_resources: self.removed,
        };
        let resources: usize = self.resources.iter().map(Named::encoded_len).sum();
        let bytes = rest.encoded_len() + resources;
        let length = u32::try_from(bytes).map_err(|_| TooLong { bytes })?;
        let mut head = BytesMut::with_capacity(PREFIX_BYTES + rest.encoded_len());
        head.put_u8(0);
        head.put_u32(length);
        rest.encode_raw(&mut head);
        Ok(Chunks {
            head,
            resources: self.resources.into_iter(),
        })
    }
}

impl Named {
    fn aliases(&self) -> Resource {
        Resource {
            aliases: self.aliases.clone(),
            ..Resource::default()
        }
    }

    fn message_len(&self) -> usize {
        self.entry.wire.len() + self.aliases().encoded_len()
    }

    fn encoded_len(&self) -> usize {
        let length = self.message_len();
        1 + prost::length_delimiter_len(length) + length
    }

    fn encode(&self, buffer: &mut BytesMut) {
        buffer.put_u8(RESOURCES_KEY);
        prost::encode_length_delimiter(self.message_len(), buffer).expect("it grows as needed");
        buffer.put_slice(&self.entry.wire);
        self.aliases().encode_raw(buffer);
    }
}

/// The pieces of one message; each is made when it is asked for.
#[derive(Debug)]
pub(crate) struct Chunks {
    head: BytesMut,
    resources: std::vec::IntoIter<Named>,
}

impl Iterator for Chunks {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let mut chunk = std::mem::take(&mut self.head);
        while chunk.len() < CHUNK_BYTES {
            let Some(resource) = self.resources.next() else {
                break;
            };
            chunk.reserve(resource.encoded_len());
            resource.encode(&mut chunk);
        }
        (!chunk.is_empty()).then(|| chunk.freeze())
    }
}
