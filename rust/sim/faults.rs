//! What a simulated worker does wrong on purpose, and the layer that does it.
//!
//! The one idea: faults are an envelope around the endpoints, which know nothing of them. Flags set
//! them at start, `POST /sim/faults` at run time; both go through the same checks. Which requests
//! fail depends on the seed and on how many came before, nothing else.
//!
//! Not here: faults of single connections or of the network.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::stream;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use serde::{Deserialize, Deserializer, Serialize};

use super::refusal::Refusal;
use super::worker::Worker;

/// The faults in force.
#[derive(Clone, Debug, PartialEq, Serialize, clap::Args)]
#[group(skip)]
pub struct Faults {
    /// Share of the requests that are answered with --fail-status, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    #[arg(allow_negative_numbers = true, value_parser = parse_fail_rate)]
    pub fail_rate: f64,
    /// Status of those answers, 400 to 599.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u16).range(400..=599))]
    pub fail_status: u16,
    /// Cut each answer, streamed or not, after this many chunks by closing the connection; 0 =
    /// never.
    #[arg(long, default_value_t = 0)]
    pub die_after_chunks: u32,
    /// Accept requests, health checks too, and answer none of them until this is switched off.
    #[arg(long, default_value_t = false)]
    pub hang: bool,
}

/// A change at run time: what is absent stays as it is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    #[serde(default, deserialize_with = "given")]
    fail_rate: Option<f64>,
    #[serde(default, deserialize_with = "given")]
    fail_status: Option<u16>,
    #[serde(default, deserialize_with = "given")]
    die_after_chunks: Option<u32>,
    #[serde(default, deserialize_with = "given")]
    hang: Option<bool>,
}

/// A value that is there. `null` would change nothing, and say so to nobody.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(value: D) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

fn parse_fail_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    check_fail_rate(rate)
}

fn check_fail_rate(rate: f64) -> Result<f64, String> {
    match rate {
        0.0..=1.0 => Ok(rate),
        _ => Err(format!("fail_rate must be between 0 and 1, got {rate}")),
    }
}

impl Faults {
    /// These faults with the changes that a JSON object asks for; an unknown name or a bad value is
    /// an error that says which.
    pub fn changed(&self, json: &[u8]) -> Result<Self, String> {
        let change: Change = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let fail_status = change.fail_status.unwrap_or(self.fail_status);
        if !(400..=599).contains(&fail_status) {
            return Err(format!("fail_status must be between 400 and 599, got {fail_status}"));
        }
        Ok(Self {
            fail_rate: check_fail_rate(change.fail_rate.unwrap_or(self.fail_rate))?,
            fail_status,
            die_after_chunks: change.die_after_chunks.unwrap_or(self.die_after_chunks),
            hang: change.hang.unwrap_or(self.hang),
        })
    }
}

/// Layer around every endpoint of the look-alike: hangs.
pub async fn hang(State(worker): State<Arc<Worker>>, request: Request, next: Next) -> Response {
    worker.responsive().await;
    next.run(request).await
}

/// Layer around the model's endpoints: fails some requests, cuts the answers to the others.
pub async fn fail(State(worker): State<Arc<Worker>>, request: Request, next: Next) -> Response {
    let faults = worker.faults();
    // Drawn even if the rate is 0, so that the fate of the n-th request depends on the seed alone.
    if worker.draw() < faults.fail_rate {
        let status = StatusCode::from_u16(faults.fail_status).unwrap_or_default();
        return Refusal::native(status, "simulated failure").into();
    }
    let response = next.run(request).await;
    match faults.die_after_chunks {
        0 => response,
        chunks => cut(response, chunks).await,
    }
}

/// The same answer, whose body breaks off after `chunks` chunks.
async fn cut(mut response: Response, chunks: u32) -> Response {
    let body = std::mem::take(response.body_mut());
    let inner = match body.size_hint().exact() {
        None => body,
        Some(length) => {
            // Still announced in full, so that the client can tell that something is missing.
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
            let whole = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            in_pieces(whole, chunks)
        }
    };
    *response.body_mut() = Body::new(Cut { inner, chunks_left: chunks, flushed: false });
    response
}

/// A body of more than `chunks` chunks, as far as its length allows.
fn in_pieces(whole: Bytes, chunks: u32) -> Body {
    let piece = whole.len().div_ceil(chunks as usize + 1).max(1);
    let mut rest = whole;
    let pieces = std::iter::from_fn(move || {
        let size = piece.min(rest.len());
        (size > 0).then(|| Ok::<_, io::Error>(rest.split_to(size)))
    });
    Body::from_stream(stream::iter(pieces))
}

/// A body that fails after so many chunks, which makes the server close the connection.
struct Cut {
    inner: Body,
    chunks_left: u32,
    flushed: bool,
}

impl HttpBody for Cut {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.chunks_left == 0 {
            if !self.flushed {
                // The server writes out what it has while a body is pending, and drops it when a
                // body fails.
                self.flushed = true;
                task.waker().wake_by_ref();
                return Poll::Pending;
            }
            return Poll::Ready(Some(Err(axum::Error::new("the simulated worker died"))));
        }
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(task));
        self.chunks_left -= 1;
        Poll::Ready(frame)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> Faults {
        Faults { fail_rate: 0.0, fail_status: 500, die_after_chunks: 0, hang: false }
    }

    #[test]
    fn a_change_leaves_the_rest_as_it_is() {
        let changed = none().changed(br#"{"fail_rate": 0.5, "fail_status": 503}"#).unwrap();
        assert_eq!(changed, Faults { fail_rate: 0.5, fail_status: 503, ..none() });
        let changed = changed.changed(br#"{"hang": true, "die_after_chunks": 3}"#).unwrap();
        let all = Faults { fail_rate: 0.5, fail_status: 503, die_after_chunks: 3, hang: true };
        assert_eq!(changed, all);
        assert_eq!(changed.changed(b"{}").unwrap(), all);
    }

    #[test]
    fn a_bad_change_says_what_is_wrong() {
        let error = |json: &str| none().changed(json.as_bytes()).unwrap_err();
        assert!(error(r#"{"fail_rat": 1}"#).contains("unknown field `fail_rat`"));
        assert!(error(r#"{"fail_rate": 1.5}"#).contains("between 0 and 1, got 1.5"));
        assert!(error(r#"{"fail_status": 200}"#).contains("between 400 and 599, got 200"));
        assert!(error(r#"{"fail_status": 70000}"#).contains("70000"));
        assert!(error(r#"{"die_after_chunks": -1}"#).contains("-1"));
        assert!(error(r#"{"hang": "yes"}"#).contains("boolean"));
        assert!(error("[1").contains("EOF") || !error("[1").is_empty());
    }

    #[tokio::test]
    async fn an_unstreamed_answer_is_cut_short_of_its_length() {
        for (length, chunks) in [(1usize, 1u32), (10, 1), (10, 3), (100, 7)] {
            let response = cut(Response::new(Body::from(vec![b'x'; length])), chunks).await;
            assert_eq!(response.headers()[CONTENT_LENGTH], length.to_string().as_str());
            let mut body = response.into_body();
            let (mut received, mut broken) = (0, false);
            while let Some(frame) = body.frame().await {
                match frame {
                    Ok(frame) => received += frame.into_data().map_or(0, |data| data.len()),
                    Err(_) => {
                        broken = true;
                        break;
                    }
                }
            }
            assert!(broken && (received < length || length == 1), "{received} of {length}");
        }
    }
}
