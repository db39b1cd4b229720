//! The answer on its way from the worker to the client, chunk by chunk, read in passing.
//!
//! A body that hyper polls: nothing is collected, nothing is changed, and a client that reads slowly is not
//! run ahead of. It holds the [`Flight`], so that the request's end is the end of this value.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::{HeaderMap, Response, header};
use tokio::time::Sleep;

use super::flight::Flight;
use crate::error::with_causes;
use crate::upstream::Answer;
use crate::upstream::answer::Reader;

/// How much of an error answer is kept for the trace.
const EXCERPT_BYTES_MAX: usize = 400;

pub(super) struct Relay {
    answer: Answer,
    flight: Flight,
    /// None when nobody will ask for what the answer says.
    reader: Option<Reader>,
    /// The head of an answer that is an error.
    excerpt: Option<Vec<u8>>,
    has_begun: bool,
    deadline: Pin<Box<Sleep>>,
    timeout: Duration,
}

impl Relay {
    /// Turns a worker's answer into the client's. `timeout` is what the whole request may take.
    pub(super) fn begin(
        answer: Response<Answer>,
        mut flight: Flight,
        timeout: Duration,
    ) -> Response<Self> {
        let deadline = tokio::time::Instant::from_std(flight.arrived_at() + timeout);
        let status = flight.relaying();
        let reader = flight.is_traced().then(|| reader(answer.headers()));
        let is_readable = !answer.headers().contains_key(header::CONTENT_ENCODING);
        let excerpt = (!status.is_success() && is_readable).then(Vec::new);
        answer.map(|answer| Self {
            answer,
            flight,
            reader,
            excerpt,
            has_begun: false,
            deadline: Box::pin(tokio::time::sleep_until(deadline)),
            timeout,
        })
    }

    fn passed(&mut self, data: &Bytes) {
        if data.is_empty() {
            return;
        }
        let now = Instant::now();
        if !std::mem::replace(&mut self.has_begun, true) {
            self.flight.first_byte(now);
        }
        if let Some(excerpt) = &mut self.excerpt {
            let room = EXCERPT_BYTES_MAX - excerpt.len();
            excerpt.extend_from_slice(&data[..data.len().min(room)]);
        }
        if self.reader.as_mut().is_some_and(|reader| reader.read(data)) {
            self.flight.first_content(now);
        }
    }

    fn ended(&mut self) {
        self.tell();
        let excerpt = self.excerpt.take().unwrap_or_default();
        // On one line, whatever the worker wrote.
        let excerpt = String::from_utf8_lossy(&excerpt).replace(char::is_control, " ");
        self.flight.relayed(excerpt.trim());
    }

    fn broke(&mut self, message: &str) {
        self.tell();
        self.flight.broke(message);
    }

    /// Also of an answer that is not whole it is known what it said so far.
    fn tell(&mut self) {
        if let Some(reader) = self.reader.take() {
            self.flight.said(&reader.finish());
        }
    }
}

fn reader(headers: &HeaderMap) -> Reader {
    let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
    Reader::new(text(header::CONTENT_TYPE), text(header::CONTENT_ENCODING))
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if this.deadline.as_mut().poll(cx).is_ready() {
            let message = format!("the answer had not ended after {} s", this.timeout.as_secs());
            this.broke(&message);
            return Poll::Ready(Some(Err(message.into())));
        }
        let frame = ready!(Pin::new(&mut this.answer).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.passed(data);
                }
                if this.answer.is_end_stream() {
                    this.ended();
                }
            }
            Some(Err(error)) => {
                let causes = with_causes(error);
                this.broke(&format!("the worker's answer broke off: {causes}"));
            }
            None => this.ended(),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.answer.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.answer.size_hint()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // An answer without a body is never polled.
        if self.answer.is_end_stream() {
            self.ended();
        } else {
            self.tell();
        }
    }
}
