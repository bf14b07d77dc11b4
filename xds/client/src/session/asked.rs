// SPDX-License-Identifier: Apache-2.0
use super::AskRefused;
use crate::Key;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Questions on demand, by the key's wire form. Bounded; when it is full, questions that were never answered within
/// the timeout make room, then further ones are refused.
#[derive(Debug)]
pub(super) struct Asked {
    questions: BTreeMap<String, Question>,
    unsent: BTreeSet<String>,
    /// Keep what was answered, because nothing else keeps it up to date.
    keep: bool,
    limit: usize,
    timeout: Duration,
}

#[derive(Debug)]
struct Question {
    key: Key,
    at: Instant,
    open: bool,
}

impl Asked {
    pub(super) fn new(keep: bool, limit: usize, timeout: Duration) -> Self {
        Self {
            questions: BTreeMap::new(),
            unsent: BTreeSet::new(),
            keep,
            limit,
            timeout,
        }
    }

    pub(super) fn ask(&mut self, now: Instant, key: Key) -> Result<(), AskRefused> {
        let wire = key.to_string();
        if let Some(question) = self.questions.get(&wire) {
            let waiting = question.open && now.duration_since(question.at) < self.timeout;
            if waiting {
                return Ok(());
            }
        } else if self.questions.len() >= self.limit {
            let timeout = self.timeout;
            self.questions
                .retain(|_, one| !one.open || now.duration_since(one.at) < timeout);
            self.unsent.retain(|wire| self.questions.contains_key(wire));
            if self.questions.len() >= self.limit {
                return Err(AskRefused { limit: self.limit });
            }
        }
        self.unsent.insert(wire.clone());
        let question = Question {
            key,
            at: now,
            open: true,
        };
        self.questions.insert(wire, question);
        Ok(())
    }

    /// A name or an alias was answered. Returns the key if it had been asked for.
    pub(super) fn answered(&mut self, wire: &str) -> Option<Key> {
        self.unsent.remove(wire);
        if self.keep {
            let question = self.questions.get_mut(wire)?;
            question.open = false;
            Some(question.key.clone())
        } else {
            self.questions.remove(wire).map(|question| question.key)
        }
    }

    /// A new stream knows nothing of what was asked on the last.
    pub(super) fn ask_all_again(&mut self) {
        self.unsent = self.questions.keys().cloned().collect();
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub(super) fn take_unsent(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unsent).into_iter().collect()
    }

    /// Questions whose answer is still to come.
    pub(super) fn open(&self) -> impl Iterator<Item = &String> {
        self.questions
            .iter()
            .filter(|(_, question)| question.open)
            .map(|(wire, _)| wire)
    }
}
