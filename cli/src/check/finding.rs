// SPDX-License-Identifier: Apache-2.0
use crate::output::count;
use serde::Serialize;
use std::fmt::Write;

/// One thing that was looked at.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    pub level: Level,
    /// What it is about, in a word or two: findings of one subject stand together.
    pub subject: &'static str,
    pub what: String,
    /// What to do about it; empty where nothing is to be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cure: String,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Good,
    /// Good to know.
    Note,
    /// Could not be looked at.
    Unknown,
    /// Works, and may not go on to.
    Warning,
    /// Does not work.
    Problem,
}

impl Finding {
    pub fn good(subject: &'static str, what: impl Into<String>) -> Self {
        Self::new(Level::Good, subject, what, "")
    }

    pub fn note(subject: &'static str, what: impl Into<String>) -> Self {
        Self::new(Level::Note, subject, what, "")
    }

    pub fn unknown(
        subject: &'static str,
        what: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self::new(Level::Unknown, subject, what, cure)
    }

    pub fn warning(
        subject: &'static str,
        what: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self::new(Level::Warning, subject, what, cure)
    }

    pub fn problem(
        subject: &'static str,
        what: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self::new(Level::Problem, subject, what, cure)
    }

    fn new(
        level: Level,
        subject: &'static str,
        what: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self {
            level,
            subject,
            what: what.into(),
            cure: cure.into(),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub problems: usize,
    pub warnings: usize,
    pub unknown: usize,
    pub findings: Vec<Finding>,
}

impl Report {
    pub fn new(findings: Vec<Finding>) -> Self {
        let of = |level| findings.iter().filter(|one| one.level == level).count();
        Self {
            problems: of(Level::Problem),
            warnings: of(Level::Warning),
            unknown: of(Level::Unknown),
            findings,
        }
    }
}

pub fn human(report: &Report) -> String {
    let mut text = String::new();
    let width = report
        .findings
        .iter()
        .map(|one| one.subject.len())
        .max()
        .unwrap_or(0);
    for finding in &report.findings {
        let mark = match finding.level {
            Level::Good => "ok",
            Level::Note => "note",
            Level::Unknown => "?",
            Level::Warning => "warn",
            Level::Problem => "FAIL",
        };
        let _ = writeln!(
            text,
            "{mark:<5} {:<width$}  {}",
            finding.subject, finding.what
        );
        if !finding.cure.is_empty() {
            let _ = writeln!(
                text,
                "{:width$}  try: {}",
                "",
                finding.cure,
                width = width + 6
            );
        }
    }
    let _ = writeln!(
        text,
        "\n{}, {}, {} could not be looked at",
        count(report.problems, "problem"),
        count(report.warnings, "warning"),
        report.unknown
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_stands_with_its_cure() {
        let report = Report::new(vec![
            Finding::good("nodes", "2 nodes, Linux 6.18"),
            Finding::problem("mesh", "linkerd is there", "take it out"),
        ]);
        assert_eq!(
            human(&report),
            "ok    nodes  2 nodes, Linux 6.18\nFAIL  mesh   linkerd is there\n             try: take it out\n\n1 problem, 0 \
             warnings, 0 could not be looked at\n"
        );
    }
}
