// SPDX-License-Identifier: Apache-2.0
use super::AskRefused;
use podveil_model::Lookup;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Questions, by their names on the wire. Bounded; when it is full, questions that were never answered within the
/// timeout make room, then further ones are refused.
#[derive(Debug)]
pub(super) struct Asked {
    questions: BTreeMap<String, Question>,
    unsent: BTreeSet<String>,
    /// On demand: what was answered is kept, because nothing else keeps it up to date.
    kept: Option<Kept>,
    limit: usize,
    timeout: Duration,
}

#[derive(Debug)]
struct Question {
    lookup: Lookup,
    at: Instant,
    answer: Answer,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Answer {
    /// Still to come.
    Open,
    Nobody,
    Somebody,
}

/// On demand: which of the questions mean a resource. One that none means any more is loose: it is not kept up to date.
#[derive(Debug, Default)]
struct Kept {
    meant_by: HashMap<Arc<str>, BTreeSet<String>>,
    loose: BTreeSet<Arc<str>>,
}

impl Asked {
    pub(super) fn new(keep: bool, limit: usize, timeout: Duration) -> Self {
        Self {
            questions: BTreeMap::new(),
            unsent: BTreeSet::new(),
            kept: keep.then(Kept::default),
            limit,
            timeout,
        }
    }

    pub(super) fn ask(&mut self, now: Instant, lookup: Lookup) -> Result<(), AskRefused> {
        let wire = lookup.to_string();
        if let Some(question) = self.questions.get_mut(&wire) {
            let answered = question.answer != Answer::Open && self.kept.is_some();
            if answered || now.duration_since(question.at) < self.timeout {
                return Ok(());
            }
            question.at = now;
        } else {
            if self.questions.len() >= self.limit {
                self.make_room(now)?;
            }
            let question = Question {
                lookup,
                at: now,
                answer: Answer::Open,
            };
            self.questions.insert(wire.clone(), question);
        }
        self.unsent.insert(wire);
        Ok(())
    }

    fn make_room(&mut self, now: Instant) -> Result<(), AskRefused> {
        let timeout = self.timeout;
        let is_waited_for =
            |one: &Question| one.answer != Answer::Open || now.duration_since(one.at) < timeout;
        self.questions.retain(|_, one| is_waited_for(one));
        self.unsent.retain(|wire| self.questions.contains_key(wire));
        if self.questions.len() < self.limit {
            return Ok(());
        }
        Err(AskRefused { limit: self.limit })
    }

    /// These are not asked any more; their names on the wire, where they were.
    pub(super) fn forget(&mut self, lookups: &[Lookup]) -> Vec<String> {
        let (mut asked, mut meant) = (Vec::new(), HashSet::new());
        for wire in lookups.iter().map(ToString::to_string) {
            let Some(question) = self.questions.remove(&wire) else {
                continue;
            };
            self.unsent.remove(&wire);
            if question.answer == Answer::Somebody {
                meant.insert(wire.clone());
            }
            asked.push(wire);
        }
        if let Some(kept) = &mut self.kept {
            kept.mean_nobody(&meant);
        }
        asked
    }

    /// A name was among the removed: if it was asked for, it means nobody now. On demand, what it meant before may be loose.
    pub(super) fn nobody(&mut self, name: &str) -> Option<Lookup> {
        self.unsent.remove(name);
        let Some(kept) = &mut self.kept else {
            return self.questions.remove(name).map(|question| question.lookup);
        };
        kept.gone(name);
        let question = self.questions.get_mut(name)?;
        if std::mem::replace(&mut question.answer, Answer::Nobody) == Answer::Somebody {
            kept.mean_nobody(&HashSet::from([name.to_owned()]));
        }
        Some(question.lookup.clone())
    }

    /// A resource came, with every name that it was asked by. Returns those that are answered by it; on demand `None` where
    /// nothing that is asked means it.
    pub(super) fn told(&mut self, name: &Arc<str>, aliases: &[String]) -> Option<Vec<String>> {
        let names = aliases.iter().map(String::as_str).chain([&**name]);
        let asked: BTreeSet<String> = names
            .filter(|name| self.questions.contains_key(*name))
            .map(ToOwned::to_owned)
            .collect();
        let answered = asked.iter().cloned().collect();
        if let Some(kept) = &mut self.kept {
            if asked.is_empty() {
                kept.gone(name);
                return None;
            }
            kept.loose.remove(name);
            kept.meant_by.insert(name.clone(), asked);
        }
        Some(answered)
    }

    /// Everything that answers this question has come. On demand, the question where that is news.
    pub(super) fn answered(&mut self, wire: &str) -> Option<Lookup> {
        self.unsent.remove(wire);
        if self.kept.is_none() {
            self.questions.remove(wire);
            return None;
        }
        let question = self.questions.get_mut(wire)?;
        let before = std::mem::replace(&mut question.answer, Answer::Somebody);
        (before != Answer::Somebody).then(|| question.lookup.clone())
    }

    pub(super) fn has_loose(&self) -> bool {
        self.kept
            .as_ref()
            .is_some_and(|kept| !kept.loose.is_empty())
    }

    /// Resources that came and that nothing means any more.
    pub(super) fn take_loose(&mut self) -> BTreeSet<Arc<str>> {
        let kept = self.kept.as_mut();
        kept.map(|kept| std::mem::take(&mut kept.loose))
            .unwrap_or_default()
    }

    /// A new stream knows nothing of what was asked on the last. On demand it is told with what is held.
    pub(super) fn ask_all_again(&mut self) {
        self.unsent = match self.kept {
            Some(_) => BTreeSet::new(),
            None => self.questions.keys().cloned().collect(),
        };
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub(super) fn take_unsent(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unsent).into_iter().collect()
    }

    /// Every question, and what it was answered: empty where that is still to come.
    pub(super) fn answers(&self) -> impl Iterator<Item = (&String, &'static str)> {
        self.questions.iter().map(|(wire, question)| {
            let answer = match question.answer {
                Answer::Open => "",
                Answer::Nobody => "-",
                Answer::Somebody => "+",
            };
            (wire, answer)
        })
    }
}

impl Kept {
    /// Nothing is to be done about this resource any more.
    fn gone(&mut self, name: &str) {
        self.meant_by.remove(name);
        self.loose.remove(name);
    }

    /// These questions mean nothing any more.
    fn mean_nobody(&mut self, questions: &HashSet<String>) {
        if questions.is_empty() {
            return;
        }
        let Self { meant_by, loose } = self;
        meant_by.retain(|name, wires| {
            wires.retain(|wire| !questions.contains(wire));
            if wires.is_empty() {
                loose.insert(name.clone());
            }
            !wires.is_empty()
        });
    }
}
