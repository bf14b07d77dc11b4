// SPDX-License-Identifier: Apache-2.0
use crate::ResourceType;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the client has received and how its streams ended, since it was started.
#[derive(Debug, Default)]
pub struct Counts {
    /// By the order of [`ResourceType::ALL`]: messages, and their bytes.
    received: [(AtomicU64, AtomicU64); ResourceType::ALL.len()],
    terminations: [AtomicU64; Termination::ALL.len()],
}

/// How a stream, or the attempt to open one, ended. The labels are the peers'.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Termination {
    /// The server ended it.
    Complete,
    /// It could not be opened.
    ConnectionError,
    /// It broke.
    Error,
}

impl Termination {
    pub const ALL: [Self; 3] = [Self::Complete, Self::ConnectionError, Self::Error];

    pub fn label(self) -> &'static str {
        match self {
            Self::Complete => "Complete",
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
        }
    }
}

impl Counts {
    /// Messages of this type.
    pub fn messages(&self, resource_type: ResourceType) -> u64 {
        self.of(resource_type)
            .map_or(0, |(messages, _)| messages.load(Ordering::Relaxed))
    }

    /// The bytes of those messages, as they are encoded.
    pub fn message_bytes(&self, resource_type: ResourceType) -> u64 {
        self.of(resource_type)
            .map_or(0, |(_, bytes)| bytes.load(Ordering::Relaxed))
    }

    pub fn terminations(&self, how: Termination) -> u64 {
        let mut all = Termination::ALL.iter().zip(&self.terminations);
        let found = all.find(|(one, _)| **one == how);
        found.map_or(0, |(_, count)| count.load(Ordering::Relaxed))
    }

    pub(crate) fn received(&self, type_url: &str, bytes: usize) {
        let resource_type = ResourceType::from_type_url(type_url);
        if let Some((messages, all_bytes)) = resource_type.and_then(|one| self.of(one)) {
            messages.fetch_add(1, Ordering::Relaxed);
            all_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn terminated(&self, how: Termination) {
        let all = Termination::ALL.iter().zip(&self.terminations);
        for (_, count) in all.filter(|(one, _)| **one == how) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn of(&self, resource_type: ResourceType) -> Option<&(AtomicU64, AtomicU64)> {
        let mut all = ResourceType::ALL.iter().zip(&self.received);
        let (_, counts) = all.find(|(one, _)| **one == resource_type)?;
        Some(counts)
    }
}
