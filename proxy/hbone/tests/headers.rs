// SPDX-License-Identifier: Apache-2.0
//! The tables of headers in `testdata/`; the fuzz targets begin with the same cases.

use podveil_hbone::{Authority, Baggage, Forwarded, fuzz, traceparent};
use std::fmt::Debug;
use std::path::Path;

/// `<3*ab>` becomes `ababab`.
fn expand(text: &str) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, count, piece, after)) = next_repeat(rest) {
        expanded += before;
        expanded += &piece.repeat(count);
        rest = after;
    }
    expanded + rest
}

fn next_repeat(text: &str) -> Option<(&str, usize, &str, &str)> {
    let (before, rest) = text.split_once('<')?;
    let (repeat, after) = rest.split_once('>')?;
    let (count, piece) = repeat.split_once('*')?;
    Some((before, count.parse().ok()?, piece, after))
}

fn check<T: Debug, E: Debug>(
    table: &str,
    fuzz: fn(&[u8]),
    parse: impl Fn(&str) -> Result<T, E>,
    write: impl Fn(&T) -> String,
) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(table);
    let mut cases = 0;
    for line in std::fs::read_to_string(path).unwrap().lines() {
        if line.starts_with('#') {
            continue;
        }
        let (input, expected) = line.split_once('|').unwrap();
        let (input, expected) = (expand(input.trim()), expand(expected.trim()));
        let found = match parse(&input) {
            Ok(value) => write(&value),
            Err(error) => format!("{error:?}"),
        };
        assert_eq!(found, expected, "{input:?}");
        fuzz(input.as_bytes());
        cases += 1;
    }
    assert!(cases > 10, "{table} was read");
}

fn header(value: Option<http::HeaderValue>) -> String {
    value.map_or(String::new(), |value| value.to_str().unwrap().to_owned())
}

#[test]
fn authorities() {
    check(
        "authority.txt",
        fuzz::authority,
        str::parse::<Authority>,
        |authority| authority.to_string(),
    );
}

#[test]
fn baggage() {
    check(
        "baggage.txt",
        fuzz::baggage,
        str::parse::<Baggage>,
        |baggage| header(baggage.to_header()),
    );
}

#[test]
fn forwarded() {
    check(
        "forwarded.txt",
        fuzz::forwarded,
        str::parse::<Forwarded>,
        |forwarded| header(forwarded.to_header()),
    );
}

#[test]
fn a_name_that_would_need_escaping_is_not_written() {
    let baggage = Baggage {
        cluster: Some("a,b=c".into()),
        namespace: Some("shop".into()),
        ..Baggage::default()
    };
    assert_eq!(header(baggage.to_header()), "k8s.namespace.name=shop");
    let forwarded = Forwarded {
        source: None,
        host: Some("a;for=1.2.3.4:5".into()),
    };
    assert_eq!(forwarded.to_header(), None);
}

#[test]
fn a_traceparent_has_its_shape() {
    assert_eq!(
        traceparent(1, 0xab).to_str().unwrap(),
        "00-00000000000000000000000000000001-00000000000000ab-00"
    );
}
