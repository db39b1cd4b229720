//! A log of the requests that a simulated worker was sent, for those who want to check a router's word.
//!
//! The one idea: an envelope like the faults, around them, so that requests that hang or are failed are in it
//! too. One JSON line when a request has arrived, body included, and one when it ended:
//!
//! ```text
//! {"event":"arrived","at":1767225600.5,"port":30005,"path":"/generate","request_id":"r-1","rid":null,"status":null,"ending":null}
//! {"event":"ended","at":1767225600.9,…,"status":200,"ending":"completed"}
//! ```
//!
//! Invariant: a line is with the system before what it tells of goes on, so the lines of a worker that is killed
//! are there up to its death. A request that has arrived ends once; without its second line, the worker died.
//!
//! Not here: requests that are not POST, and `/sim/…`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;

use super::http::refuse_body;

/// A file that requests are logged to. Several workers, and processes, may share it.
#[derive(Debug)]
pub struct RequestLog {
    file: Mutex<File>,
}

impl RequestLog {
    /// Opens the file to add to its end.
    ///
    /// # Errors
    /// The system's error, with the path in its text.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot open {}: {error}", path.display()))
        })?;
        Ok(Self { file: Mutex::new(file) })
    }

    fn write(&self, line: &Line) {
        let mut text = serde_json::to_vec(line).expect("a line is plain data");
        text.push(b'\n');
        if let Err(error) = self.file.lock().write_all(&text) {
            eprintln!("the request log misses a line: {error}");
        }
    }
}

#[derive(Clone, Debug, Serialize)]
struct Line {
    event: &'static str,
    /// Seconds since 1970.
    at: f64,
    port: u16,
    path: String,
    /// The header `x-request-id`.
    request_id: Option<String>,
    /// The body's `rid`, whatever it is.
    rid: Value,
    /// Of the answer, if it has begun.
    status: Option<u16>,
    ending: Option<Ending>,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Ending {
    /// The whole answer was handed over.
    Completed,
    /// The client went away, or the worker was stopped.
    CutOff,
    /// A fault ended the answer.
    Died,
}

/// A request on its way. Dropped without an end, it was cut off.
#[derive(Debug)]
struct Entry {
    log: Arc<RequestLog>,
    line: Line,
}

impl Entry {
    fn arrived(
        log: Arc<RequestLog>,
        port: u16,
        path: &str,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Self {
        let request_id = headers
            .get("x-request-id")
            .map(|id| String::from_utf8_lossy(id.as_bytes()).into_owned());
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let line = Line {
            event: "arrived",
            at: now(),
            port,
            path: path.to_owned(),
            request_id,
            rid: body["rid"].clone(),
            status: None,
            ending: None,
        };
        log.write(&line);
        Self { log, line }
    }

    fn end(&mut self, ending: Ending) {
        if self.line.ending.is_none() {
            self.line.event = "ended";
            self.line.at = now();
            self.line.ending = Some(ending);
            self.log.write(&self.line);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.end(Ending::CutOff);
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Layer around every endpoint of the look-alike: logs requests and their ends. The port is the worker's.
pub async fn log(
    State((log, port)): State<(Arc<RequestLog>, u16)>,
    request: Request,
    next: Next,
) -> Response {
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let (head, body) = request.into_parts();
    // The head stays, for it says how large a body may be.
    let body = Bytes::from_request(Request::from_parts(head.clone(), body), &()).await;
    let known = body.as_deref().unwrap_or_default();
    let mut entry = Entry::arrived(log, port, head.uri.path(), &head.headers, known);
    let response = match body {
        Ok(body) => next.run(Request::from_parts(head, body.into())).await,
        Err(rejection) => refuse_body(&rejection).into(),
    };
    entry.line.status = Some(response.status().as_u16());
    if response.body().is_end_stream() {
        entry.end(Ending::Completed);
    }
    response.map(|inner| Body::new(Logged { inner, entry }))
}

/// An answer's body that notes its own end.
struct Logged {
    inner: Body,
    entry: Entry,
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(task));
        match frame {
            Some(Err(_)) => self.entry.end(Ending::Died),
            None => self.entry.end(Ending::Completed),
            // Nobody asks a body for more that says it is at its end.
            Some(Ok(_)) if self.inner.is_end_stream() => self.entry.end(Ending::Completed),
            Some(Ok(_)) => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
