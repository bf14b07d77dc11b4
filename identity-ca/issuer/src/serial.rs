// SPDX-License-Identifier: Apache-2.0
use std::fmt;
use std::str::FromStr;

/// 16 random bytes whose first is 1 to 127: positive, never shortened by DER, and 2^127 - 2^120 of them.
/// The same key asked for twice gets two serials, so one can be revoked without the other.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Serial([u8; 16]);

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SerialError {
    #[error("a serial is 32 hexadecimal digits beginning with 01 to 7f")]
    Malformed,
    #[error("the system gave no random bytes")]
    NoRandomness,
}

impl Serial {
    pub(crate) fn random() -> Result<Self, SerialError> {
        let mut bytes = [0; 16];
        loop {
            aws_lc_rs::rand::fill(&mut bytes).map_err(|_| SerialError::NoRandomness)?;
            bytes[0] &= 0x7f;
            if bytes[0] != 0 {
                return Ok(Self(bytes));
            }
        }
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl TryFrom<&[u8]> for Serial {
    type Error = SerialError;

    /// From the content octets of the DER INTEGER.
    fn try_from(bytes: &[u8]) -> Result<Self, SerialError> {
        let bytes: [u8; 16] = bytes.try_into().map_err(|_| SerialError::Malformed)?;
        match bytes[0] {
            0x01..=0x7f => Ok(Self(bytes)),
            _ => Err(SerialError::Malformed),
        }
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SerialError::Malformed);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| SerialError::Malformed)?;
        Self::try_from(number.to_be_bytes().as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_read_as_it_was_written() {
        let serial = Serial::random().unwrap();
        assert_eq!(serial.to_string().parse(), Ok(serial));
        assert_ne!(serial, Serial::random().unwrap());
    }

    #[test]
    fn a_serial_of_another_form_is_refused() {
        for text in [
            "",
            "01",
            "00000000000000000000000000000001",
            "80000000000000000000000000000001",
            "+1000000000000000000000000000001",
        ] {
            assert_eq!(
                text.parse::<Serial>(),
                Err(SerialError::Malformed),
                "{text}"
            );
        }
    }
}
