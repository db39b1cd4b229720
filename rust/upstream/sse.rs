//! Splits a stream of server-sent events into events, wherever the chunks of the stream end.
//!
//! The idea: an event that lies within one chunk is read where it lies; only what a chunk's end cuts
//! off is kept until the next one. Lines end in `\n` or `\r\n`, never in a lone `\r` (the standard
//! allows it, nobody sends it). Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream".
//!
//! Invariant: at most [`MAX_EVENT_BYTES`] are kept, and where chunks end makes no difference to the
//! events. Does not read event names, ids or retry times.

use std::borrow::Cow;

use memchr::{memchr, memchr_iter};

/// An event with more bytes than this, all its lines counted, is passed over.
pub(super) const MAX_EVENT_BYTES: usize = 64 * 1024;

/// One event of a stream. Events without data, such as comments, are not reported.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event<'e> {
    /// The event's data; several data lines are joined by `\n`.
    Data(Cow<'e, [u8]>),
    /// The event was larger than [`MAX_EVENT_BYTES`].
    TooLarge,
}

/// The events of one stream.
#[derive(Debug)]
pub(super) struct Events {
    /// The beginning of the event that the last chunk cut off; at most [`MAX_EVENT_BYTES`].
    kept: Vec<u8>,
    /// The event that was cut off has outgrown the bound, so none of it is kept.
    too_large: bool,
    /// The line that was cut off is blank so far.
    blank: bool,
}

impl Events {
    pub(super) fn new() -> Self {
        Events { kept: Vec::new(), too_large: false, blank: true }
    }

    /// Reads the next chunk and reports each event that ends in it.
    pub(super) fn read(&mut self, chunk: &[u8], mut report: impl FnMut(Event<'_>)) {
        let (mut event_start, mut line_start) = (0, 0);
        for newline in memchr_iter(b'\n', chunk) {
            let ends_event = self.blank && is_blank(&chunk[line_start..newline]);
            line_start = newline + 1;
            self.blank = true;
            if ends_event {
                self.end_event(&chunk[event_start..line_start], &mut report);
                event_start = line_start;
            }
        }
        self.blank = self.blank && is_blank(&chunk[line_start..]);
        self.keep(&chunk[event_start..]);
    }

    #[cfg(test)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept.len()
    }

    /// Ends the stream; reports a last event that no blank line ended.
    pub(super) fn finish(mut self, mut report: impl FnMut(Event<'_>)) {
        self.end_event(b"", &mut report);
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.too_large |= self.kept.len() + bytes.len() > MAX_EVENT_BYTES;
        if self.too_large {
            self.kept = Vec::new();
        } else {
            self.kept.extend_from_slice(bytes);
        }
    }

    fn end_event(&mut self, rest: &[u8], report: &mut impl FnMut(Event<'_>)) {
        if self.too_large || self.kept.len() + rest.len() > MAX_EVENT_BYTES {
            report(Event::TooLarge);
        } else if self.kept.is_empty() {
            data(rest).into_iter().for_each(|data| report(Event::Data(data)));
        } else {
            self.kept.extend_from_slice(rest);
            data(&self.kept).into_iter().for_each(|data| report(Event::Data(data)));
        }
        self.kept.clear();
        self.too_large = false;
    }
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| *byte == b'\r')
}

/// The joined data lines of an event; `None` when it has none.
fn data(mut event: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut joined: Option<Cow<'_, [u8]>> = None;
    while !event.is_empty() {
        let end = memchr(b'\n', event).unwrap_or(event.len());
        let line = &event[..end];
        event = event.get(end + 1..).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(data) = line.strip_prefix(b"data:") else {
            continue;
        };
        let data = data.strip_prefix(b" ").unwrap_or(data);
        match &mut joined {
            None => joined = Some(Cow::Borrowed(data)),
            Some(joined) => {
                joined.to_mut().push(b'\n');
                joined.to_mut().extend_from_slice(data);
            }
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a stream says when it arrives in these chunks; `None` stands for a too large event.
    fn events<'c>(chunks: impl IntoIterator<Item = &'c [u8]>) -> Vec<Option<Vec<u8>>> {
        let mut seen = Vec::new();
        let mut report = |event: Event<'_>| match event {
            Event::Data(data) => seen.push(Some(data.into_owned())),
            Event::TooLarge => seen.push(None),
        };
        let mut events = Events::new();
        for chunk in chunks {
            events.read(chunk, &mut report);
            assert!(events.kept_bytes() <= MAX_EVENT_BYTES);
        }
        events.finish(&mut report);
        seen
    }

    fn texts(stream: &str) -> Vec<String> {
        let whole = events([stream.as_bytes()]);
        let bytewise = events(stream.as_bytes().chunks(1));
        assert_eq!(whole, bytewise, "{stream:?}");
        let text = |data: Option<Vec<u8>>| String::from_utf8(data.unwrap_or_default());
        whole.into_iter().map(|data| text(data).unwrap_or_default()).collect()
    }

    #[test]
    fn lines_and_events_end_in_either_way() {
        assert_eq!(texts("data: a\n\ndata:b\n\n"), ["a", "b"]);
        assert_eq!(texts("data: a\r\n\r\ndata:  b\r\n\n"), ["a", " b"]);
        assert_eq!(texts("\n\r\n\ndata: a\n\n\n\n"), ["a"]);
        assert_eq!(texts("data: a\n\ndata: b"), ["a", "b"]);
        assert_eq!(texts("data: a\n\ndata: b\n"), ["a", "b"]);
    }

    #[test]
    fn only_data_lines_count() {
        assert_eq!(texts(": ping\n\nevent: x\nid: 1\ndata: a\nretry: 5\n\n"), ["a"]);
        assert_eq!(texts("data: {\ndata: }\r\ndata:\n\n"), ["{\n}\n"]);
        assert_eq!(texts("dat: a\n\ndata\n\n x\n\n"), [""; 0]);
        assert_eq!(texts(""), [""; 0]);
    }

    #[test]
    fn a_large_event_is_passed_over() {
        let frame = "data: \n\n".len();
        for (len, fits) in [(MAX_EVENT_BYTES - frame, true), (MAX_EVENT_BYTES - frame + 1, false)] {
            let stream = format!("data: {}\n\ndata: b\n\n", "a".repeat(len)).into_bytes();
            let first = fits.then(|| vec![b'a'; len]);
            for chunk_len in [stream.len(), len, 1000, 7] {
                let seen = events(stream.chunks(chunk_len));
                assert_eq!(seen, [first.clone(), Some(b"b".to_vec())], "{len}");
            }
        }
        assert_eq!(events(vec![b'x'; 3 * MAX_EVENT_BYTES].chunks(999)), [None]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn where_chunks_end_makes_no_difference(
            stream in "(data:|[ :a\r\n]|\n|\r\n|é){0,60}",
            mut cuts in prop::collection::vec(0..200usize, 0..8),
        ) {
            let stream = stream.as_bytes();
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(stream.len()));
            cuts.sort_unstable();
            let starts = std::iter::once(0).chain(cuts.clone());
            let ends = cuts.iter().copied().chain([stream.len()]);
            let chunks: Vec<_> = starts.zip(ends).map(|(start, end)| &stream[start..end]).collect();
            prop_assert_eq!(events(chunks), events([stream]));
        }

        #[test]
        fn lines_mean_what_the_standard_says(stream in "(data:|[ :a]|\n|\r\n){0,60}") {
            let mut expected = Vec::new();
            for event in stream.replace("\r\n", "\n").split_inclusive('\n').collect::<Vec<_>>()
                .split(|line| *line == "\n")
            {
                let lines = event.iter().filter_map(|line| line.trim_end_matches('\n').strip_prefix("data:"));
                let lines: Vec<_> = lines.map(|data| data.strip_prefix(' ').unwrap_or(data)).collect();
                if !lines.is_empty() {
                    expected.push(Some(lines.join("\n").into_bytes()));
                }
            }
            prop_assert_eq!(events([stream.as_bytes()]), expected);
        }
    }
}
