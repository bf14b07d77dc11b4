// SPDX-License-Identifier: Apache-2.0
use crate::response::PREFIX_BYTES;
use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use podveil_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use prost::Message;
use tonic::Status;
use tonic::body::Body;

/// A reconnecting subscriber names every resource it holds in one request.
const MAX_REQUEST_BYTES: usize = 64 << 20;

/// The requests of one stream, read from the body of an HTTP/2 request.
///
/// In place of tonic's reader, which keeps room for the longest request as long as the stream lives: the first of a node
/// that comes back is megabytes long, all later ones are bytes.
#[derive(Debug)]
pub(crate) struct Requests {
    body: Body,
    received: BytesMut,
}

impl Requests {
    pub(crate) fn new(body: Body) -> Self {
        Self {
            body,
            received: BytesMut::new(),
        }
    }

    /// The next one; `None` when the subscriber has ended the stream. CANCEL: nothing is lost.
    ///
    /// # Errors
    /// What the subscriber is to be told: the connection is lost, or what came is no request.
    pub(crate) async fn next(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        loop {
            if let Some(request) = self.take()? {
                return Ok(Some(request));
            }
            match self.body.frame().await.transpose()? {
                Some(frame) => {
                    if let Ok(data) = frame.into_data() {
                        self.received.extend_from_slice(&data);
                    }
                }
                None if self.received.is_empty() => return Ok(None),
                None => return Err(Status::invalid_argument("the last request is cut off")),
            }
        }
    }

    /// The first of those received, once all of it is there.
    fn take(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        let Some((prefix, rest)) = self.received.split_first_chunk::<PREFIX_BYTES>() else {
            return Ok(None);
        };
        let [compressed, length @ ..] = *prefix;
        if compressed != 0 {
            return Err(Status::unimplemented("a compressed request"));
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_REQUEST_BYTES {
            let reason = format!("a request of {length} bytes; {MAX_REQUEST_BYTES} are read");
            return Err(Status::resource_exhausted(reason));
        }
        let Some(message) = rest.get(..length) else {
            return Ok(None);
        };
        let request = DeltaDiscoveryRequest::decode(message)
            .map_err(|error| Status::invalid_argument(format!("no request: {error}")))?;
        self.received.advance(PREFIX_BYTES + length);
        if self.received.is_empty() {
            self.received = BytesMut::new();
        }
        Ok(Some(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::Full;

    fn message(request: &DeltaDiscoveryRequest) -> Vec<u8> {
        let message = request.encode_to_vec();
        let length = (message.len() as u32).to_be_bytes();
        [&[0][..], &length, &message].concat()
    }

    fn naming(names: usize) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            initial_resource_versions: (0..names)
                .map(|name| (name.to_string(), "version".to_owned()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    fn received(bytes: Vec<u8>) -> Requests {
        Requests::new(Body::new(Full::new(Bytes::from(bytes))))
    }

    #[tokio::test]
    async fn a_long_request_leaves_no_room_behind() {
        let (long, short) = (naming(10_000), naming(1));
        let mut requests = received([message(&long), message(&short)].concat());
        assert_eq!(requests.next().await.unwrap(), Some(long));
        assert_eq!(requests.next().await.unwrap(), Some(short));
        assert_eq!(requests.received.capacity(), 0);
        assert_eq!(requests.next().await.unwrap(), None);
    }

    #[test]
    fn a_request_that_comes_in_pieces_is_read_when_it_is_whole() {
        let mut requests = received(Vec::new());
        let request = naming(3);
        let bytes = message(&request);
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(requests.take().unwrap(), None, "after {at} bytes");
            requests.received.extend_from_slice(&[*byte]);
        }
        assert_eq!(requests.take().unwrap(), Some(request));
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused() {
        use tonic::Code::{InvalidArgument, ResourceExhausted, Unimplemented};
        let mut cut_off = message(&naming(3));
        cut_off.pop();
        for (bytes, code) in [
            (vec![1, 0, 0, 0, 0], Unimplemented),
            (vec![0, 0xff, 0xff, 0xff, 0xff], ResourceExhausted),
            (vec![0, 0, 0, 0, 1, 0xff], InvalidArgument),
            (vec![0, 0, 0], InvalidArgument),
            (cut_off, InvalidArgument),
        ] {
            let error = received(bytes.clone()).next().await.unwrap_err();
            assert_eq!(error.code(), code, "{bytes:?}");
        }
    }
}
