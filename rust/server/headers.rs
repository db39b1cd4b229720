//! Which headers go on: everything end-to-end, nothing hop-by-hop (RFC 9110, section 7.6.1).

use hyper::HeaderMap;
use hyper::header::{self, HeaderName};
use smallvec::SmallVec;

const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Names a worker and means the router; a worker has no use for it.
pub(super) const X_TARGET_WORKER: HeaderName = HeaderName::from_static("x-sglang-target-worker");
/// What the session policies go by.
pub(super) const X_ROUTING_KEY: HeaderName = HeaderName::from_static("x-smg-routing-key");
pub(super) const X_WORKER: HeaderName = HeaderName::from_static("x-sglang-worker");
pub(super) const X_NODE: HeaderName = HeaderName::from_static("x-sglang-node");
pub(super) const X_ROUTER_ERROR_CODE: HeaderName = HeaderName::from_static("x-router-error-code");

/// Drops hop-by-hop headers, those that `connection` names among them.
fn drop_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            // The length of the body is not for `connection` to take away.
            .filter(|name| name != header::CONTENT_LENGTH)
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // Beside a transfer encoding the length means nothing (RFC 9112, section 6.3).
        headers.remove(header::CONTENT_LENGTH);
    }
    remove(headers, &HOP_BY_HOP);
}

/// Removes headers, hardly any of which are there: a look at the few that are costs less than a search for each.
fn remove(headers: &mut HeaderMap, names: &[HeaderName]) {
    let found: SmallVec<[HeaderName; 4]> =
        headers.keys().filter(|name| names.contains(name)).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// The router's words, not a worker's: which router it was, and which origins may read from it.
const OURS: [HeaderName; 9] = [
    X_ROUTER_ERROR_CODE,
    X_WORKER,
    X_NODE,
    header::ACCESS_CONTROL_ALLOW_ORIGIN,
    header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
    header::ACCESS_CONTROL_ALLOW_METHODS,
    header::ACCESS_CONTROL_ALLOW_HEADERS,
    header::ACCESS_CONTROL_EXPOSE_HEADERS,
    header::ACCESS_CONTROL_MAX_AGE,
];

/// The headers of an answer as the client gets them, before the router adds its own.
pub(super) fn towards_client(headers: &mut HeaderMap) {
    drop_hop_by_hop(headers);
    remove(headers, &OURS);
}

/// The body is sent whole: its length is known and its sending was already agreed to.
const REPLACED: [HeaderName; 4] =
    [header::CONTENT_LENGTH, header::EXPECT, header::HOST, X_TARGET_WORKER];

/// The headers of a request as its worker gets them, but for `host` and `x-request-id`, which are the router's.
pub(super) fn towards_worker(mut headers: HeaderMap) -> HeaderMap {
    drop_hop_by_hop(&mut headers);
    remove(&mut headers, &REPLACED);
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("value")))
            .collect()
    }

    #[test]
    fn hop_by_hop_headers_go_and_the_rest_stays() {
        let lines = [
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("te", "trailers"),
            ("keep-alive", "5"),
            ("authorization", "Bearer x"),
            ("traceparent", "00-1"),
            ("content-length", "3"),
            ("host", "router"),
            ("x-sglang-target-worker", "gpu_0"),
        ];
        let kept = towards_worker(headers(&lines));
        let mut names: Vec<_> = kept.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "traceparent"]);
    }

    #[test]
    fn a_length_beside_a_transfer_encoding_goes() {
        let mut answer = headers(&[("transfer-encoding", "chunked"), ("content-length", "3")]);
        towards_client(&mut answer);
        assert!(answer.is_empty());
    }

    #[test]
    fn a_worker_does_not_speak_for_the_router() {
        let lines = [
            ("x-router-error-code", "timeout"),
            ("x-sglang-worker", "x"),
            ("access-control-allow-origin", "*"),
            ("access-control-allow-credentials", "true"),
            ("server", "y"),
        ];
        let mut answer = headers(&lines);
        towards_client(&mut answer);
        assert_eq!(answer.len(), 1);
    }

    #[test]
    fn connection_cannot_take_the_length_away() {
        let mut answer = headers(&[("connection", "content-length"), ("content-length", "3")]);
        drop_hop_by_hop(&mut answer);
        assert_eq!(answer.len(), 1);
    }
}
