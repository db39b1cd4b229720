//! What is read of a worker's answer while it passes: survives any bytes, holds no more than its bound,
//! and tells the same wherever chunks end.
//!
//! An input is a byte that says what kind of answer it is, four bytes that say where chunks end, and the
//! answer. A zero byte in the answer stands for 16 KiB of text, so that a small input can pass the bound.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use libfuzzer_sys::fuzz_target;
use sglang_router_rs::upstream::answer::{Facts, MAX_KEPT_BYTES, Reader};

/// What a zero byte stands for.
const FILLING: [u8; 16 << 10] = [b'x'; 16 << 10];
/// Zero bytes that are replaced; enough to pass the bound.
const FILLINGS_MAX: usize = 6;
/// A longer answer is not read byte by byte: that would be most of the time.
const BYTEWISE_MAX: usize = 8 << 10;
/// What a reader may hold between two chunks: a buffer that doubles as it grows, and besides the words
/// and counts of a batch's items.
const HELD_BYTES_MAX: usize = 2 * MAX_KEPT_BYTES + (96 << 10);

/// The system's allocator, which counts.
struct Counting;

static HELD_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting beside it touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD_BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fuzz_target!(|input: &[u8]| {
    let [kind, a, b, c, d, answer @ ..] = input else { return };
    let answer = filled(answer);
    let whole = read(*kind, [&answer[..]]);
    let even = read(*kind, answer.chunks(if answer.len() <= BYTEWISE_MAX { 1 } else { 1000 }));
    let uneven = read(*kind, chunks(&answer, [*a, *b, *c, *d]));
    for told in [&whole, &uneven] {
        assert_eq!(told.facts, even.facts, "where chunks end makes a difference");
        // Content is told of with the chunk that completes its event.
        match (&told.content_in, &even.content_in) {
            (Some(one), Some(other)) => assert!(one.start < other.end && other.start < one.end),
            (one, other) => assert_eq!(one, other),
        }
    }
});

/// What an answer told.
struct Told {
    facts: Facts,
    /// Where the chunk that brought the first content stands.
    content_in: Option<Range<usize>>,
}

fn filled(answer: &[u8]) -> Vec<u8> {
    let mut fillings = FILLINGS_MAX;
    let mut whole = Vec::new();
    for byte in answer {
        if *byte == 0 && fillings > 0 {
            fillings -= 1;
            whole.extend(FILLING);
        } else {
            whole.push(*byte);
        }
    }
    whole
}

/// The answer in chunks of these lengths, over and over; each counts up to a few hundred bytes, some none.
fn chunks(answer: &[u8], lengths: [u8; 4]) -> impl Iterator<Item = &[u8]> {
    let mut rest = answer;
    let lengths = lengths.map(|length| usize::from(length) * usize::from(length) / 64);
    // All four may be zero.
    let lengths = lengths.into_iter().chain([1000]).cycle();
    lengths.map_while(move |length| {
        let (chunk, others) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        let is_over = rest.is_empty();
        rest = others;
        (!is_over).then_some(chunk)
    })
}

fn reader(kind: u8) -> Reader {
    match kind {
        b'j' => Reader::new(Some("application/json"), None),
        b'z' => Reader::new(Some("text/event-stream"), Some("gzip")),
        b'-' => Reader::new(None, None),
        _ => Reader::new(Some("text/event-stream; charset=utf-8"), None),
    }
}

fn read<'c>(kind: u8, chunks: impl IntoIterator<Item = &'c [u8]>) -> Told {
    let held_before = HELD_BYTES.load(Ordering::Relaxed);
    let mut reader = reader(kind);
    let (mut passed, mut content_in) = (0, None);
    for chunk in chunks {
        let start = passed;
        passed += chunk.len();
        if reader.read(chunk) {
            assert_eq!(content_in.replace(start..passed), None, "told once");
        }
        let held = HELD_BYTES.load(Ordering::Relaxed).saturating_sub(held_before);
        assert!(held <= HELD_BYTES_MAX, "{held} bytes are held");
    }
    Told { facts: reader.finish(), content_in }
}
