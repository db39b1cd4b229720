//! The request tracker over HTTP: one trace, a batch, a listing or an export, statistics.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Query as Pairs, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use hyper::header::{HeaderName, HeaderValue};
use serde::Deserialize;
use tokio::task::block_in_place;

use super::{App, body};
use crate::error::{Error, Kind, shown};
use crate::tracking::{Format, Mooncake, Query, Stats, Trace, Tracker, csv_header, csv_rows};

const BATCH_IDS_MAX: usize = 10_000;
/// Room for that many ids of 256 characters, each escaped and quoted.
const BATCH_BYTES_MAX: u64 = 16 << 20;
/// Where the next page begins; absent on the last.
pub(super) const X_NEXT_CURSOR: HeaderName = HeaderName::from_static("x-next-cursor");
/// Traces that matched and gave no line.
pub(super) const X_LEFT_OUT: HeaderName = HeaderName::from_static("x-left-out");

pub(super) async fn one(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Trace>, Error> {
    let tracker = app.traces()?;
    let Path(id) = id?;
    let trace = tracker.get(&id);
    trace.map(Json).ok_or_else(|| {
        let message =
            format!("no trace of {}: never seen here, or expired, or evicted", shown(&id));
        Error::new(Kind::NotFound, message)
    })
}

#[derive(Deserialize)]
struct Batch {
    request_ids: Vec<String>,
}

pub(super) async fn batch(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Vec<Trace>>, Error> {
    let tracker = app.traces()?;
    let (head, body) = request.into_parts();
    let body = body::read(&head.headers, body, BATCH_BYTES_MAX, &app.own_budget).await?;
    let batch: Batch = serde_json::from_slice(&body).map_err(|error| {
        let message = format!(r#"the body is not {{"request_ids": ["...", ...]}}: {error}"#);
        Error::new(Kind::InvalidQuery, message)
    })?;
    let ids = batch.request_ids;
    if ids.len() > BATCH_IDS_MAX {
        let message =
            format!("{} ids in one batch; at most {BATCH_IDS_MAX} are looked up", ids.len());
        return Err(Error::new(Kind::PayloadTooLarge, message));
    }
    Ok(Json(block_in_place(|| tracker.get_many(&ids))))
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    pairs: Result<Pairs<Vec<(String, String)>>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Error> {
    let tracker = app.traces()?;
    let invalid = |error: String| Error::new(Kind::InvalidQuery, error);
    let Pairs(pairs) = pairs.map_err(|error| invalid(error.body_text()))?;
    let query = Query::parse(pairs).map_err(|error| invalid(error.to_string()))?;
    match query.format {
        Format::Json => {
            let page = block_in_place(|| tracker.list(&query));
            let next =
                page.next_cursor.and_then(|next| HeaderValue::try_from(next.to_string()).ok());
            let mut response = Json(page.traces).into_response();
            if let Some(next) = next {
                response.headers_mut().insert(X_NEXT_CURSOR, next);
            }
            Ok(response)
        }
        Format::Csv => {
            let rows = tracker.pages(&query).map(|traces| csv_rows(&traces));
            let lines = std::iter::once(csv_header()).chain(rows);
            Ok(export(lines, "text/csv; charset=utf-8"))
        }
        Format::Jsonl => {
            let lines = tracker.pages(&query).map(|traces| json_lines(&traces));
            Ok(export(lines, "application/jsonl"))
        }
        Format::Mooncake => {
            if !tracker.options().trace_prompt_blocks {
                let message = "format=mooncake is made of the hashes of prompts, which are not kept: start the \
                               router with --trace-prompt-blocks, or in Python with Router(..., \
                               trace_prompt_blocks=True)";
                return Err(invalid(message.to_owned()));
            }
            let lines = block_in_place(|| Mooncake::of(tracker.pages(&query)));
            let left_out = lines.left_out();
            let mut response = export(lines, "application/jsonl");
            response.headers_mut().insert(X_LEFT_OUT, HeaderValue::from(left_out));
            Ok(response)
        }
    }
}

pub(super) async fn stats(State(app): State<Arc<App>>) -> Result<Json<Stats>, Error> {
    Ok(Json(app.traces()?.stats()))
}

impl App {
    fn traces(&self) -> Result<&Arc<Tracker>, Error> {
        self.tracker().ok_or_else(|| {
            let message = "request tracking is off: start the router with --enable-request-tracking, or in \
                           Python with Router(..., enable_request_tracking=True)";
            Error::new(Kind::TrackingDisabled, message)
        })
    }
}

/// Streams an export, a page at a time, as fast as the client reads it.
fn export(
    pages: impl Iterator<Item = Vec<u8>> + Send + 'static,
    content_type: &'static str,
) -> Response {
    let mut pages = pages;
    let next = move || block_in_place(|| pages.next());
    let chunks =
        std::iter::from_fn(next).map(|page| Ok::<_, std::convert::Infallible>(Bytes::from(page)));
    ([(header::CONTENT_TYPE, content_type)], Body::from_stream(stream::iter(chunks)))
        .into_response()
}

fn json_lines(traces: &[Trace]) -> Vec<u8> {
    let mut lines = Vec::new();
    for trace in traces {
        // A trace always serialises, and memory takes all bytes.
        let _ = serde_json::to_writer(&mut lines, trace);
        lines.push(b'\n');
    }
    lines
}
