//! The trace log: the record of each ended request as one line of JSON in a file.
//!
//! The one idea: a request clones its record and goes on; a thread of its own serialises and
//! writes. Between the two is a bounded buffer, and what finds it full is lost and counted. The
//! thread writes whatever is waiting in one piece, so that nothing stays behind when it is idle.
//! [`TraceLog`] reads such a file back.
//!
//! Invariant: each ended request is counted once, as written or as lost; once the log is closed,
//! those written are in the file.

mod file;
mod reader;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tracing::dispatcher;

use super::record::Record;
use file::LogFile;
pub use reader::{LogError, TraceLog};

/// Most records waiting to be written, a few hundred bytes each; their candidates are shared with the
/// store while it holds them.
const MAX_WAITING: usize = 65_536;

/// The thread writes when it has this many bytes, or nothing more is waiting.
const BATCH_BYTES: usize = 1 << 16;

const WARN_EVERY: Duration = Duration::from_secs(60);

/// A trace log that is being written.
#[derive(Debug)]
pub(super) struct Log {
    /// Records on their way to the thread; `None` once the log is closed.
    waiting: RwLock<Option<SyncSender<Box<Record>>>>,
    writing: Mutex<Option<JoinHandle<()>>>,
    counts: Arc<Counts>,
}

/// Ended requests by what became of their records.
#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    lost: AtomicU64,
}

impl Log {
    /// Opens the file to append to it, or makes it. Beyond `max_bytes` it is rotated, and `keep`
    /// older files are kept.
    ///
    /// # Errors
    /// The file cannot be opened to write; the message names it.
    pub(super) fn open(path: &Path, max_bytes: u64, keep: u32) -> io::Result<Log> {
        let file = LogFile::open(path, max_bytes, keep)?;
        let (log, records) = Log::new(MAX_WAITING);
        let writer = Writer { file, counts: Arc::clone(&log.counts), warned: None };
        // The thread is not the runtime's, so it has to be told where the router's log lines go.
        let lines = dispatcher::get_default(Clone::clone);
        let write = move || dispatcher::with_default(&lines, || writer.write_all(&records));
        let thread = std::thread::Builder::new().name("trace-log".to_owned()).spawn(write)?;
        *log.writing.lock() = Some(thread);
        Ok(log)
    }

    fn new(max_waiting: usize) -> (Log, Receiver<Box<Record>>) {
        let (waiting, records) = sync_channel(max_waiting);
        let (writing, counts) = (Mutex::default(), Arc::default());
        (Log { waiting: RwLock::new(Some(waiting)), writing, counts }, records)
    }

    /// Takes the record of an ended request, `None` if it had to leave the store before. Never
    /// waits.
    pub(super) fn hand_over(&self, record: Option<Record>) {
        let is_handed_over = record.is_some_and(|record| {
            let waiting = self.waiting.read();
            waiting.as_ref().is_some_and(|waiting| waiting.try_send(Box::new(record)).is_ok())
        });
        if !is_handed_over {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records written to the file.
    pub(super) fn written(&self) -> u64 {
        self.counts.written.load(Ordering::Relaxed)
    }

    /// Records lost.
    pub(super) fn lost(&self) -> u64 {
        self.counts.lost.load(Ordering::Relaxed)
    }

    /// Waits until all that was handed over is written. What comes later is lost.
    pub(super) fn close(&self) {
        // Its end is the thread's, once the buffer is empty.
        self.waiting.write().take();
        let mut writing = self.writing.lock();
        if let Some(thread) = writing.take() {
            // A panic has told about itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.close();
    }
}

/// The thread's part.
struct Writer {
    file: LogFile,
    counts: Arc<Counts>,
    /// When losses were last warned of, and how many there were by then.
    warned: Option<(Instant, u64)>,
}

impl Writer {
    /// Writes until no more can come.
    fn write_all(mut self, records: &Receiver<Box<Record>>) {
        let mut lines = Vec::with_capacity(BATCH_BYTES);
        while let Ok(first) = records.recv() {
            lines.clear();
            let mut count = 0;
            let mut next = Some(first);
            while let Some(record) = next {
                serde_json::to_writer(&mut lines, &record.view()).expect("a trace is plain data");
                lines.push(b'\n');
                count += 1;
                let is_full = lines.len() >= BATCH_BYTES;
                next = if is_full { None } else { records.try_recv().ok() };
            }
            let outcome = self.file.append(&lines);
            let counted = if outcome.is_ok() { &self.counts.written } else { &self.counts.lost };
            counted.fetch_add(count, Ordering::Relaxed);
            if self.warned.is_none_or(|(at, _)| at.elapsed() >= WARN_EVERY) {
                self.warn(outcome.err());
            }
        }
        self.warn(None);
    }

    /// Says what was lost since this was last said, if anything was.
    fn warn(&mut self, error: Option<io::Error>) {
        let lost = self.counts.lost.load(Ordering::Relaxed);
        let new = lost - self.warned.map_or(0, |(_, lost)| lost);
        if new == 0 {
            return;
        }
        self.warned = Some((Instant::now(), lost));
        let why = error.map_or_else(
            || {
                "the file could not be written, or not as fast, or max_trace_entries is too small"
                    .to_owned()
            },
            |error| error.to_string(),
        );
        tracing::warn!(
            "trace_log {}: {new} traces were lost: {why} (said at most once a minute)",
            self.file.path().display()
        );
    }
}

#[cfg(test)]
mod tests;
