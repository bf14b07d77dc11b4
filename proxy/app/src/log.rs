// SPDX-License-Identifier: Apache-2.0
//! Log lines as the peers write them, so that what reads theirs reads ours.
//!
//! Text: time, level, target, message, then `key=value`, joined by tabs and spaces. JSON: `level`, `time`, `scope`,
//! `message`, then the fields. Text fields keep the order in which the code names them.

mod queue;

use crate::log::queue::Queue;
use podveil_program::LogFormat;
use prometheus::IntCounter;
use serde_json::Value;
use std::fmt::{self, Debug, Write};
use std::io;
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// For the last lines at the program's end.
const FLUSH_BOUND: Duration = Duration::from_secs(1);

/// The process's log, of which there is one.
static QUEUE: OnceLock<Queue> = OnceLock::new();

static DROPPED: LazyLock<IntCounter> = LazyLock::new(|| {
    let name = "podveil_log_lines_dropped_total";
    let help = "Log lines dropped because standard error took them too slowly";
    IntCounter::new(name, help).expect("a name that Prometheus takes")
});

/// Installs the process's log on standard error; the level comes from `RUST_LOG` (`info` where it says nothing). Whoever
/// logs never waits: see [`dropped_lines`]. A second call does nothing.
///
/// # Errors
/// When its thread cannot be started.
pub fn init(format: LogFormat) -> io::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let queue = Queue::start(io::stderr(), DROPPED.clone(), move |missing| {
        gap(format, missing)
    })?;
    let lines = Lines {
        format,
        time: SystemTime,
    };
    let installed = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(queue.clone())
        .event_format(lines)
        .try_init();
    match installed {
        Ok(()) => drop(QUEUE.set(queue)),
        Err(_) => tracing::debug!("the log is already installed"),
    }
    Ok(())
}

/// Waits until what was logged is written, at most for a second.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_BOUND);
    }
}

/// Lines that were dropped since standard error took them too slowly.
pub fn dropped_lines() -> IntCounter {
    DROPPED.clone()
}

/// Stands in the log for lines that are missing there.
fn gap(format: LogFormat, missing: u64) -> String {
    let mut time = String::new();
    if SystemTime.format_time(&mut Writer::new(&mut time)).is_err() {
        time.clear();
    }
    let message = "log lines were dropped: standard error takes them too slowly";
    match format {
        LogFormat::Plain => {
            format!("{time}\twarn\tpodveil_node::log\t{message}\tcount={missing}\n")
        }
        LogFormat::Json => format!(
            "{{\"level\":\"warn\",\"time\":\"{time}\",\"scope\":\"podveil_node::log\",\"message\":\"{message}\",\"count\":{missing}}}\n"
        ),
    }
}

#[derive(Debug)]
struct Lines<T> {
    format: LogFormat,
    time: T,
}

impl<S, N, T> FormatEvent<S, N> for Lines<T>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    T: FormatTime,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        self.time.format_time(&mut Writer::new(&mut time))?;
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let target = event.metadata().target();
        let mut fields = Fields::new(self.format);
        event.record(&mut fields);
        let Fields { message, rest, .. } = fields;
        match self.format {
            LogFormat::Plain => writeln!(writer, "{time}\t{level}\t{target}\t{message}\t{rest}"),
            LogFormat::Json => {
                let (target, message) = (json(target), json(&message));
                writeln!(
                    writer,
                    "{{\"level\":\"{level}\",\"time\":\"{time}\",\"scope\":{target},\"message\":{message}{rest}}}"
                )
            }
        }
    }
}

/// The fields of one event as text, in order.
struct Fields {
    format: LogFormat,
    message: String,
    rest: String,
}

impl Fields {
    fn new(format: LogFormat) -> Self {
        Self {
            format,
            message: String::new(),
            rest: String::new(),
        }
    }

    /// `text` is written as it is: a number, or already quoted.
    fn write(&mut self, field: &Field, text: &str) {
        let name = field.name();
        let written = match self.format {
            LogFormat::Plain if self.rest.is_empty() => write!(self.rest, "{name}={text}"),
            LogFormat::Plain => write!(self.rest, " {name}={text}"),
            LogFormat::Json => write!(self.rest, ",{}:{text}", json(name)),
        };
        written.expect("a String takes everything");
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else if self.format == LogFormat::Json {
            self.write(field, &json(&text));
        } else if is_one_word(&text) {
            self.write(field, &text);
        } else {
            self.write(field, &format!("{text:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match self.format {
            LogFormat::Json => self.write(field, &json(value)),
            LogFormat::Plain => self.write(field, &format!("{value:?}")),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, &value.to_string());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, &value.to_string());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, if value { "true" } else { "false" });
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        // The whole chain: no error repeats its source.
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(error) = source {
            write!(text, ": {error}").expect("a String takes everything");
            source = error.source();
        }
        self.record_str(field, &text);
    }
}

/// Can a text stand without quotes and neither end its line nor look like another field?
fn is_one_word(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && !b"\"=\\".contains(&byte);
    !text.is_empty() && text.bytes().all(plain)
}

fn json(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::fmt::MakeWriter;

    struct Fixed;

    impl FormatTime for Fixed {
        fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
            writer.write_str("2026-01-02T03:04:05.678901Z")
        }
    }

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Written {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    /// What `work` writes to the log.
    pub fn capture(format: LogFormat, work: impl FnOnce()) -> String {
        let written = Written::default();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(written.clone())
            .event_format(Lines {
                format,
                time: Fixed,
            })
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn an_error_is_written_with_its_sources_and_stays_on_its_line() {
        let source = io::Error::other("first\nsecond");
        let error = podveil_program::ConfigError::Read {
            path: "/x".into(),
            source,
        };
        let error: &dyn std::error::Error = &error;
        for (format, line) in [
            (
                LogFormat::Plain,
                "error=\"reading the configuration /x: first\\nsecond\" count=3\n",
            ),
            (
                LogFormat::Json,
                "\"error\":\"reading the configuration /x: first\\nsecond\",\"count\":3}\n",
            ),
        ] {
            let written = capture(format, || tracing::warn!(error, count = 3_u64, "broken"));
            assert!(written.ends_with(line), "{written}");
        }
    }

    #[test]
    fn a_gap_is_told_as_a_line_like_any_other() {
        let plain = gap(LogFormat::Plain, 7);
        assert!(
            plain.contains("Z\twarn\tpodveil_node::log\tlog lines were dropped"),
            "{plain}"
        );
        assert!(plain.ends_with("\tcount=7\n"), "{plain}");
        let object: Value = serde_json::from_str(&gap(LogFormat::Json, 7)).unwrap();
        assert_eq!(
            (&object["level"], &object["count"]),
            (&"warn".into(), &7.into())
        );
    }

    #[test]
    fn a_value_cannot_forge_a_field() {
        let value = "a b=\"c\"\n";
        let written = capture(LogFormat::Plain, || tracing::info!(%value, "x"));
        assert!(
            written.ends_with("\tx\tvalue=\"a b=\\\"c\\\"\\n\"\n"),
            "{written}"
        );
    }
}
