// SPDX-License-Identifier: Apache-2.0
use podveil_model::{Answer, Upstream};

/// The answer about a destination in one line: its kind, then the addresses in order of their text.
pub fn answer_line(answer: Answer) -> String {
    let addresses = |upstreams: Vec<Upstream>| {
        let mut texts: Vec<_> = upstreams
            .iter()
            .map(|upstream| upstream.address.to_string())
            .collect();
        texts.sort();
        texts.join(" ")
    };
    match answer {
        Answer::Enrolled(upstreams) => format!("enrolled {}", addresses(upstreams)),
        Answer::Plain { reason, upstreams } => format!("plain {reason:?} {}", addresses(upstreams)),
        Answer::Outside => "outside".to_owned(),
        Answer::NotKnown(unresolved) => format!("not known: {unresolved}"),
    }
}
