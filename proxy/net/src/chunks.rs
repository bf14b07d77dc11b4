// SPDX-License-Identifier: Apache-2.0
use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Pieces shorter than this are copied together: a queue entry and the buffer it would keep alive cost more.
const JOIN_BELOW: usize = 1024;
/// Joined pieces form blocks of this size.
const BLOCK: usize = 16 * 1024;

/// A queue of bytes between the two ends of one direction. Small pieces are joined, large ones are passed on as they
/// are. It has no bound of its own: the relay stops reading at [`crate::Duplex::READ_AHEAD`].
#[derive(Debug, Default)]
pub struct Chunks {
    queue: VecDeque<Bytes>,
    /// The last, still growing block; always behind `queue`.
    tail: BytesMut,
    bytes: usize,
}

impl Chunks {
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn push(&mut self, piece: Bytes) {
        self.bytes += piece.len();
        // The first piece is passed on as it is: with nothing queued there is nothing to join.
        let join = piece.len() < JOIN_BELOW && self.bytes != piece.len();
        if join && self.tail.len() + piece.len() <= BLOCK {
            self.tail.extend_from_slice(&piece);
            return;
        }
        if !self.tail.is_empty() {
            self.queue
                .push_back(std::mem::take(&mut self.tail).freeze());
        }
        if join {
            self.tail.extend_from_slice(&piece);
        } else {
            self.queue.push_back(piece);
        }
    }

    /// Takes at most `limit` bytes from the front without copying: one piece, perhaps a part of it.
    pub fn take(&mut self, limit: usize) -> Bytes {
        if self.queue.is_empty() && !self.tail.is_empty() {
            self.queue
                .push_back(std::mem::take(&mut self.tail).freeze());
        }
        let Some(front) = self.queue.front_mut() else {
            return Bytes::new();
        };
        let piece = if front.len() <= limit {
            self.queue.pop_front().unwrap_or_default()
        } else {
            front.split_to(limit)
        };
        self.bytes -= piece.len();
        piece
    }

    /// Fills `slices` from the front, for one vectored write; says how many were filled.
    pub fn io_slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pieces = self.queue.iter().map(|piece| &piece[..]);
        let tail = Some(&self.tail[..]).filter(|tail| !tail.is_empty());
        let mut filled = 0;
        for (slice, piece) in slices.iter_mut().zip(pieces.chain(tail)) {
            *slice = IoSlice::new(piece);
            filled += 1;
        }
        filled
    }

    /// Drops `bytes` from the front; they were written.
    ///
    /// # Panics
    /// If there are not so many: a write cannot take more than it was given.
    pub fn advance(&mut self, mut bytes: usize) {
        assert!(bytes <= self.bytes, "no more is written than was queued");
        self.bytes -= bytes;
        while bytes > 0 {
            let Some(front) = self.queue.front_mut() else {
                self.tail.advance(bytes);
                return;
            };
            if front.len() > bytes {
                front.advance(bytes);
                return;
            }
            bytes -= front.len();
            self.queue.pop_front();
        }
    }

    /// Gives back what memory an empty queue still holds.
    pub fn release(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(chunks: &mut Chunks) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !chunks.is_empty() {
            bytes.extend_from_slice(&chunks.take(7));
        }
        bytes
    }

    #[test]
    fn order_is_kept_whatever_the_sizes() {
        let mut chunks = Chunks::default();
        let mut expected = Vec::new();
        for (index, size) in [3000, 5, 900, 1024, 1, 40_000, 700, 800].iter().enumerate() {
            let piece = vec![index as u8; *size];
            expected.extend_from_slice(&piece);
            chunks.push(piece.into());
        }
        assert_eq!(chunks.len(), expected.len());
        let mut slices = [IoSlice::new(&[]); 16];
        let filled = chunks.io_slices(&mut slices);
        let gathered: Vec<u8> = slices[..filled].iter().flat_map(|s| s.to_vec()).collect();
        assert_eq!(gathered, expected);
        chunks.advance(3003);
        assert_eq!(all(&mut chunks), expected[3003..]);
    }

    #[test]
    fn small_pieces_behind_others_are_joined() {
        let mut chunks = Chunks::default();
        for _ in 0..10_000 {
            chunks.push(Bytes::from_static(b"x"));
        }
        assert_eq!(chunks.len(), 10_000);
        assert!(chunks.queue.len() <= 2);
        chunks.advance(10_000);
        assert!(chunks.is_empty());
        chunks.release();
        assert_eq!(chunks.tail.capacity(), 0);
    }
}
