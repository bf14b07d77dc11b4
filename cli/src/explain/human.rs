// SPDX-License-Identifier: Apache-2.0
use super::decide::{Explanation, Verdict};
use std::fmt::Write;

pub fn explanation(explanation: &Explanation) -> String {
    let verdict = match explanation.verdict {
        Verdict::Tunnel => "tunnel: encrypted and authenticated",
        Verdict::Plain => "plain: through the proxy, not encrypted",
        Verdict::Direct => "direct: past the proxy, not encrypted",
        Verdict::Refused => "refused",
    };
    let mut text = format!(
        "{} to {}: {verdict}\n",
        explanation.source, explanation.destination
    );
    for (number, step) in explanation.steps.iter().enumerate() {
        let _ = writeln!(text, "  {}. {}\n     by {}", number + 1, step.what, step.by);
    }
    text
}
