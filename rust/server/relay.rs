//! The answer on its way from the worker to the client, chunk by chunk, read in passing.
//!
//! A body that hyper polls: nothing is collected, nothing is changed, and a client that reads slowly is not
//! run ahead of. It holds the [`Flight`], so that the request's end is the end of this value.
//!
//! An answer that cannot be brought to its end is ended so that nobody takes it for whole: a stream of events with an
//! event that says why, anything else by cutting the connection.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::{HeaderMap, Response, header};
use tokio::time::{Instant, Sleep};

use super::error_response;
use super::flight::{Flight, unread};
use crate::error::{Error, Kind, Origin, with_causes};
use crate::upstream::Answer;
use crate::upstream::answer::{Reader, is_stream};

/// How much of an error answer is kept for the trace.
const EXCERPT_BYTES_MAX: usize = 400;

/// How long an answer may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// The whole request, from its arrival.
    pub(super) whole: Duration,
    /// From one chunk of the answer to the next.
    pub(super) stall: Duration,
}

pub(super) struct Relay {
    /// None once it was given up.
    answer: Option<Answer>,
    flight: Flight,
    /// None once it has told.
    reader: Option<Reader>,
    /// The head of an answer that is an error.
    excerpt: Option<Vec<u8>>,
    /// For an answer that can still say that it broke off.
    events: Option<Events>,
    /// Why the connection is to be cut.
    cut: Option<Box<dyn StdError + Send + Sync>>,
    has_begun: bool,
    patience: Patience,
    deadline: Instant,
    /// Since when the worker is waited for. A client that is not ready for more is not the worker's delay.
    waiting_since: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

/// The last bytes of a stream of events.
#[derive(Debug, Default)]
struct Events([u8; 4]);

impl Events {
    fn passed(&mut self, data: &[u8]) {
        let new = &data[data.len().saturating_sub(4)..];
        self.0.rotate_left(new.len());
        self.0[4 - new.len()..].copy_from_slice(new);
    }

    /// Whether the last event was whole, so that another one may follow.
    fn is_between_two(&self) -> bool {
        self.0 == [0; 4] || self.0.ends_with(b"\n\n") || self.0 == *b"\r\n\r\n"
    }
}

impl Relay {
    /// Turns a worker's answer into the client's.
    pub(super) fn begin(
        answer: Response<Answer>,
        mut flight: Flight,
        patience: Patience,
    ) -> Response<Self> {
        let deadline = Instant::from_std(flight.deadline());
        let status = flight.relaying();
        let headers = answer.headers();
        let reader = Some(reader(headers));
        let is_readable = !headers.contains_key(header::CONTENT_ENCODING);
        let excerpt = (!status.is_success() && is_readable).then(Vec::new);
        let is_open = is_readable && !headers.contains_key(header::CONTENT_LENGTH);
        let is_events = is_stream(text(headers, header::CONTENT_TYPE));
        let events = (is_open && is_events).then(Events::default);
        answer.map(|answer| Self {
            answer: Some(answer),
            flight,
            reader,
            excerpt,
            events,
            cut: None,
            has_begun: false,
            patience,
            deadline,
            waiting_since: None,
            timer: Box::pin(tokio::time::sleep_until(deadline)),
        })
    }

    /// Notes a chunk, unless it comes too late.
    fn passed(&mut self, data: &Bytes) -> Result<(), Error> {
        let was_awaited = self.waiting_since.take().is_some();
        let now = Instant::now();
        if now >= self.deadline {
            return Err(if was_awaited { self.too_long() } else { self.unread() });
        }
        if data.is_empty() {
            return Ok(());
        }
        if !std::mem::replace(&mut self.has_begun, true) {
            self.flight.first_byte(now.into_std());
        }
        if let Some(excerpt) = &mut self.excerpt {
            let room = EXCERPT_BYTES_MAX - excerpt.len();
            excerpt.extend_from_slice(&data[..data.len().min(room)]);
        }
        if let Some(events) = &mut self.events {
            events.passed(data);
        }
        if self.reader.as_mut().is_some_and(|reader| reader.read(data)) {
            self.flight.first_content(now.into_std());
        }
        Ok(())
    }

    /// Ready when the worker has been waited for too long.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        let is_new = self.waiting_since.is_none();
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        let until = self.deadline.min(since + self.patience.stall);
        // A timer that fires too early is set again; one that fires too late is not of this wait.
        if (is_new && self.timer.deadline() > until) || self.timer.as_mut().poll(cx).is_ready() {
            if Instant::now() >= until {
                let is_whole = until == self.deadline;
                return Poll::Ready(if is_whole { self.too_long() } else { self.stalled() });
            }
            self.timer.as_mut().reset(until);
            return self.timer.as_mut().poll(cx).map(|()| self.stalled());
        }
        Poll::Pending
    }

    fn too_long(&self) -> Error {
        let secs = self.patience.whole.as_secs();
        let message = format!("the answer had not ended after {secs} s (request_timeout_secs)");
        // It was going on.
        Error::new(Kind::Timeout, message).by(Origin::Router)
    }

    /// The worker was ahead of its client.
    fn unread(&self) -> Error {
        Error::new(Kind::Timeout, unread(self.patience.whole)).by(Origin::Client)
    }

    fn stalled(&self) -> Error {
        let secs = self.patience.stall.as_secs();
        let message =
            format!("nothing more of the answer came for {secs} s (stream_stall_timeout_secs)");
        Error::new(Kind::Timeout, message)
    }

    fn ended(&mut self) {
        self.answer = None;
        self.tell();
        let excerpt = self.excerpt.take().unwrap_or_default();
        self.flight.relayed(&one_line(&excerpt));
    }

    /// Gives the answer up, which closes its connection. The event that tells the client, or None where it is cut.
    fn broke(&mut self, error: &Error) -> Option<Bytes> {
        self.answer = None;
        self.tell();
        self.flight.broke(error);
        let events = self.events.as_ref()?;
        let event = error_response::event(error, self.flight.route());
        Some(if events.is_between_two() { event } else { [b"\n\n", &event[..]].concat().into() })
    }

    /// Ends the client's connection at the next poll: what hyper has not written yet when a body fails, it forgets.
    fn cut<T>(&mut self, cx: &Context<'_>, why: &str) -> Poll<T> {
        self.cut = Some(why.into());
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Also of an answer that is not whole it is known what it said so far.
    fn tell(&mut self) {
        if let Some(reader) = self.reader.take() {
            self.flight.said(&reader.finish());
        }
    }
}

/// What a worker wrote, on one line.
pub(super) fn one_line(excerpt: &[u8]) -> String {
    String::from_utf8_lossy(excerpt).replace(char::is_control, " ").trim().to_owned()
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn reader(headers: &HeaderMap) -> Reader {
    Reader::new(text(headers, header::CONTENT_TYPE), text(headers, header::CONTENT_ENCODING))
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let Some(answer) = &mut this.answer else { return Poll::Ready(this.cut.take().map(Err)) };
        let answered = if this.flight.poll_aborted(cx).is_ready() {
            Poll::Ready(Some(Err(super::aborted())))
        } else {
            match Pin::new(answer).poll_frame(cx) {
                Poll::Ready(Some(Err(_))) if this.flight.is_cut() => {
                    this.answer = None;
                    return this.cut(cx, "the router was stopped");
                }
                Poll::Ready(Some(Ok(frame))) => {
                    let passed = frame.data_ref().map_or(Ok(()), |data| this.passed(data));
                    Poll::Ready(Some(passed.map(|()| frame)))
                }
                Poll::Ready(Some(Err(error))) => {
                    let causes = with_causes(&error);
                    let message = format!("the worker's answer broke off: {causes}");
                    Poll::Ready(Some(Err(Error::new(Kind::WorkerUnreachable, message))))
                }
                Poll::Ready(None) => Poll::Ready(None),
                Poll::Pending => this.poll_patience(cx).map(|error| Some(Err(error))),
            }
        };
        match ready!(answered) {
            Some(Ok(frame)) => {
                if this.is_end_stream() {
                    this.ended();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => match this.broke(&error) {
                Some(event) => Poll::Ready(Some(Ok(Frame::data(event)))),
                None => this.cut(cx, &error.message),
            },
            None => {
                this.ended();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.cut.is_none() && self.answer.as_ref().is_none_or(Answer::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.answer.as_ref().map_or_else(|| SizeHint::with_exact(0), Answer::size_hint)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // An answer without a body is never polled.
        if self.answer.as_ref().is_some_and(Answer::is_end_stream) {
            self.ended();
        } else {
            self.tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_whole_at_its_blank_line_wherever_chunks_end() {
        let is_between = |chunks: &[&str]| {
            let mut events = Events::default();
            chunks.iter().for_each(|chunk| events.passed(chunk.as_bytes()));
            events.is_between_two()
        };
        assert!(is_between(&[]));
        assert!(is_between(&["data: 1\n\n"]));
        assert!(is_between(&["data: 1\n", "\n"]));
        assert!(is_between(&["data: 1\r\n\r", "\n"]));
        assert!(!is_between(&["data: 1\n\n", "data: 2"]));
        assert!(!is_between(&["data: 1\n"]));
        assert!(!is_between(&["\n", "x", "\n"]));
    }
}
