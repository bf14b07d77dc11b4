// SPDX-License-Identifier: Apache-2.0
use super::{Answered, Ask};
use podveil_cni::wire::{About, Answer, CAPTURE_BOUND, UNKNOWN_BOUND};
use podveil_model::Uid;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The pods that wait for our word.
#[derive(Debug, Default)]
pub struct Admissions {
    waiting: Vec<Waiting>,
    pub answered: Answered,
}

#[derive(Debug)]
struct Waiting {
    ask: Ask,
    uid: Uid,
    since: Instant,
}

/// What is known of a pod at one moment.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Facts {
    /// It is none of ours.
    NotEnrolled,
    /// Whatever it sends or answers from now on is captured, and peers tunnel to it.
    Captured,
    /// Why that is not so yet.
    Pending(Arc<str>),
    /// The same, where nobody knows whether it will ever be.
    Unknown(Arc<str>),
    /// The controller has not told of it, but that its namespace is not enrolled. That may just have changed.
    OtherNamespace,
}

impl Facts {
    /// How long it may be so before an answer is due.
    fn bound(&self, about: About) -> Duration {
        match (self, about) {
            (Self::Pending(_), About::Start) => CAPTURE_BOUND,
            (Self::Unknown(_) | Self::OtherNamespace, About::Start) => UNKNOWN_BOUND,
            _ => Duration::ZERO,
        }
    }
}

impl Admissions {
    /// A [`About::Now`] is answered at the next look, whatever is known by then.
    pub fn wait(&mut self, ask: Ask, now: Instant) {
        let uid = Uid::from(ask.request.uid.as_str());
        let since = now;
        self.waiting.push(Waiting { ask, uid, since });
    }

    /// Answers who can be answered; when to look again at the latest. `answered` is told of each sandbox that was to start.
    pub fn answer(
        &mut self,
        now: Instant,
        facts: impl Fn(&Ask) -> Facts,
        mut told: impl FnMut(&Uid, &Ask, &Answer),
    ) -> Option<Instant> {
        let (mut done, mut again) = (Vec::new(), None);
        for one in std::mem::take(&mut self.waiting) {
            let facts = facts(&one.ask);
            let due = one.since + facts.bound(one.ask.request.about);
            if due <= now || one.ask.reply.is_closed() {
                done.push((facts, one));
            } else {
                again = again.into_iter().chain([due]).min();
                self.waiting.push(one);
            }
        }
        for (facts, Waiting { ask, uid, .. }) in done {
            let answer = match facts {
                Facts::NotEnrolled | Facts::OtherNamespace => Answer::NotEnrolled,
                Facts::Captured => Answer::Captured,
                Facts::Pending(reason) | Facts::Unknown(reason) => Answer::Refused {
                    reason: reason.to_string(),
                },
            };
            if ask.request.about == About::Start {
                *match answer {
                    Answer::Captured => &mut self.answered.captured,
                    Answer::NotEnrolled => &mut self.answered.not_enrolled,
                    Answer::Refused { .. } => &mut self.answered.refused,
                } += 1;
                told(&uid, &ask, &answer);
            }
            // A plugin that has gone asks again.
            let _gone = ask.reply.send(answer);
        }
        again
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podveil_cni::wire::Request;
    use tokio::sync::oneshot::{self, Receiver};

    fn ask(about: About, uid: &str) -> (Ask, Receiver<Answer>) {
        let (reply, replied) = oneshot::channel();
        let request = Request {
            about,
            namespace: "shop".into(),
            pod: "web".into(),
            uid: uid.into(),
            sandbox: "s".into(),
            addresses: Vec::new(),
        };
        let netns = None;
        let ask = Ask {
            request,
            netns,
            reply,
        };
        (ask, replied)
    }

    fn pending() -> Facts {
        Facts::Pending("not yet".into())
    }

    fn refused() -> Answer {
        let reason = "not yet".to_owned();
        Answer::Refused { reason }
    }

    #[test]
    fn a_pod_is_answered_when_it_is_known_what_becomes_of_it_and_at_the_bound() {
        let now = Instant::now();
        let mut admissions = Admissions::default();
        let (first, mut captured) = ask(About::Start, "captured");
        let (second, mut plain) = ask(About::Start, "plain");
        let (third, mut late) = ask(About::Start, "late");
        for ask in [first, second, third] {
            admissions.wait(ask, now);
        }
        let mut told = Vec::new();
        let again = admissions.answer(now, |_| pending(), |_, _, _| panic!("nobody is told"));
        assert_eq!(again, Some(now + CAPTURE_BOUND));
        let facts = |ask: &Ask| match ask.request.uid.as_str() {
            "captured" => Facts::Captured,
            "plain" => Facts::NotEnrolled,
            _ => Facts::Unknown("not yet".into()),
        };
        let mut note =
            |uid: &Uid, _: &Ask, answer: &Answer| told.push((uid.clone(), answer.clone()));
        let again = admissions.answer(now + Duration::from_secs(1), facts, &mut note);
        assert_eq!(again, Some(now + UNKNOWN_BOUND));
        assert_eq!(captured.try_recv().unwrap(), Answer::Captured);
        assert_eq!(plain.try_recv().unwrap(), Answer::NotEnrolled);
        assert!(late.try_recv().is_err());
        assert_eq!(
            admissions.answer(now + UNKNOWN_BOUND, facts, &mut note),
            None
        );
        assert_eq!(late.try_recv().unwrap(), refused());
        assert_eq!(told.len(), 3);
        let counted = Answered {
            captured: 1,
            not_enrolled: 1,
            refused: 1,
        };
        assert_eq!(admissions.answered, counted);
    }

    #[test]
    fn a_pod_of_a_namespace_that_is_not_enrolled_starts_though_nobody_tells_of_it() {
        let now = Instant::now();
        let mut admissions = Admissions::default();
        let (start, mut started) = ask(About::Start, "u");
        admissions.wait(start, now);
        let facts = |_: &Ask| Facts::OtherNamespace;
        let again = admissions.answer(now, facts, |_, _, _| {});
        assert_eq!(again, Some(now + UNKNOWN_BOUND), "it may just have changed");
        assert!(started.try_recv().is_err());
        admissions.answer(now + UNKNOWN_BOUND, facts, |_, _, _| {});
        assert_eq!(started.try_recv().unwrap(), Answer::NotEnrolled);
    }

    #[test]
    fn a_check_is_answered_at_once_and_not_counted_and_who_has_gone_is_not_waited_for() {
        let now = Instant::now();
        let mut admissions = Admissions::default();
        let (check, mut checked) = ask(About::Now, "u");
        let (start, gone) = ask(About::Start, "u");
        admissions.wait(check, now);
        admissions.wait(start, now);
        drop(gone);
        let mut told = 0;
        assert_eq!(
            admissions.answer(now, |_| pending(), |_, _, _| told += 1),
            None
        );
        assert_eq!(checked.try_recv().unwrap(), refused());
        assert_eq!(
            told, 1,
            "the namespace of the sandbox that is given up is let go"
        );
    }
}
