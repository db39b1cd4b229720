//! `/v1/responses`: OpenAI's newer shape, with named events.

use serde_json::{Value, json};

use super::super::answer::{Moment, Reply};
use super::super::tokens;
use super::super::worker::Progress;
use super::event;

/// The response object; before its end without output and usage.
fn response(reply: &Reply, ended: Option<&Progress>) -> Value {
    let output = ended.map(|progress| {
        let (text, _) = tokens::output(progress.completion_tokens);
        json!([{
            "type": "message",
            "id": format!("msg_{}", reply.id),
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}],
        }])
    });
    let usage = ended.map(|progress| {
        json!({
            "input_tokens": progress.prompt_tokens,
            "input_tokens_details": {"cached_tokens": progress.cached_tokens},
            "output_tokens": progress.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": progress.prompt_tokens + progress.completion_tokens,
        })
    });
    json!({
        "id": reply.id,
        "object": "response",
        "created_at": reply.created,
        "status": if ended.is_some() { "completed" } else { "in_progress" },
        "model": reply.model,
        "output": output.unwrap_or_else(|| json!([])),
        "usage": usage,
        "worker_port": reply.port,
    })
}

/// The whole response.
pub fn whole(reply: &Reply, parts: &[Progress]) -> String {
    response(reply, parts.first()).to_string()
}

/// The events of a streamed response.
pub fn frame(reply: &Reply, parts: &[Progress], moment: Moment) -> String {
    match moment {
        Moment::Opening(_) => {
            event(&json!({"type": "response.created", "response": response(reply, None)}))
        }
        Moment::Tokens { from, to, .. } => event(&json!({
            "type": "response.output_text.delta",
            "item_id": format!("msg_{}", reply.id),
            "output_index": 0,
            "content_index": 0,
            "delta": tokens::words(from, to),
        })),
        Moment::Closing { part, .. } => event(&json!({
            "type": "response.completed",
            "response": response(reply, Some(&parts[part])),
        })),
        Moment::Summary | Moment::Done => String::new(),
    }
}
