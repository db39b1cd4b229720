//! Answering a request: from the body to the engine and back, whatever the shape.
//!
//! The one idea: an endpoint is a row of data ([`Endpoint`]): how to read its body and how to write
//! its answer, whole or as the frames of a stream. What stands here is the way between, once for
//! all.
//!
//! Invariant: which tokens a frame of a stream tells depends on the answer's length and
//! `stream_interval` alone, however late the client reads.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use futures_util::stream;
use serde_json::Value;

use super::ask::{Ask, BadAsk};
use super::refusal::{Refusal, json_response};
use super::worker::{Job, Progress, Work, Worker};

/// Writes what a stream tells at a moment; may be empty.
pub type WriteFrame = fn(&Reply, &[Progress], Moment) -> String;

/// An endpoint that runs the model.
pub struct Endpoint {
    /// Its paths.
    pub paths: &'static [&'static str],
    /// Whether errors have the shape of SGLang's own endpoints rather than OpenAI's.
    pub native: bool,
    /// Reads the body.
    pub read: fn(&Value) -> Result<Ask, BadAsk>,
    /// Writes the answer to a request that has ended, as JSON.
    pub whole: fn(&Reply, &[Progress]) -> String,
    /// Writes a stream's frames; `None` if the endpoint does not stream.
    pub frame: Option<WriteFrame>,
}

/// What an answer says besides the request's progress.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The request.
    pub body: Value,
    /// The answer's id: the request's `rid`, or 32 hexadecimal digits.
    pub id: String,
    /// The id of each part.
    pub rids: Vec<String>,
    /// The model's name: the one the request asked for, else the worker's.
    pub model: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The worker's port.
    pub port: u16,
    /// Answers to each prompt.
    pub samples: usize,
    /// Whether the answer is a list, even of one part.
    pub is_list: bool,
}

/// What a stream tells next. Parts are named by their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A part begins.
    Opening(usize),
    /// A part's next tokens.
    Tokens {
        /// The part.
        part: usize,
        /// Tokens told before.
        from: usize,
        /// Tokens told with these.
        to: usize,
        /// Whether the part is known to end with them.
        last: bool,
    },
    /// A part has ended.
    Closing {
        /// The part.
        part: usize,
        /// Whether its last token said so.
        told: bool,
    },
    /// All parts have ended.
    Summary,
    /// Nothing more follows.
    Done,
}

/// Answers a request to an endpoint.
pub async fn answer(worker: Arc<Worker>, endpoint: &'static Endpoint, body: Bytes) -> Response {
    match start(&worker, endpoint, &body) {
        Err(refusal) => refusal.into(),
        Ok((reply, work)) => {
            let mut job = worker.submit(work, &reply.rids);
            let wants_stream = reply.body["stream"] == true;
            match endpoint.frame.filter(|_| wants_stream) {
                Some(frame) => stream_response(Frames::new(job, reply, frame)),
                None => {
                    let parts = job.done().await;
                    worker.count_served();
                    json_response(StatusCode::OK, (endpoint.whole)(&reply, &parts))
                }
            }
        }
    }
}

/// Parses a body that must be a JSON object.
pub fn parse(body: &[u8]) -> Result<Value, Refusal> {
    match serde_json::from_slice(body) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(Refusal::openai(StatusCode::BAD_REQUEST, "the body must be a JSON object")),
        Err(error) => {
            let message = format!("the body is not valid JSON: {error}");
            Err(Refusal::openai(StatusCode::BAD_REQUEST, message))
        }
    }
}

fn start(worker: &Worker, endpoint: &Endpoint, body: &[u8]) -> Result<(Reply, Work), Refusal> {
    let body = parse(body)?;
    let read = (endpoint.read)(&body).and_then(|ask| ask.parts().map(|parts| (ask, parts)));
    let (ask, prompts) = read.map_err(|message| match endpoint.native {
        true => Refusal::native(StatusCode::BAD_REQUEST, message),
        false => Refusal::openai(StatusCode::BAD_REQUEST, message),
    })?;
    let stream = body["stream"] == true && endpoint.frame.is_some();
    let reply = Reply::new(worker, body, &ask, prompts.len());
    Ok((reply, Work { prompts, output_tokens: ask.output_tokens, stream }))
}

impl Reply {
    fn new(worker: &Worker, body: Value, ask: &Ask, parts: usize) -> Self {
        let own_id = || format!("{:032x}", fastrand::u128(..));
        let first_rid = body["rid"].as_str().or_else(|| body["rid"][0].as_str());
        let id = first_rid.map_or_else(own_id, str::to_owned);
        let rid = |part: usize| match (&body["rid"], parts) {
            (_, 1) => id.clone(),
            (Value::String(rid), _) => format!("{rid}_{part}"),
            (rids, _) => rids[part].as_str().map_or_else(own_id, str::to_owned),
        };
        Self {
            rids: (0..parts).map(rid).collect(),
            id,
            model: body["model"].as_str().unwrap_or(&worker.options.model).to_owned(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs()),
            port: worker.port,
            samples: ask.samples,
            is_list: ask.is_list || ask.samples > 1,
            body,
        }
    }
}

fn stream_response(frames: Frames) -> Response {
    let frames = stream::unfold(frames, |mut frames| async move {
        let frame = frames.next().await?;
        Some((Ok::<_, std::convert::Infallible>(frame), frames))
    });
    let mut response = Response::new(Body::from_stream(frames));
    let content_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// The frames of a stream. Dropping it, as a disconnect does, takes the request out of the engine.
struct Frames {
    job: Job,
    reply: Reply,
    write: WriteFrame,
    cursor: Cursor,
}

impl Frames {
    fn new(mut job: Job, reply: Reply, write: WriteFrame) -> Self {
        let stream_interval = job.worker().options.stream_interval as usize;
        let cursor = Cursor::new(job.parts().len(), stream_interval);
        Self { job, reply, write, cursor }
    }

    /// Waits for the next frame; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.cursor.done {
            match self.ready() {
                None => self.job.changed().await,
                Some(frame) if frame.is_empty() => {}
                Some(frame) => return Some(frame.into()),
            }
        }
        None
    }

    /// The next frame if there is something to tell; it may be empty.
    fn ready(&mut self) -> Option<String> {
        let parts = self.job.parts();
        let moment = self.cursor.next(&parts)?;
        let frame = (self.write)(&self.reply, &parts, moment);
        drop(parts);
        if moment == Moment::Done {
            self.job.worker().count_served();
        }
        Some(frame)
    }
}

/// How much of a request a stream has told.
#[derive(Debug)]
struct Cursor {
    parts: Vec<Told>,
    /// Tokens from one frame to the next.
    interval: usize,
    /// The part told last; the search for news begins there.
    at: usize,
    summed_up: bool,
    done: bool,
}

/// How much of one part a stream has told.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    opened: bool,
    tokens: usize,
    end: bool,
    closed: bool,
}

impl Cursor {
    fn new(parts: usize, interval: usize) -> Self {
        Self { parts: vec![Told::default(); parts], interval, at: 0, summed_up: false, done: false }
    }

    /// What to tell next, counted as told; `None` while there is nothing new, and once done.
    fn next(&mut self, parts: &[Progress]) -> Option<Moment> {
        let count = self.parts.len();
        for part in (self.at..count).chain(0..self.at) {
            if let Some(moment) = self.parts[part].next(part, &parts[part], self.interval) {
                self.at = part;
                return Some(moment);
            }
        }
        if self.done || self.parts.iter().any(|told| !told.closed) {
            return None;
        }
        self.done = self.summed_up;
        self.summed_up = true;
        Some(if self.done { Moment::Done } else { Moment::Summary })
    }
}

impl Told {
    fn next(&mut self, part: usize, progress: &Progress, interval: usize) -> Option<Moment> {
        let ended = progress.finish.is_some();
        if !self.opened && (ended || progress.completion_tokens > 0) {
            self.opened = true;
            return Some(Moment::Opening(part));
        }
        let from = self.tokens;
        let whole_frame = if from == 0 { 1 } else { from + interval };
        let to = if ended { whole_frame.min(progress.completion_tokens) } else { whole_frame };
        if from < to && to <= progress.completion_tokens {
            self.tokens = to;
            self.end = ended && to == progress.completion_tokens;
            return Some(Moment::Tokens { part, from, to, last: self.end });
        }
        if ended && !self.closed {
            self.closed = true;
            return Some(Moment::Closing { part, told: self.end });
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::worker::Finish;
    use super::*;

    fn progress(completion_tokens: usize, finish: Option<Finish>) -> Progress {
        Progress { completion_tokens, finish, ..Progress::default() }
    }

    fn told(cursor: &mut Cursor, parts: &[Progress]) -> Vec<Moment> {
        std::iter::from_fn(|| cursor.next(parts)).collect()
    }

    fn token(part: usize, number: usize, last: bool) -> Moment {
        Moment::Tokens { part, from: number - 1, to: number, last }
    }

    #[test]
    fn each_token_is_told_once_however_many_came_at_once() {
        let mut cursor = Cursor::new(1, 1);
        assert_eq!(told(&mut cursor, &[progress(0, None)]), []);
        let first = [Moment::Opening(0), token(0, 1, false), token(0, 2, false)];
        assert_eq!(told(&mut cursor, &[progress(2, None)]), first);
        let rest = [
            token(0, 3, false),
            token(0, 4, true),
            Moment::Closing { part: 0, told: true },
            Moment::Summary,
            Moment::Done,
        ];
        assert_eq!(told(&mut cursor, &[progress(4, Some(Finish::Length))]), rest);
        assert!(cursor.done);
    }

    #[test]
    fn a_frame_tells_the_first_token_then_an_interval_each_then_the_rest() {
        let frames = |seen: &[usize], last: usize| {
            let mut cursor = Cursor::new(1, 4);
            let until_end = seen.iter().map(|count| progress(*count, None));
            let moments = until_end
                .chain([progress(last, Some(Finish::Length))])
                .flat_map(|progress| told(&mut cursor, &[progress]));
            let frame = |moment| match moment {
                Moment::Tokens { from, to, last, .. } => Some((from, to, last)),
                _ => None,
            };
            moments.filter_map(frame).collect::<Vec<_>>()
        };
        let expected = [(0, 1, false), (1, 5, false), (5, 9, false), (9, 11, true)];
        assert_eq!(frames(&[], 11), expected);
        assert_eq!(frames(&[1, 2, 4, 5, 8, 10], 11), expected);
        assert_eq!(frames(&[5], 5), [(0, 1, false), (1, 5, false)]);
        assert_eq!(frames(&[], 1), [(0, 1, true)]);
        assert_eq!(frames(&[], 0), []);
    }

    #[test]
    fn an_end_without_a_new_token_is_told_by_the_closing() {
        let mut cursor = Cursor::new(1, 1);
        told(&mut cursor, &[progress(1, None)]);
        let closing = Moment::Closing { part: 0, told: false };
        let rest = told(&mut cursor, &[progress(1, Some(Finish::Abort))]);
        assert_eq!(rest, [closing, Moment::Summary, Moment::Done]);
    }

    #[test]
    fn parts_are_told_apart_and_the_last_one_ends_the_stream() {
        let mut cursor = Cursor::new(2, 1);
        let parts = [progress(0, None), progress(1, Some(Finish::Length))];
        let closing = Moment::Closing { part: 1, told: true };
        assert_eq!(told(&mut cursor, &parts), [Moment::Opening(1), token(1, 1, true), closing]);
        let parts = [progress(0, Some(Finish::Abort)), parts[1].clone()];
        let closing = Moment::Closing { part: 0, told: false };
        let rest = [Moment::Opening(0), closing, Moment::Summary, Moment::Done];
        assert_eq!(told(&mut cursor, &parts), rest);
        assert_eq!(told(&mut cursor, &parts), []);
    }
}
