//! How the router's own errors look over HTTP: `{"error":{"type","code","message"}}` and `x-router-error-code`.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::header::{HeaderValue, WWW_AUTHENTICATE};
use serde_json::json;

use super::headers::X_ROUTER_ERROR_CODE;
use crate::error::{Error, Kind};

impl Kind {
    pub(super) fn http_status(self) -> StatusCode {
        StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = self.kind.http_status();
        let code = self.kind.code();
        // nginx's name for a status that HTTP has no name for.
        let reason = status.canonical_reason().unwrap_or("Client Closed Request");
        let body = json!({"error": {"type": reason, "code": code, "message": self.message}});
        let header = [(X_ROUTER_ERROR_CODE, HeaderValue::from_static(code))];
        let mut response = (status, header, Json(body)).into_response();
        if status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
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
