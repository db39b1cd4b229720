//! A file of lines that is rotated by size.
//!
//! PATH is written, `PATH.1` is the newest older file, `PATH.2` the one before. Names change by
//! `rename`, oldest first, so that every line is under one name at any moment.
//!
//! Invariant: the file holds whole lines. One that could not be written whole is taken back; one
//! that a crash has left unfinished is ended, so that it does not spoil the next. A file that cannot
//! be rotated grows on, and is rotated once that succeeds.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::WARN_EVERY;

#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    max_bytes: u64,
    /// Older files kept.
    keep: u32,
    file: File,
    /// Where the whole lines end, after a failure that left a part behind.
    whole_bytes: Option<u64>,
    /// When a failed rotation was last warned of.
    warned: Option<Instant>,
}

impl LogFile {
    /// Opens the file to append to it, or makes it.
    pub(super) fn open(path: &Path, max_bytes: u64, keep: u32) -> io::Result<LogFile> {
        let file = open(path)?;
        let path = path.to_owned();
        Ok(LogFile { path, max_bytes, keep, file, whole_bytes: None, warned: None })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Appends whole lines, all of them or none; first rotates if they do not fit.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        self.take_back_torn()?;
        let mut held_bytes = self.file.metadata()?.len();
        if held_bytes > 0 && held_bytes + lines.len() as u64 > self.max_bytes {
            self.rotate().or_else(|error| self.go_on_unrotated(error))?;
            held_bytes = self.file.metadata()?.len();
        }
        self.file.write_all(lines).inspect_err(|_| {
            self.whole_bytes = Some(held_bytes);
            // If this fails too it is tried again before the next lines.
            let _ = self.take_back_torn();
        })
    }

    fn take_back_torn(&mut self) -> io::Result<()> {
        if let Some(bytes) = self.whole_bytes {
            self.file.set_len(bytes)?;
            self.whole_bytes = None;
        }
        Ok(())
    }

    /// Lines go on into the file there is, whatever its name and size, unless it has none any more.
    fn go_on_unrotated(&mut self, error: io::Error) -> io::Result<()> {
        if self.file.metadata()?.nlink() == 0 {
            return Err(error);
        }
        if self.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            self.warned = Some(Instant::now());
            tracing::warn!(
                "trace_log {} cannot be rotated and grows beyond trace_log_max_mb: {error} (said at \
                 most once a minute)",
                self.path.display()
            );
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        // It is not there if the last rotation came this far and no farther.
        if self.path.try_exists()? {
            for number in (1..self.keep).rev() {
                rename_if_there(&older(&self.path, number), &older(&self.path, number + 1))?;
            }
            match self.keep {
                0 => fs::remove_file(&self.path)?,
                _ => fs::rename(&self.path, older(&self.path, 1))?,
            }
        }
        self.file = open(&self.path)?;
        Ok(())
    }
}

/// The name of an older file, 1 being the newest.
pub(super) fn older(path: &Path, number: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".{number}"));
    name.into()
}

fn open(path: &Path) -> io::Result<File> {
    let opened = File::options().create(true).append(true).read(true).open(path);
    opened.and_then(checked).map_err(|error| {
        let message = format!("cannot write trace_log {}: {error}", path.display());
        io::Error::new(error.kind(), message)
    })
}

/// The file, if lines can be appended to it; ends its last line if that is unfinished.
fn checked(mut file: File) -> io::Result<File> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_fifo() {
        // Nobody may read it, and then writing never ends.
        return Err(io::Error::other("it is a pipe, not a file"));
    }
    if metadata.len() > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    Ok(file)
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
impl LogFile {
    /// Leaves part of a line behind, as a disk that gets full does.
    pub(super) fn break_off(&mut self, part: &[u8]) {
        let whole_bytes = self.file.metadata().expect("a file").len();
        self.file.write_all(part).expect("written");
        self.whole_bytes = Some(whole_bytes);
    }
}
