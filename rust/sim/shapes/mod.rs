//! The shapes of answers, one file per family of endpoints, and the table of those endpoints.
//!
//! Invariant: each endpoint that runs the model is one row of [`ENDPOINTS`]. Writers are pure: from
//! the request and its progress to text.

mod generate;
mod messages;
mod openai;
mod responses;
mod scoring;

use serde_json::Value;

use super::answer::Endpoint;
use super::ask;

/// All endpoints that run the model.
pub const ENDPOINTS: &[Endpoint] = &[
    Endpoint {
        paths: &["/generate"],
        native: true,
        read: ask::generate,
        whole: generate::whole,
        frame: Some(generate::frame),
    },
    Endpoint {
        paths: &["/v1/chat/completions"],
        native: false,
        read: ask::chat,
        whole: openai::chat,
        frame: Some(openai::chat_frame),
    },
    Endpoint {
        paths: &["/v1/completions"],
        native: false,
        read: ask::completions,
        whole: openai::completion,
        frame: Some(openai::completion_frame),
    },
    Endpoint {
        paths: &["/v1/responses"],
        native: false,
        read: ask::responses,
        whole: responses::whole,
        frame: Some(responses::frame),
    },
    Endpoint {
        paths: &["/v1/messages"],
        native: false,
        read: ask::messages,
        whole: messages::whole,
        frame: Some(messages::frame),
    },
    Endpoint {
        paths: &["/v1/embeddings"],
        native: false,
        read: ask::input,
        whole: scoring::embeddings,
        frame: None,
    },
    Endpoint {
        paths: &["/v1/classify"],
        native: false,
        read: ask::input,
        whole: scoring::classes,
        frame: None,
    },
    Endpoint {
        paths: &["/v1/score"],
        native: false,
        read: ask::score,
        whole: scoring::scores,
        frame: None,
    },
    Endpoint {
        paths: &["/v1/rerank", "/rerank"],
        native: false,
        read: ask::rerank,
        whole: scoring::ranks,
        frame: None,
    },
    Endpoint {
        paths: &["/encode", "/classify"],
        native: true,
        read: ask::encode,
        whole: scoring::encodings,
        frame: None,
    },
];

/// A server-sent event without a name.
fn data(json: &str) -> String {
    format!("data: {json}\n\n")
}

/// A server-sent event that is named by its own `type`.
fn event(event: &Value) -> String {
    format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or("message"))
}
