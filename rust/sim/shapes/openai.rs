//! `/v1/chat/completions` and `/v1/completions`: OpenAI's shapes as SGLang fills them. Streams send
//! deltas.

use serde_json::{Value, json};

use super::super::answer::{Moment, Reply};
use super::super::tokens;
use super::super::worker::{Finish, Progress};
use super::data;

/// OpenAI's `usage`. A prompt with several answers counts once, as in SGLang.
pub fn usage(reply: &Reply, parts: &[Progress]) -> Value {
    let prompts = || parts.iter().step_by(reply.samples.max(1));
    let prompt_tokens: usize = prompts().map(|part| part.prompt_tokens).sum();
    let cached_tokens: usize = prompts().map(|part| part.cached_tokens).sum();
    let completion_tokens: usize = parts.iter().map(|part| part.completion_tokens).sum();
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    })
}

fn finish_reason(progress: &Progress) -> Option<&'static str> {
    progress.finish.map(|finish| match finish {
        Finish::Length => "length",
        Finish::Abort => "abort",
    })
}

fn envelope(reply: &Reply, object: &str, choices: Value, usage: Value) -> String {
    json!({
        "id": reply.id,
        "object": object,
        "created": reply.created,
        "model": reply.model,
        "choices": choices,
        "usage": usage,
        "worker_port": reply.port,
    })
    .to_string()
}

/// A choice whose content, under the name its endpoint gives it, is `content`.
fn choice(part: usize, name: &str, content: Value, finish_reason: Option<&str>) -> Value {
    json!({
        "index": part,
        name: content,
        "logprobs": null,
        "finish_reason": finish_reason,
        "matched_stop": null,
    })
}

fn whole(reply: &Reply, parts: &[Progress], object: &str, name: &str) -> String {
    let choices = parts.iter().enumerate().map(|(part, progress)| {
        let (text, _) = tokens::output(progress.completion_tokens);
        let content = match name {
            "message" => json!({
                "role": "assistant",
                "content": text,
                "reasoning_content": null,
                "tool_calls": null,
            }),
            _ => json!(text),
        };
        choice(part, name, content, finish_reason(progress))
    });
    envelope(reply, object, choices.collect(), usage(reply, parts))
}

/// A chat completion.
pub fn chat(reply: &Reply, parts: &[Progress]) -> String {
    whole(reply, parts, "chat.completion", "message")
}

/// A text completion.
pub fn completion(reply: &Reply, parts: &[Progress]) -> String {
    whole(reply, parts, "text_completion", "text")
}

/// The frames after the choices: the usage if asked for, and the end.
fn tail(reply: &Reply, parts: &[Progress], object: &str, moment: Moment) -> String {
    let include_usage = reply.body["stream_options"]["include_usage"] == true;
    match moment {
        Moment::Summary if include_usage => {
            data(&envelope(reply, object, json!([]), usage(reply, parts)))
        }
        Moment::Done => data("[DONE]"),
        _ => String::new(),
    }
}

/// Frames of a chat completion: the role, deltas, the reason of the end.
pub fn chat_frame(reply: &Reply, parts: &[Progress], moment: Moment) -> String {
    let object = "chat.completion.chunk";
    let (part, delta, finish) = match moment {
        Moment::Opening(part) => (part, json!({"role": "assistant", "content": ""}), None),
        Moment::Tokens { part, from, to, .. } => {
            (part, json!({"content": tokens::words(from, to)}), None)
        }
        Moment::Closing { part, .. } => (part, json!({}), finish_reason(&parts[part])),
        moment => return tail(reply, parts, object, moment),
    };
    let choice = choice(part, "delta", delta, finish);
    data(&envelope(reply, object, json!([choice]), Value::Null))
}

/// Frames of a text completion: pieces of text, the reason of the end.
pub fn completion_frame(reply: &Reply, parts: &[Progress], moment: Moment) -> String {
    let object = "text_completion";
    let (part, text, finish) = match moment {
        Moment::Opening(_) => return String::new(),
        Moment::Tokens { part, from, to, .. } => (part, tokens::words(from, to), None),
        Moment::Closing { part, .. } => (part, "", finish_reason(&parts[part])),
        moment => return tail(reply, parts, object, moment),
    };
    let choice = choice(part, "text", json!(text), finish);
    data(&envelope(reply, object, json!([choice]), Value::Null))
}
