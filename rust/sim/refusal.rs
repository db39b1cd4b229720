//! How the simulated worker says no, in SGLang's shapes.
//!
//! Invariant: every error answer of the simulated worker is made here and is JSON.

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

/// An answer that refuses a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    status: StatusCode,
    body: Value,
}

impl Refusal {
    /// As SGLang's own endpoints say it: `{"error": {"message"}}`.
    pub fn native(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, body: json!({"error": {"message": message.into()}}) }
    }

    /// As the OpenAI-shaped endpoints, and all of them for malformed JSON, say it.
    pub fn openai(status: StatusCode, message: impl Into<String>) -> Self {
        let body = json!({
            "object": "error",
            "message": message.into(),
            "type": status.canonical_reason().unwrap_or("Error"),
            "param": null,
            "code": status.as_u16(),
        });
        Self { status, body }
    }

    /// As the web framework says it: `{"detail"}`.
    pub fn detail(status: StatusCode) -> Self {
        Self { status, body: json!({"detail": status.canonical_reason()}) }
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        json_response(refusal.status, refusal.body.to_string())
    }
}

/// An answer with a JSON body.
pub fn json_response(status: StatusCode, json: String) -> Response {
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
