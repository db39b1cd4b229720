//! The request's body, whole: it is looked at once and may have to be sent twice.

use std::error::Error as _;
use std::io;
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

/// Reads a body of at most `max_bytes`.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Body,
    max_bytes: u64,
) -> Result<Bytes, Error> {
    let announced = body.size_hint().lower();
    if announced > max_bytes {
        refuse(headers, body).await;
        return Err(too_large(max_bytes));
    }
    let Some(mut first) = next(&mut body).await? else {
        return Ok(Bytes::new());
    };
    if body.is_end_stream() && first.len() as u64 <= max_bytes {
        return Ok(first);
    }
    let mut whole = BytesMut::with_capacity(announced.min(TRUSTED_LENGTH_MAX) as usize);
    loop {
        if whole.len() as u64 + first.len() as u64 > max_bytes {
            drain(body).await;
            return Err(too_large(max_bytes));
        }
        whole.extend_from_slice(&first);
        match next(&mut body).await? {
            Some(chunk) => first = chunk,
            None => return Ok(whole.freeze()),
        }
    }
}

async fn next(body: &mut Body) -> Result<Option<Bytes>, Error> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(&error))?;
        // Trailers are not data.
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
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
    use futures_util::stream;

    async fn read_chunks(chunks: &[&'static str], max_bytes: u64) -> Result<Bytes, Kind> {
        let chunks: Vec<_> =
            chunks.iter().map(|chunk| Ok::<_, Error>(Bytes::from(*chunk))).collect();
        let body = Body::from_stream(stream::iter(chunks));
        read(&HeaderMap::new(), body, max_bytes).await.map_err(|error| error.kind)
    }

    #[tokio::test]
    async fn a_body_is_read_whole_up_to_its_bound() {
        assert_eq!(read_chunks(&[], 5).await, Ok(Bytes::new()));
        assert_eq!(read_chunks(&["abc", "", "de"], 5).await, Ok(Bytes::from("abcde")));
        assert_eq!(read_chunks(&["abc", "def"], 5).await, Err(Kind::PayloadTooLarge));
        assert_eq!(read_chunks(&["abcdef"], 5).await, Err(Kind::PayloadTooLarge));
        let announced = read(&HeaderMap::new(), Body::from("abcdef"), 5).await;
        assert_eq!(announced.map_err(|error| error.kind), Err(Kind::PayloadTooLarge));
    }
}
