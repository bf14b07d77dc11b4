// SPDX-License-Identifier: Apache-2.0
//! Bytes that tell their own place in a stream, so that a lost, doubled or swapped piece shows.

/// The byte at `offset` of the stream.
fn byte(offset: u64) -> u8 {
    // The high byte of a multiplicative hash: differs from its neighbours and has no short period.
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Fills `buffer` with the stream's bytes from `offset` on.
pub fn fill(offset: u64, buffer: &mut [u8]) {
    for (place, value) in (offset..).zip(buffer) {
        *value = byte(place);
    }
}

/// Where `buffer`, read at `offset` of the stream, first differs from it.
pub fn first_difference(offset: u64, buffer: &[u8]) -> Option<u64> {
    (offset..)
        .zip(buffer)
        .find(|(place, value)| byte(*place) != **value)
        .map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swapped_piece_is_seen() {
        let mut buffer = [0; 4096];
        fill(1000, &mut buffer);
        assert_eq!(first_difference(1000, &buffer), None);
        assert_eq!(first_difference(1001, &buffer), Some(1001));
        buffer.swap(17, 18);
        assert_eq!(first_difference(1000, &buffer), Some(1017));
    }
}
