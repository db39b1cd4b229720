//! A trace log read back, to ask it what a router is asked.
//!
//! The records go into a store like a router's, so that a query means the same here and there.
//! The one idea for trust: a line is taken only if the record made of it reads exactly as the line
//! does; nothing is answered that the log does not say.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::file::older;
use crate::routing::WorkerName;
use crate::tracking::record::Record;
use crate::tracking::store::{Page, Store};
use crate::tracking::text::Names;
use crate::tracking::{MAX_KEPT_LOGS, Mooncake, Pages, Query, Stats, Trace};

/// Longest line, far above what a record with thousands of candidates comes to.
const MAX_LINE_BYTES: usize = 1 << 24;

/// What only a running router knows of its statistics, beside its options.
const UNKNOWN: [&str; 5] = ["evicted", "expired", "in_flight", "memory_bytes", "version"];

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file system says no.
    #[error("cannot read the trace log {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    /// A line is not the trace of an ended request.
    #[error("{}, line {line}: not the trace of an ended request: {why}", path.display())]
    Malformed { path: PathBuf, line: u64, why: String },
}

/// The traces of a log and its older files, as they were when it was read. Its memory is bounded by
/// the files alone.
#[derive(Debug)]
pub struct TraceLog {
    store: Store,
    torn_lines: u64,
}

impl TraceLog {
    /// Reads a log that may be being written. A last line that is not finished yet is left out, and
    /// so are lines that break off, as a crash leaves them.
    ///
    /// # Errors
    /// There is no such file, one cannot be read, or one has a malformed line.
    pub fn read(path: &Path) -> Result<TraceLog, LogError> {
        let mut reader = Reader::default();
        for (path, file) in open_all(path)?.into_iter().rev() {
            reader.read(&path, file)?;
        }
        let Reader { mut records, torn_lines, .. } = reader;
        // Stable: what arrived in the same microsecond stays in the order of its endings.
        records.sort_by_key(|record| record.arrived_unix_us);
        Ok(TraceLog { store: Store::of(records), torn_lines })
    }

    /// Lines left out because they break off.
    pub fn torn_lines(&self) -> u64 {
        self.torn_lines
    }

    /// As [`super::super::Tracker::get`].
    pub fn get(&self, request_id: &str) -> Option<Trace> {
        self.store.get(request_id, 0)
    }

    /// As [`super::super::Tracker::list`].
    pub fn list(&self, query: &Query) -> Page {
        self.store.list(query, 0)
    }

    /// All that match as a load to send again.
    pub fn mooncake(&self, query: &Query) -> Mooncake {
        Mooncake::of(Pages::new(query, |query| self.list(query)))
    }

    /// The object of [`Stats`], of what the log holds; null where only a running router knows.
    pub fn stats(&self) -> Value {
        let mut stats = Stats::new(None);
        self.store.add_to(&mut stats, 0);
        let mut stats = serde_json::to_value(stats).expect("statistics are plain data");
        for name in UNKNOWN {
            stats[name] = Value::Null;
        }
        stats
    }
}

/// The log's files, newest first, each once.
///
/// The log may be rotated meanwhile: then a file that is open already turns up again under its next
/// name, and is known by its number. Going from the newest to the oldest misses none.
fn open_all(path: &Path) -> Result<Vec<(PathBuf, File)>, LogError> {
    let mut seen = HashSet::new();
    let mut files = Vec::new();
    let mut missing = None;
    let names = std::iter::once(path.to_owned());
    for path in names.chain((1..=MAX_KEPT_LOGS).map(|number| older(path, number))) {
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?, file)));
        match opened {
            Ok((metadata, file)) if seen.insert((metadata.dev(), metadata.ino())) => {
                files.push((path, file));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                missing.get_or_insert(LogError::Unreadable { path, error });
            }
            Err(error) => return Err(LogError::Unreadable { path, error }),
        }
    }
    match missing {
        Some(missing) if files.is_empty() => Err(missing),
        _ => Ok(files),
    }
}

#[derive(Default)]
struct Reader {
    records: Vec<Record>,
    torn_lines: u64,
    names: Names,
    workers: HashMap<(String, String), Arc<WorkerName>>,
}

impl Reader {
    fn read(&mut self, path: &Path, file: File) -> Result<(), LogError> {
        let unreadable = |error| LogError::Unreadable { path: path.to_owned(), error };
        let mut file = BufReader::with_capacity(1 << 16, file);
        let mut text = Vec::new();
        for line in 1.. {
            let malformed = |why| LogError::Malformed { path: path.to_owned(), line, why };
            text.clear();
            let mut rest = file.by_ref().take(MAX_LINE_BYTES as u64);
            rest.read_until(b'\n', &mut text).map_err(unreadable)?;
            if text.pop_if(|last| *last == b'\n').is_none() {
                if text.len() == MAX_LINE_BYTES {
                    return Err(malformed(format!("longer than {MAX_LINE_BYTES} bytes")));
                }
                break;
            }
            match serde_json::from_slice(&text) {
                Ok(trace) => {
                    let record = self.record(&trace).map_err(malformed)?;
                    self.records.push(record);
                }
                Err(error) if error.is_eof() => self.torn_lines += 1,
                Err(error) => return Err(malformed(said(&error))),
            }
        }
        Ok(())
    }

    fn record(&mut self, trace: &Trace) -> Result<Record, String> {
        if !trace.status.is_ended() {
            return Err(format!("its status is {}", trace.status.name()));
        }
        let workers = &mut self.workers;
        let worker = |url: &str, node_id: &str| {
            let index = u32::try_from(workers.len()).unwrap_or(u32::MAX);
            let key = (url.to_owned(), node_id.to_owned());
            let name = || WorkerName { index, url: url.into(), node_id: node_id.into() };
            Arc::clone(workers.entry(key).or_insert_with(|| Arc::new(name())))
        };
        let record = Record::of(trace, &mut self.names, worker);
        let has_same_view = record.view() == *trace;
        has_same_view.then_some(record).ok_or_else(|| "its fields do not agree".to_owned())
    }
}

/// An error of JSON without its line, which is 1 in a text of one line.
fn said(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let why = text.rsplit_once(" at line ").map_or(&*text, |(why, _)| why);
    format!("{why} at column {}", error.column())
}
