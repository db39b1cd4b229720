//! The life of a routed request, top to bottom: identify, read, scan, admit, pick, send, relay, record.
//!
//! The body is scanned once for the few fields routing and tracking need, and forwarded byte for byte; the router
//! does not reject what it does not understand. Nothing here is undone by hand: the [`Flight`] closes the trace and
//! gives back the count of requests in flight, however the request ends.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::http::request::Parts;
use axum::http::uri::PathAndQuery;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::{HeaderMap, Method};

use super::flight::{Flight, Picked};
use super::relay::Relay;
use super::request_id::X_REQUEST_ID;
use super::{App, body, headers};
use crate::error::{Error, Kind, shown};
use crate::request;
use crate::routing::{self, Pick};
use crate::upstream::answer::is_stream;
use crate::upstream::{Answer, SendError};
use crate::workers::{Snapshot, Worker};

/// Scanning takes up to a millisecond per 100 KB; what is larger is not scanned or matched between other requests.
const LARGE_BODY_BYTES: usize = 256 << 10;

/// The `reason` of a request that named its worker itself.
const PINNED: &str = "pinned";

/// Serves one request on a routed route.
pub(super) async fn proxy(app: Arc<App>, route: Arc<str>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let header_id = app.request_ids.in_headers(&head.headers);
    let mut flight = Flight::begin(app.clone(), route, header_id);

    let reading = body::read(&head.headers, body, app.options.max_payload_size);
    let deadline = flight.arrived_at() + app.options.request_timeout();
    let answer = match tokio::time::timeout_at(deadline.into(), reading).await {
        Ok(Ok(body)) => exchange(&app, &mut flight, head, body).await,
        Ok(Err(error)) => Err(error),
        Err(_) => Err(timed_out(&app)),
    };

    // An id is visible ASCII.
    let id = HeaderValue::from_str(flight.id()).ok();
    let worker = flight.worker().cloned();
    let mut response = match answer {
        Ok(answer) => {
            let mut answer = Relay::begin(answer, flight, app.options.request_timeout());
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

/// From the whole request to the head of a worker's answer.
async fn exchange(
    app: &App,
    flight: &mut Flight,
    head: Parts,
    body: Bytes,
) -> Result<hyper::Response<Answer>, Error> {
    let scan_began = Instant::now();
    let scan = unhurried(body.len(), || request::scan(&body));
    let scan_took = scan_began.elapsed();
    flight.describe(&scan, trace_id(&head.headers));

    let pin = head.headers.get(headers::X_TARGET_WORKER).cloned();
    admit(app, flight, pin.as_ref()).await?;
    flight.admitted();

    let mut outgoing = Outgoing {
        path: head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")),
        headers: headers::towards_worker(head.headers),
        body: body.clone(),
    };
    if let Ok(id) = HeaderValue::from_str(flight.id()) {
        outgoing.headers.insert(X_REQUEST_ID, id);
    }
    let prompt = routing::Request { prompt: &scan.prompt };
    let deadline = flight.arrived_at() + app.options.request_timeout();
    let mut draw = app.draws.next();
    let mut tried = Vec::new();
    let mut failure = None;
    for _ in 0..app.options.attempts_max() {
        let picking = || pick(app, &prompt, pin.as_ref(), &tried, &mut draw);
        let Some(picked) = unhurried(body.len(), picking)? else { break };
        let worker = picked.worker.clone();
        flight.picked(picked, scan_took);

        let sending = send(flight, &worker, outgoing.towards(&worker));
        match tokio::time::timeout_at(deadline.into(), sending).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => failure = Some(unanswered(app, flight, &worker, &error)),
            Err(_) => return Err(timed_out(app)),
        }
        tried.push(worker.index);
    }
    Err(failure.unwrap_or_else(|| app.no_available_workers()))
}

/// Does what takes long for a large body where it holds up no other request.
fn unhurried<T>(body_bytes: usize, work: impl FnOnce() -> T) -> T {
    if body_bytes < LARGE_BODY_BYTES { work() } else { tokio::task::block_in_place(work) }
}

/// Sends to one worker. The head of a stream goes to the client at once; any other head goes along with the first of
/// its body, so that a client that looks at the status alone does not leave before the answer was relayed, and a
/// worker that dies between the two has not answered.
async fn send(
    flight: &mut Flight,
    worker: &Worker,
    request: hyper::Request<Full<Bytes>>,
) -> Result<hyper::Response<Answer>, SendError> {
    let mut answer = worker.connections.send(request).await?;
    flight.answered(answer.status());
    let content_type = answer.headers().get(header::CONTENT_TYPE);
    if !is_stream(content_type.and_then(|kind| kind.to_str().ok())) {
        answer.body_mut().begin().await?;
    }
    Ok(answer)
}

/// Waits, where it would help, until the workers have been checked for the first time.
async fn admit(app: &App, flight: &Flight, pin: Option<&HeaderValue>) -> Result<(), Error> {
    let is_served = |snapshot: &Snapshot| match pin {
        None => !snapshot.routable.is_empty(),
        Some(pin) => pinned(snapshot, pin).is_ok(),
    };
    let (whole, queue) = (app.options.request_timeout(), app.options.queue_timeout());
    let until = flight.arrived_at() + whole.min(queue);
    let waiting = app.workers.first_round_or(is_served);
    tokio::time::timeout_at(until.into(), waiting).await.map_err(|_| {
        if whole <= queue {
            return timed_out(app);
        }
        let message = format!(
            "the workers were still being checked after {} s (queue_timeout_secs)",
            app.options.queue_timeout_secs
        );
        Error::new(Kind::QueueTimeout, message)
    })
}

/// The next worker to try, with the request counted as in flight there; None when there is no other left.
fn pick(
    app: &App,
    request: &routing::Request<'_>,
    pin: Option<&HeaderValue>,
    tried: &[u32],
    draw: &mut fastrand::Rng,
) -> Result<Option<Picked>, Error> {
    let began = Instant::now();
    let snapshot = app.workers.snapshot();
    let (index, pick) = match pin {
        // It had its chance, and there is no other.
        Some(_) if !tried.is_empty() => return Ok(None),
        Some(pin) => {
            let index = pinned(&snapshot, pin)?;
            let matched_tokens = app.policy.matched_tokens(request, snapshot.routable[index].index);
            (index, Pick { index, reason: PINNED, matched_tokens })
        }
        None => match choose(app, request, &snapshot, tried, draw) {
            Some(chosen) => chosen,
            None => return Ok(None),
        },
    };
    let took = began.elapsed();
    let worker = snapshot.routable[index].clone();
    // Counted before the prompt is remembered, which takes longer than the next request's pick.
    let in_flight = worker.target.begin();
    app.policy.sent(request, worker.index);
    let Pick { reason, matched_tokens, .. } = pick;
    Ok(Some(Picked { worker, in_flight, reason, matched_tokens, took }))
}

/// What the policy picks among the routable workers that were not tried, and its place among all routable ones.
fn choose(
    app: &App,
    request: &routing::Request<'_>,
    snapshot: &Snapshot,
    tried: &[u32],
    draw: &mut fastrand::Rng,
) -> Option<(usize, Pick)> {
    if tried.is_empty() && !snapshot.targets.is_empty() {
        let pick = app.policy.pick(request, &snapshot.targets, draw);
        return Some((pick.index, pick));
    }
    let is_left = |index: &usize| !tried.contains(&snapshot.routable[*index].index);
    let left: Vec<usize> = (0..snapshot.routable.len()).filter(is_left).collect();
    let targets: Vec<_> = left.iter().map(|index| snapshot.targets[*index].clone()).collect();
    if targets.is_empty() {
        return None;
    }
    let pick = app.policy.pick(request, &targets, draw);
    Some((left[pick.index], pick))
}

/// Where the worker that a request names stands among the routable ones.
fn pinned(snapshot: &Snapshot, pin: &HeaderValue) -> Result<usize, Error> {
    let name = String::from_utf8_lossy(pin.as_bytes());
    let Some(worker) = snapshot.find(&name) else {
        let message = format!(
            "{} names {}, which is neither the node_id nor the URL of a worker; GET /workers lists them",
            headers::X_TARGET_WORKER,
            shown(&name)
        );
        return Err(Error::new(Kind::UnknownTargetWorker, message));
    };
    let place = snapshot.routable.iter().position(|routable| routable.index == worker.index);
    place.ok_or_else(|| {
        let message = format!("the worker asked for, {}, is {}", worker.url, worker.state().name());
        Error::new(Kind::NoAvailableWorkers, message)
    })
}

/// Notes a failed attempt.
fn unanswered(app: &App, flight: &mut Flight, worker: &Worker, error: &SendError) -> Error {
    let message = error.to_string();
    flight.attempt_failed(&message);
    if error.is_unconnected() {
        app.workers.unreachable(worker);
    }
    Error::new(Kind::WorkerUnreachable, message)
}

fn timed_out(app: &App) -> Error {
    let message = format!(
        "no answer within {} s of the request's arrival (request_timeout_secs)",
        app.options.request_timeout_secs
    );
    Error::new(Kind::Timeout, message)
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
        let mut request = hyper::Request::new(Full::new(self.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = worker.uri(&self.path);
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().insert(header::HOST, worker.url.authority().clone());
        worker.authorize(request.headers_mut());
        // Left alone, hyper would say nothing of a body of length 0.
        request.headers_mut().insert(header::CONTENT_LENGTH, self.body.len().into());
        request
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
