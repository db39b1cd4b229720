//! The request's body, whole: it is looked at once and may have to be sent twice.
//!
//! All bodies held at one time share a [`Budget`]. A body counts until its last reference is gone, be it the
//! connection's that still sends it.

use std::error::Error as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::Body as _;
use hyper::header;

use crate::error::{Error, Kind, with_causes};

/// How much of a body that is too large is read and thrown away, and for how long, so that a client that is still
/// sending it gets to read the refusal.
const DRAINED_BYTES_MAX: u64 = 16 << 20;
const DRAINED_FOR: Duration = Duration::from_secs(2);

/// How a client that left in the middle of its body shows.
const LEFT: [io::ErrorKind; 4] = [
    io::ErrorKind::UnexpectedEof,
    io::ErrorKind::ConnectionReset,
    io::ErrorKind::ConnectionAborted,
    io::ErrorKind::BrokenPipe,
];

/// Memory taken on a client's mere word about its body's length.
const TRUSTED_LENGTH_MAX: u64 = 1 << 20;

/// How long a client may take for its next bytes.
const STALL_MAX: Duration = Duration::from_secs(60);

/// What all bodies together may take.
#[derive(Debug)]
pub(super) struct Budget {
    bytes_max: u64,
    taken: AtomicU64,
}

impl Budget {
    pub(super) fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self { bytes_max, taken: AtomicU64::new(0) })
    }

    /// Bytes taken now.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

/// A body's share of the budget.
struct Share {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Share {
    fn grow(&mut self, bytes: usize) -> Result<(), Error> {
        let (bytes, max) = (bytes as u64, self.budget.bytes_max);
        let fits = |taken: u64| taken.checked_add(bytes).filter(|whole| *whole <= max);
        match self.budget.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => {
                self.bytes += bytes;
                Ok(())
            }
            Err(taken) => {
                let message = format!(
                    "the bodies of the requests in flight take {taken} of {max} bytes (max_buffered_bytes); try \
                     again later"
                );
                Err(Error::new(Kind::Overloaded, message))
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Bytes with their share of the budget.
struct Held {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads a body of at most `max_bytes`.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Body,
    max_bytes: u64,
    budget: &Arc<Budget>,
) -> Result<Bytes, Error> {
    check_coding(headers)?;
    let announced = body.size_hint().lower();
    let mut share = Share { budget: budget.clone(), bytes: 0 };
    let bytes = if announced > max_bytes {
        Err(too_large(max_bytes))
    } else {
        read_into(&mut body, max_bytes, announced, &mut share).await
    };
    match bytes {
        Ok(bytes) => Ok(Bytes::from_owner(Held { bytes, _share: share })),
        Err(error) => {
            drop(share);
            // Who waits for a 100 has sent nothing yet, unless it was told to go on by then.
            if announced > max_bytes {
                refuse(headers, body).await;
            } else if matches!(error.kind, Kind::PayloadTooLarge | Kind::Overloaded) {
                drain(body).await;
            }
            Err(error)
        }
    }
}

/// A coding that the router would not undo must not be passed on as if it had been (RFC 9112, section 6.1).
fn check_coding(headers: &HeaderMap) -> Result<(), Error> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if codings.all(|coding| coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked")) {
        return Ok(());
    }
    let message =
        "the request's transfer-encoding is not chunked alone, the only one the router knows";
    Err(Error::new(Kind::IncompleteBody, message))
}

async fn read_into(
    body: &mut Body,
    max_bytes: u64,
    announced: u64,
    share: &mut Share,
) -> Result<Bytes, Error> {
    let Some(mut chunk) = next(body).await? else {
        return Ok(Bytes::new());
    };
    let mut whole = BytesMut::new();
    loop {
        if whole.len() as u64 + chunk.len() as u64 > max_bytes {
            return Err(too_large(max_bytes));
        }
        share.grow(chunk.len())?;
        if whole.is_empty() && body.is_end_stream() {
            return Ok(chunk);
        }
        if whole.is_empty() {
            whole.reserve(announced.min(TRUSTED_LENGTH_MAX) as usize);
        }
        whole.extend_from_slice(&chunk);
        match next(body).await? {
            Some(next) => chunk = next,
            None => return Ok(whole.freeze()),
        }
    }
}

async fn next(body: &mut Body) -> Result<Option<Bytes>, Error> {
    loop {
        let frame = tokio::time::timeout(STALL_MAX, body.frame()).await.map_err(|_| {
            let message =
                format!("nothing more of the request body came for {} s", STALL_MAX.as_secs());
            Error::new(Kind::IncompleteBody, message)
        })?;
        let Some(frame) = frame else { return Ok(None) };
        // Trailers are not data.
        if let Ok(data) = frame.map_err(|error| broken(&error))?.into_data() {
            return Ok(Some(data));
        }
    }
}

/// A body in bad form, or a client that left.
fn broken(error: &axum::Error) -> Error {
    let mut source = error.source();
    while let Some(cause) = source {
        if cause.downcast_ref::<io::Error>().is_some_and(|cause| LEFT.contains(&cause.kind())) {
            return Error::new(
                Kind::Aborted,
                "client disconnected before its request was complete",
            );
        }
        source = cause.source();
    }
    let message = format!("the request body is broken: {}", with_causes(error));
    Error::new(Kind::IncompleteBody, message)
}

/// Does with a body what has to be done before its request is refused unread.
pub(super) async fn refuse(headers: &HeaderMap, body: Body) {
    // Who waits for a 100 has sent nothing yet.
    if !headers.contains_key(header::EXPECT) {
        drain(body).await;
    }
}

async fn drain(mut body: Body) {
    let reading = async {
        let mut drained = 0;
        while let Ok(Some(chunk)) = next(&mut body).await {
            drained += chunk.len() as u64;
            if drained > DRAINED_BYTES_MAX {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(DRAINED_FOR, reading).await;
}

fn too_large(max_bytes: u64) -> Error {
    let message = format!("the request body is larger than the {max_bytes} bytes allowed");
    Error::new(Kind::PayloadTooLarge, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{StreamExt, stream};

    async fn read_body(body: Body, max_bytes: u64, budget: &Arc<Budget>) -> Result<Bytes, Kind> {
        read(&HeaderMap::new(), body, max_bytes, budget).await.map_err(|error| error.kind)
    }

    fn chunks(chunks: &[&'static str]) -> Body {
        let chunks: Vec<_> =
            chunks.iter().map(|chunk| Ok::<_, Error>(Bytes::from(*chunk))).collect();
        Body::from_stream(stream::iter(chunks))
    }

    #[tokio::test]
    async fn a_body_is_read_whole_up_to_its_bound() {
        let budget = Budget::new(1 << 20);
        let read_chunks = async |parts: &[&'static str]| read_body(chunks(parts), 5, &budget).await;
        assert_eq!(read_chunks(&[]).await, Ok(Bytes::new()));
        assert_eq!(read_chunks(&["abc", "", "de"]).await, Ok(Bytes::from("abcde")));
        assert_eq!(read_chunks(&["abc", "def"]).await, Err(Kind::PayloadTooLarge));
        assert_eq!(read_chunks(&["abcdef"]).await, Err(Kind::PayloadTooLarge));
        let announced = read_body(Body::from("abcdef"), 5, &budget).await;
        assert_eq!(announced, Err(Kind::PayloadTooLarge));
        assert_eq!(budget.taken(), 0);
    }

    #[tokio::test]
    async fn all_bodies_together_have_a_bound_and_give_back_what_they_took() {
        let budget = Budget::new(8);
        let first = read_body(chunks(&["abc", "de"]), 100, &budget).await.expect("fits");
        let other_hand = first.clone();
        assert_eq!(budget.taken(), 5);
        let second = read_body(Body::from("abcd"), 100, &budget).await;
        assert_eq!(second, Err(Kind::Overloaded));
        drop(first);
        assert_eq!(budget.taken(), 5, "somebody still sends it");
        drop(other_hand);
        assert!(read_body(Body::from("abcd"), 100, &budget).await.is_ok());
        assert_eq!(budget.taken(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stops_in_the_middle_is_not_waited_for() {
        let budget = Budget::new(1 << 20);
        let begun = stream::iter([Ok::<_, Error>(Bytes::from("abc"))]);
        let body = Body::from_stream(begun.chain(stream::pending()));
        assert_eq!(read_body(body, 100, &budget).await, Err(Kind::IncompleteBody));
    }

    #[tokio::test]
    async fn a_coding_that_is_not_known_is_refused() {
        for (coding, is_known) in [("chunked", true), ("Chunked ", true), ("gzip, chunked", false)]
        {
            let headers = [(header::TRANSFER_ENCODING, coding.parse().expect("a value"))];
            let headers = headers.into_iter().collect();
            let read = read(&headers, Body::from("x"), 5, &Budget::new(9)).await;
            assert_eq!(read.is_ok(), is_known, "{coding}");
        }
    }
}
