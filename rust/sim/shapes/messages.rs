//! `/v1/messages`: Anthropic's shape. Its `input_tokens` leaves out what the cache had.

use serde_json::{Value, json};

use super::super::answer::{Moment, Reply};
use super::super::tokens;
use super::super::worker::Progress;
use super::event;

fn message(reply: &Reply, progress: &Progress, content: Value, stop_reason: Value) -> Value {
    let stopped = !stop_reason.is_null();
    json!({
        "id": reply.id,
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": null,
        "usage": {
            "input_tokens": progress.prompt_tokens - progress.cached_tokens,
            "cache_read_input_tokens": progress.cached_tokens,
            "output_tokens": if stopped { progress.completion_tokens } else { 0 },
        },
        "worker_port": reply.port,
    })
}

/// The whole message.
pub fn whole(reply: &Reply, parts: &[Progress]) -> String {
    let progress = parts.first().cloned().unwrap_or_default();
    let (text, _) = tokens::output(progress.completion_tokens);
    let content = json!([{"type": "text", "text": text}]);
    message(reply, &progress, content, json!("max_tokens")).to_string()
}

/// The events of a streamed message.
pub fn frame(reply: &Reply, parts: &[Progress], moment: Moment) -> String {
    match moment {
        Moment::Opening(part) => {
            let message = message(reply, &parts[part], json!([]), Value::Null);
            let block = json!({"type": "text", "text": ""});
            event(&json!({"type": "message_start", "message": message}))
                + &event(
                    &json!({"type": "content_block_start", "index": 0, "content_block": block}),
                )
        }
        Moment::Tokens { from, to, .. } => {
            let delta = json!({"type": "text_delta", "text": tokens::words(from, to)});
            event(&json!({"type": "content_block_delta", "index": 0, "delta": delta}))
        }
        Moment::Closing { part, .. } => {
            let delta = json!({"stop_reason": "max_tokens", "stop_sequence": null});
            let usage = json!({"output_tokens": parts[part].completion_tokens});
            event(&json!({"type": "content_block_stop", "index": 0}))
                + &event(&json!({"type": "message_delta", "delta": delta, "usage": usage}))
        }
        Moment::Summary => event(&json!({"type": "message_stop"})),
        Moment::Done => String::new(),
    }
}
