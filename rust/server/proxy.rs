//! The life of a routed request, top to bottom: identify, read, scan, admit, pick, send, relay, record.
//!
//! The body is scanned once for the few fields routing and tracking need, and forwarded byte for byte; the router
//! does not reject what it does not understand. Nothing here is undone by hand: the [`Flight`] closes the trace and
//! gives back every count, however the request ends.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::http::request::Parts;
use axum::http::uri::PathAndQuery;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::{HeaderMap, Method};

use super::exchange::Exchange;
use super::flight::{Flight, answered_with};
use super::pick::{self, Asked, Picked, Wish};
use super::relay::{Relay, one_line};
use super::request_id::X_REQUEST_ID;
use super::{App, aborted, body, headers, now, retry};
use crate::error::{Error, Kind, Origin};
use crate::request;
use crate::telemetry::metrics::Route;
use crate::upstream::{Answer, SendError};
use crate::workers::breaker::Outcome;
use crate::workers::{Snapshot, Worker};

/// Scanning takes up to a millisecond per 100 KB; what is larger is not scanned or matched between other requests.
const LARGE_BODY_BYTES: usize = 256 << 10;

/// Serves one request on a routed route.
pub(super) async fn proxy(app: Arc<App>, route: Arc<Route>, request: Request) -> Response {
    let (mut head, body) = request.into_parts();
    let begin = || Exchange::begin(app.options.request_timeout());
    let exchange = head.extensions.remove().unwrap_or_else(begin);
    let header_id = app.request_ids.in_headers(&head.headers);
    let mut flight = Flight::begin(app.clone(), route, exchange, header_id);

    let deadline = flight.deadline();
    let abort = flight.abort();
    let answer = tokio::select! {
        biased;
        // Before the answer: an error can still be told in its place.
        () = abort.said() => Some(Err(aborted())),
        answer = serve(&app, &mut flight, head, body) => Some(answer),
        () = tokio::time::sleep_until(deadline.into()) => None,
    };
    let answer = answer.unwrap_or_else(|| Err(timed_out(&app, &flight)));

    // An id is visible ASCII.
    let id = HeaderValue::from_str(flight.id()).ok();
    let worker = flight.worker().cloned();
    let mut response = match answer {
        Ok(answer) => {
            let mut answer = Relay::begin(answer, flight, app.options.patience());
            headers::towards_client(answer.headers_mut());
            answer.map(Body::new)
        }
        Err(error) => {
            flight.refuse(&error);
            error.into_response()
        }
    };
    if let Some(worker) = worker {
        app.name_worker(response.headers_mut(), &worker);
    }
    if let Some(id) = id {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    response
}

/// From the head of a request to the head of a worker's answer.
async fn serve(
    app: &Arc<App>,
    flight: &mut Flight,
    head: Parts,
    body: Body,
) -> Result<hyper::Response<Answer>, Error> {
    let body = body::read(&head.headers, body, app.options.body_bytes_max(), &app.budget).await?;

    let scan_began = Instant::now();
    let scan = unhurried(body.len(), || request::scan(&body));
    let scan_took = scan_began.elapsed();
    let blocks = unhurried(body.len(), || app.traced_blocks(&scan.prompt));
    flight.describe(&scan, trace_id(&head.headers), blocks.as_ref());

    let pin = head.headers.get(headers::X_TARGET_WORKER).cloned();
    let routing_key = head.headers.get(headers::X_ROUTING_KEY).cloned();
    admit(app, flight, pin.as_ref()).await?;

    let mut outgoing = Outgoing {
        path: head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")),
        headers: headers::towards_worker(head.headers),
        body: body.clone(),
    };
    if let Ok(id) = HeaderValue::from_str(flight.id()) {
        outgoing.headers.insert(X_REQUEST_ID, id);
    }
    let wish = Wish {
        asked: Asked {
            prompt: match scan.prompt {
                Cow::Borrowed(prompt) => body.slice_ref(prompt),
                Cow::Owned(prompt) => prompt.into(),
            },
            is_ids: scan.is_ids,
            stream: scan.stream == Some(true),
            path: outgoing.path.clone(),
            model: scan.model.map(Cow::into_owned),
            routing_key,
            request_id: outgoing.headers.get(X_REQUEST_ID).cloned(),
            at_secs: app.secs(now()),
            block_names: Default::default(),
        },
        pin,
        failed_on: Vec::new(),
        draw: app.draws.next(),
    };
    attempt(app, flight, wish, &outgoing, scan_took).await
}

/// Does what takes long for a large body where it holds up no other request.
fn unhurried<T>(body_bytes: usize, work: impl FnOnce() -> T) -> T {
    if body_bytes < LARGE_BODY_BYTES { work() } else { tokio::task::block_in_place(work) }
}

/// Waits until the request may go on, and, where it would help, until the workers have been checked for the first
/// time.
async fn admit(app: &App, flight: &mut Flight, pin: Option<&HeaderValue>) -> Result<(), Error> {
    let is_served = |snapshot: &Snapshot| match pin {
        None => !snapshot.routable.is_empty(),
        Some(pin) => pick::pinned(snapshot, pin).is_ok(),
    };
    let since = now();
    let entering = async {
        let slot = app.admission.enter().await?;
        app.workers.first_round_or(is_served).await;
        Ok(slot)
    };
    let at_most = app.options.admission.queue_timeout();
    let entered = tokio::time::timeout(at_most, entering).await.unwrap_or_else(|_| {
        let message = format!(
            "no worker could be picked within {} s (queue_timeout_secs): the router is full, or its workers are \
             still being checked",
            app.options.admission.queue_timeout_secs
        );
        Err(Error::new(Kind::QueueTimeout, message))
    });
    match entered {
        Ok(slot) => flight.admitted(slot, since),
        Err(error) => {
            flight.rejected();
            return Err(error);
        }
    }
    Ok(())
}

/// Sends the request to one worker after the other, until one gives an answer that is worth relaying or the attempts
/// are used up. An answer that is passed over is kept, unread, until there is a worker to try instead.
async fn attempt(
    app: &Arc<App>,
    flight: &mut Flight,
    mut wish: Wish,
    outgoing: &Outgoing,
    scan_took: Duration,
) -> Result<hyper::Response<Answer>, Error> {
    let retry = &app.options.retry;
    let mut pauses = 0;
    let mut last = Err(None);
    for attempts_left in (0..retry.attempts_max()).rev() {
        let picked = match pick(app, flight, &mut wish, outgoing.body.len()).await {
            Ok(Some(picked)) => picked,
            Ok(None) => break,
            // A worker that was named had its chance.
            Err(error) if !wish.failed_on.is_empty() && error.kind != Kind::PolicyFailed => break,
            Err(error) => return Err(error),
        };
        if let Ok(answer) = std::mem::replace(&mut last, Err(None)) {
            flight.passed_over(&excerpt(&answer));
        }
        let worker = picked.worker.clone();
        flight.picked(picked, scan_took);
        let answered = send(flight, &worker, outgoing).await;
        wish.failed_on.push(worker.index);
        last = match answered {
            Ok(answer) if !retry::is_retryable(answer.status()) => return Ok(answer),
            Ok(answer) => Ok(answer),
            Err(error) => Err(Some(unanswered(app, flight, &worker, &error))),
        };
        if attempts_left == 0 {
            flight.exhausted();
        } else if last.is_ok() || !wish.has_untried(app) {
            let pause = retry.backoff(pauses, &mut wish.draw);
            pauses += 1;
            if now() + pause >= flight.deadline() {
                break;
            }
            flight.pausing(pause, retry.attempts_max() - attempts_left + 1);
            tokio::time::sleep(pause).await;
        }
    }
    last.map_err(|error| error.unwrap_or_else(|| app.no_available_workers()))
}

/// The next worker to try, with the request counted as in flight there; None when there is none.
async fn pick(
    app: &Arc<App>,
    flight: &mut Flight,
    wish: &mut Wish,
    body_bytes: usize,
) -> Result<Option<Picked>, Error> {
    loop {
        let chosen = if app.policy.may_block() && wish.pin.is_none() {
            flight.asking();
            let chosen = pick::choose_elsewhere(app, wish).await;
            flight.asked();
            chosen?
        } else {
            unhurried(body_bytes, || pick::choose(app, wish))?
        };
        let Some(chosen) = chosen else { return Ok(None) };
        let picked = unhurried(body_bytes, || pick::take(app, wish, chosen));
        if picked.is_some() {
            return Ok(picked);
        }
    }
}

/// Sends to one worker. The head of an answer goes to the client along with the first of its body: until then another
/// worker may be tried, and a client that looks at the status alone does not leave before the answer was relayed.
async fn send(
    flight: &mut Flight,
    worker: &Worker,
    outgoing: &Outgoing,
) -> Result<hyper::Response<Answer>, SendError> {
    let mut answer = worker.connections.send(|| outgoing.towards(worker)).await?;
    flight.answered(answer.status());
    answer.body_mut().begin().await?;
    flight.begun(answer.status(), answer.headers());
    Ok(answer)
}

/// What is said of an answer that is passed over.
fn excerpt(answer: &hyper::Response<Answer>) -> String {
    let begun = if answer.headers().contains_key(header::CONTENT_ENCODING) {
        String::new()
    } else {
        one_line(answer.body().begun())
    };
    answered_with(answer.status(), &begun)
}

/// Notes an attempt without an answer.
fn unanswered(app: &App, flight: &mut Flight, worker: &Worker, error: &SendError) -> Error {
    let says = if error.is_ours() { Outcome::Neutral } else { Outcome::Failure };
    flight.unanswered(error, says);
    if error.is_unconnected() {
        app.workers.unreachable(worker);
    }
    Error::new(Kind::WorkerUnreachable, error.to_string())
}

fn timed_out(app: &App, flight: &Flight) -> Error {
    if let Some(since) = flight.asking_since() {
        return pick::unanswered(app, now() - since);
    }
    let message = format!(
        "no answer within {} s of the request's arrival (request_timeout_secs)",
        app.options.request_timeout_secs
    );
    let error = Error::new(Kind::Timeout, message);
    // It may have spent its time on its way here, or in the queue.
    if flight.is_kept_waiting() { error } else { error.by(Origin::Router) }
}

/// The trace id of a W3C `traceparent` header: `version-traceid-parent-flags`.
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let id = headers.get("traceparent")?.to_str().ok()?.split('-').nth(1)?;
    let is_id = id.len() == 32 && id.bytes().all(|digit| digit.is_ascii_hexdigit());
    (is_id && id.bytes().any(|digit| digit != b'0')).then_some(id)
}

/// A request as it is sent, but for the worker's address.
struct Outgoing {
    path: PathAndQuery,
    headers: HeaderMap,
    body: Bytes,
}

impl Outgoing {
    fn towards(&self, worker: &Worker) -> hyper::Request<Full<Bytes>> {
        worker.request(Method::POST, &self.path, self.headers.clone(), self.body.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_id_is_read_from_a_well_formed_traceparent() {
        let read = |value: &str| {
            let value = HeaderValue::from_str(value).expect("value");
            trace_id(&HeaderMap::from_iter([("traceparent".parse().expect("name"), value)]))
                .map(str::to_owned)
        };
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(read(&format!("00-{id}-00f067aa0ba902b7-01")).as_deref(), Some(id));
        for bad in ["", "00", "00-xyz-1-1", "00-00000000000000000000000000000000-00f0-01"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
