// SPDX-License-Identifier: Apache-2.0
//! Log lines on their way out. Whoever logs never waits for the reader: connections go on when it is slow, or has
//! stopped.

use prometheus::IntCounter;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::time::{Duration, Instant};
use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait: those of a busy node's two or three seconds.
const MAX_LINES: usize = 16 * 1024;
/// And what they may take.
const MAX_BYTES: usize = 8 << 20;
/// Lines about connections are dropped before what else the program has to say.
const MAX_ACCESS_BYTES: usize = MAX_BYTES / 4 * 3;
/// Lines are written together up to this.
const BATCH_BYTES: usize = 64 << 10;
const ACCESS: &str = "access";

/// A bounded queue of lines with one thread that writes them. A line that finds it full is dropped and counted, and the
/// log says how many, where they are missing.
#[derive(Clone, Debug)]
pub struct Queue {
    lines: SyncSender<Item>,
    waiting_bytes: Arc<AtomicUsize>,
    dropped: IntCounter,
}

#[derive(Debug)]
enum Item {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

impl Queue {
    /// `dropped` counts; `gap` is the line that says that so many are missing.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(
        out: impl Write + Send + 'static,
        dropped: IntCounter,
        gap: impl Fn(u64) -> String + Send + 'static,
    ) -> io::Result<Self> {
        let (lines, queued) = mpsc::sync_channel(MAX_LINES);
        let waiting_bytes = Arc::<AtomicUsize>::default();
        let writer = Writer {
            queued,
            waiting_bytes: waiting_bytes.clone(),
            dropped: dropped.clone(),
            out,
            gap,
        };
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || writer.run())?;
        Ok(Self {
            lines,
            waiting_bytes,
            dropped,
        })
    }

    /// Waits until everything logged so far is written, at most for `bound`. For the program's end.
    pub fn flush(&self, bound: Duration) {
        let deadline = Instant::now() + bound;
        let (written, wait) = mpsc::sync_channel(1);
        let mut item = Item::Flush(written);
        while let Err(TrySendError::Full(full)) = self.lines.try_send(item) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
            item = full;
        }
        // Too late or never: the reader has stopped, and what waits is lost with the process.
        let _ = wait.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }

    fn push(&self, line: &[u8], max_bytes: usize) {
        let waiting = &self.waiting_bytes;
        let before = waiting.fetch_add(line.len(), Ordering::Relaxed);
        let fits = before + line.len() <= max_bytes;
        if !fits || self.lines.try_send(Item::Line(line.to_vec())).is_err() {
            waiting.fetch_sub(line.len(), Ordering::Relaxed);
            self.dropped.inc();
        }
    }
}

struct Writer<W, G> {
    queued: Receiver<Item>,
    waiting_bytes: Arc<AtomicUsize>,
    dropped: IntCounter,
    out: W,
    gap: G,
}

impl<W: Write, G: Fn(u64) -> String> Writer<W, G> {
    fn run(mut self) {
        let mut told = 0;
        let mut batch = Vec::with_capacity(BATCH_BYTES);
        while let Ok(first) = self.queued.recv() {
            let mut flushed = Vec::new();
            let mut next = Some(first);
            let mut taken = 0;
            while let Some(item) = next {
                match item {
                    Item::Line(line) => {
                        taken += line.len();
                        batch.extend_from_slice(&line);
                    }
                    Item::Flush(written) => flushed.push(written),
                }
                next = (batch.len() < BATCH_BYTES)
                    .then(|| self.queued.try_recv().ok())
                    .flatten();
            }
            let dropped = self.dropped.get();
            if dropped > told {
                batch.extend_from_slice((self.gap)(dropped - told).as_bytes());
                told = dropped;
            }
            // A log that cannot be written has nowhere to say so.
            let _ = self.out.write_all(&batch);
            batch.clear();
            // Only now: what is being written counts as waiting.
            (self.waiting_bytes).fetch_sub(taken, Ordering::Relaxed);
            for written in flushed {
                let _ = written.try_send(());
            }
        }
    }
}

/// Takes the line of one event.
#[derive(Debug)]
pub struct Line<'a> {
    queue: &'a Queue,
    max_bytes: usize,
}

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.push(line, self.max_bytes);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            queue: self,
            max_bytes: MAX_BYTES,
        }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line<'a> {
        let max_bytes = match event.target() {
            ACCESS => MAX_ACCESS_BYTES,
            _ => MAX_BYTES,
        };
        Line {
            queue: self,
            max_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixStream;

    const LINES: usize = 40_000;

    fn counter() -> IntCounter {
        IntCounter::new("dropped", "dropped").unwrap()
    }

    fn line(number: usize) -> Vec<u8> {
        format!("{number:>400}\n").into_bytes()
    }

    #[test]
    fn nobody_waits_for_a_reader_that_has_stopped_and_what_is_missing_is_told() {
        let (reader, out) = UnixStream::pair().unwrap();
        let queue = Queue::start(out, counter(), |missing| format!("{missing} missing\n")).unwrap();
        // More than the queue and the socket hold together; this would never end if somebody waited.
        for number in 0..LINES {
            queue.push(&line(number), MAX_BYTES);
        }
        let dropped = queue.dropped.get();
        assert!(dropped > 0);
        assert!(queue.waiting_bytes.load(Ordering::Relaxed) <= MAX_BYTES);
        queue.flush(Duration::from_millis(1));

        let flushing = queue.clone();
        let flush = std::thread::spawn(move || flushing.flush(Duration::from_secs(30)));
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let (mut written, mut missing) = (Vec::new(), 0);
        while written.len() + missing < LINES {
            let line = lines.next().unwrap();
            match line.trim().split_once(" missing") {
                Some((count, _)) => missing += count.parse::<usize>().unwrap(),
                None => written.push(line.trim().parse::<usize>().unwrap()),
            }
        }
        assert_eq!(missing as u64, dropped);
        assert!(written.is_sorted());
        flush.join().unwrap();
        assert_eq!(queue.waiting_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn lines_about_connections_leave_room_for_others() {
        let (_reader, out) = UnixStream::pair().unwrap();
        let queue = Queue::start(out, counter(), |_| String::new()).unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(queue.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let long = "x".repeat(1000);
            for _ in 0..LINES {
                tracing::info!(target: "access", long);
            }
            let dropped = queue.dropped.get();
            assert!(dropped > 0);
            tracing::info!("something else");
            assert_eq!(queue.dropped.get(), dropped);
        });
    }
}
