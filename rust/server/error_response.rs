//! How the router's own errors look over HTTP: `{"error":{"type","code","message"}}` and `x-router-error-code`.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use serde_json::{Value, json};

use super::headers::X_ROUTER_ERROR_CODE;
use crate::error::{Error, Kind};

impl Kind {
    pub(super) fn http_status(self) -> StatusCode {
        StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// An error in the middle of a stream of server-sent events, which has had its status already.
pub(super) fn event(error: &Error, route: &str) -> Bytes {
    // These two name their events, and a client of theirs looks for the name.
    if ["/v1/messages", "/v1/responses"].contains(&route) {
        let data = json!({"type": "error", "error": object(error)});
        return format!("event: error\ndata: {data}\n\n").into();
    }
    format!("data: {}\n\n", json!({"error": object(error)})).into()
}

fn object(error: &Error) -> Value {
    // nginx's name for a status that HTTP has no name for.
    let reason = error.kind.http_status().canonical_reason().unwrap_or("Client Closed Request");
    json!({"type": reason, "code": error.kind.code(), "message": error.message})
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let header = [(X_ROUTER_ERROR_CODE, HeaderValue::from_static(self.kind.code()))];
        let body = Json(json!({"error": object(&self)}));
        let mut response = (self.kind.http_status(), header, body).into_response();
        let headers = response.headers_mut();
        match self.kind {
            Kind::QueueFull | Kind::Overloaded => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Kind::Unauthorized => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<PathRejection> for Error {
    /// A path that is no text names nothing.
    fn from(rejection: PathRejection) -> Self {
        Self::new(Kind::NotFound, rejection.body_text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_status_of_its_own_and_a_unique_code() {
        let mut codes: Vec<_> = Kind::ALL.iter().map(|kind| kind.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Kind::ALL.len());
        for kind in Kind::ALL {
            assert_eq!(kind.http_status().as_u16(), kind.status());
            assert!((400..600).contains(&kind.status()));
        }
    }
}
