// SPDX-License-Identifier: Apache-2.0
use super::AskRefused;
use crate::Update;
use podveil_model::{Lookup, Question, digest};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Lookups that are asked for, by their text. Bounded; when it is full, those that were never answered within the timeout
/// make room, then further ones are refused.
///
/// On demand they go on the wire with a number, another one each time: what the server still sends for an earlier time, before
/// it hears that that was given up, is no answer.
#[derive(Debug)]
pub(super) struct Asked {
    questions: BTreeMap<String, Asking>,
    unsent: BTreeSet<String>,
    /// On demand: what was answered is kept, because nothing else keeps it up to date.
    kept: Option<Kept>,
    numbers: u64,
    limit: usize,
    timeout: Duration,
}

#[derive(Debug)]
struct Asking {
    lookup: Lookup,
    number: u64,
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
    forgotten: Vec<Lookup>,
}

impl Asked {
    pub(super) fn new(keep: bool, limit: usize, timeout: Duration) -> Self {
        Self {
            questions: BTreeMap::new(),
            unsent: BTreeSet::new(),
            kept: keep.then(Kept::default),
            numbers: 0,
            limit,
            timeout,
        }
    }

    pub(super) fn ask(&mut self, now: Instant, lookup: Lookup) -> Result<(), AskRefused> {
        let about = lookup.to_string();
        if let Some(question) = self.questions.get_mut(&about) {
            let answered = question.answer != Answer::Open && self.kept.is_some();
            if answered || now.duration_since(question.at) < self.timeout {
                return Ok(());
            }
            question.at = now;
        } else {
            if self.questions.len() >= self.limit {
                self.make_room(now)?;
            }
            self.numbers += 1;
            let question = Asking {
                lookup,
                number: self.numbers,
                at: now,
                answer: Answer::Open,
            };
            self.questions.insert(about.clone(), question);
        }
        self.unsent.insert(about);
        Ok(())
    }

    fn make_room(&mut self, now: Instant) -> Result<(), AskRefused> {
        let timeout = self.timeout;
        let is_waited_for =
            |one: &Asking| one.answer != Answer::Open || now.duration_since(one.at) < timeout;
        self.questions.retain(|_, one| is_waited_for(one));
        self.unsent
            .retain(|about| self.questions.contains_key(about));
        if self.questions.len() < self.limit {
            return Ok(());
        }
        Err(AskRefused { limit: self.limit })
    }

    /// How a question is called on the wire.
    fn name(&self, about: &str, question: &Asking) -> String {
        let number = question.number;
        match self.kept {
            Some(_) => Question { about, number }.to_string(),
            None => about.to_owned(),
        }
    }

    /// What a name on the wire is about, if it is that of a question that is asked now.
    fn about<'a>(&self, name: &'a str) -> Option<&'a str> {
        let (about, number) = match self.kept {
            Some(_) => Question::parse(name).map(|one| (one.about, Some(one.number)))?,
            None => (name, None),
        };
        let question = self.questions.get(about)?;
        (number.is_none_or(|number| number == question.number)).then_some(about)
    }

    /// These are not asked any more; their names on the wire, where they were.
    pub(super) fn forget(&mut self, lookups: Vec<Lookup>) -> Vec<String> {
        let (mut names, mut meant) = (Vec::new(), HashSet::new());
        for lookup in lookups {
            let about = lookup.to_string();
            if let Some(question) = self.questions.remove(&about) {
                self.unsent.remove(&about);
                names.push(self.name(&about, &question));
                // Also where it is not answered: resources may have come that are part of an answer.
                meant.insert(about);
            }
            // Whether it was or not: who forgets waits for the word.
            if let Some(kept) = &mut self.kept {
                kept.forgotten.push(lookup);
            }
        }
        if let Some(kept) = &mut self.kept {
            kept.mean_nobody(&meant);
        }
        names
    }

    /// A name was among the removed: if it is that of a question, that means nobody now. On demand, what it meant before may be
    /// loose.
    pub(super) fn nobody(&mut self, name: &str) -> Option<Lookup> {
        let about = self.about(name);
        let Some(kept) = &mut self.kept else {
            self.unsent.remove(name);
            return self
                .questions
                .remove(about?)
                .map(|question| question.lookup);
        };
        kept.gone(name);
        let question = self.questions.get_mut(about?)?;
        if std::mem::replace(&mut question.answer, Answer::Nobody) == Answer::Somebody {
            kept.mean_nobody(&HashSet::from([about?.to_owned()]));
        }
        Some(question.lookup.clone())
    }

    /// A resource came, with every name that it was asked by. Returns what those are about that are answered by it; on demand
    /// `None` where nothing that is asked means it.
    pub(super) fn told(&mut self, name: &Arc<str>, aliases: &[String]) -> Option<BTreeSet<String>> {
        let names = aliases.iter().map(String::as_str).chain([&**name]);
        let asked: BTreeSet<String> = names
            .filter_map(|name| self.about(name))
            .map(ToOwned::to_owned)
            .collect();
        if let Some(kept) = &mut self.kept {
            if asked.is_empty() {
                kept.gone(name);
                return None;
            }
            kept.loose.remove(name);
            kept.meant_by.insert(name.clone(), asked.clone());
        }
        Some(asked)
    }

    /// What those names are about, of a resource that was not understood.
    pub(super) fn not_told(&self, aliases: &[String]) -> BTreeSet<String> {
        let about = aliases.iter().filter_map(|name| self.about(name));
        about.map(ToOwned::to_owned).collect()
    }

    /// An answer to this question has come that is not understood. The question, where it would count as nobody's by now; it is
    /// open again.
    pub(super) fn reopen(&mut self, about: &str) -> Option<Lookup> {
        let question = self.questions.get_mut(about)?;
        (question.answer == Answer::Nobody).then(|| {
            question.answer = Answer::Open;
            question.lookup.clone()
        })
    }

    /// Everything that answers this question has come. On demand, the question where that is news.
    pub(super) fn answered(&mut self, about: &str) -> Option<Lookup> {
        if self.kept.is_none() {
            self.unsent.remove(about);
            self.questions.remove(about);
            return None;
        }
        let question = self.questions.get_mut(about)?;
        let before = std::mem::replace(&mut question.answer, Answer::Somebody);
        (before != Answer::Somebody).then(|| question.lookup.clone())
    }

    pub(super) fn has_let_go(&self) -> bool {
        let some = |kept: &Kept| !kept.loose.is_empty() || !kept.forgotten.is_empty();
        self.kept.as_ref().is_some_and(some)
    }

    /// What was forgotten, and resources that nothing means any more.
    pub(super) fn take_let_go(&mut self) -> (Vec<Update>, BTreeSet<Arc<str>>) {
        let Some(kept) = &mut self.kept else {
            return (Vec::new(), BTreeSet::new());
        };
        let forgotten = std::mem::take(&mut kept.forgotten);
        let updates = forgotten.into_iter().map(Update::Forgotten);
        (updates.collect(), std::mem::take(&mut kept.loose))
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
        let unsent = std::mem::take(&mut self.unsent);
        let question = |about: &String| Some(self.name(about, self.questions.get(about)?));
        unsent.iter().filter_map(question).collect()
    }

    /// Every question by its name on the wire, and what is known of the answer: nothing where it is still to come, `-` for
    /// nobody, else `+` and the digest of all that it means.
    pub(super) fn answers(&self) -> Vec<(String, String)> {
        let mut means: HashMap<&str, BTreeSet<&str>> = HashMap::new();
        for (name, questions) in self.kept.iter().flat_map(|kept| &kept.meant_by) {
            for about in questions {
                means.entry(about).or_default().insert(name);
            }
        }
        let answer = |about: &str, question: &Asking| match question.answer {
            Answer::Open => String::new(),
            Answer::Nobody => "-".to_owned(),
            Answer::Somebody => {
                let names = means.get(about).into_iter().flatten().copied();
                format!("+{:016x}", digest(names))
            }
        };
        (self.questions.iter())
            .map(|(about, question)| (self.name(about, question), answer(about, question)))
            .collect()
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
        let Self {
            meant_by, loose, ..
        } = self;
        meant_by.retain(|name, asked| {
            asked.retain(|about| !questions.contains(about));
            if asked.is_empty() {
                loose.insert(name.clone());
            }
            !asked.is_empty()
        });
    }
}
