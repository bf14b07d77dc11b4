// SPDX-License-Identifier: Apache-2.0
use crate::response::{Chunks, Response};
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::sync::mpsc;
use tonic::Status;

/// The responses of one stream as the body of an HTTP/2 response.
///
/// A response is turned into bytes as the connection takes them, a frame at a time, so that a node that is slow, or a
/// thousand that come at once, cost no copy of what they are sent.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    responses: mpsc::Receiver<Result<Response, Status>>,
    sending: Option<Chunks>,
    is_over: bool,
}

impl ResponseBody {
    pub(crate) fn new(responses: mpsc::Receiver<Result<Response, Status>>) -> Self {
        Self {
            responses,
            sending: None,
            is_over: false,
        }
    }

    fn end(&mut self, status: &Status) -> Result<Frame<Bytes>, Status> {
        self.is_over = true;
        let mut trailers = HeaderMap::new();
        status.add_header(&mut trailers)?;
        Ok(Frame::trailers(trailers))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.is_over {
                return Poll::Ready(None);
            }
            if let Some(chunk) = self.sending.as_mut().and_then(Chunks::next) {
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            self.sending = None;
            let end = match ready!(self.responses.poll_recv(context)) {
                Some(Ok(response)) => match response.into_chunks() {
                    Ok(chunks) => {
                        self.sending = Some(chunks);
                        continue;
                    }
                    Err(error) => Status::resource_exhausted(error.to_string()),
                },
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            return Poll::Ready(Some(self.end(&end)));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}
