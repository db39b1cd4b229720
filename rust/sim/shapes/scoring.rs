//! Endpoints that only read their prompts: embeddings, classes, scores. The numbers are made up;
//! times, ids and token counts are the engine's.

use serde_json::{Value, json};

use super::super::answer::Reply;
use super::super::worker::Progress;
use super::generate::MetaInfo;
use super::openai::usage;

/// The embedding of every prompt.
const EMBEDDING: [f64; 4] = [0.5, -0.5, 0.5, -0.5];

/// A score that falls with the place in the list.
fn score(part: usize) -> f64 {
    1.0 / (part + 2) as f64
}

fn per_part(parts: &[Progress], value: impl Fn(usize, &Progress) -> Value) -> Value {
    parts.iter().enumerate().map(|(part, progress)| value(part, progress)).collect()
}

/// `/v1/embeddings`
pub fn embeddings(reply: &Reply, parts: &[Progress]) -> String {
    let data = per_part(
        parts,
        |part, _| json!({"object": "embedding", "index": part, "embedding": EMBEDDING}),
    );
    json!({
        "object": "list",
        "data": data,
        "model": reply.model,
        "usage": usage(reply, parts),
        "worker_port": reply.port,
    })
    .to_string()
}

/// `/v1/classify`
pub fn classes(reply: &Reply, parts: &[Progress]) -> String {
    let data = per_part(
        parts,
        |part, _| json!({"index": part, "label": "LABEL_0", "probs": [1.0], "num_classes": 1}),
    );
    json!({
        "id": reply.id,
        "object": "list",
        "created": reply.created,
        "model": reply.model,
        "data": data,
        "usage": usage(reply, parts),
        "worker_port": reply.port,
    })
    .to_string()
}

/// `/v1/score`
pub fn scores(reply: &Reply, parts: &[Progress]) -> String {
    json!({
        "object": "scoring",
        "scores": per_part(parts, |part, _| json!([score(part), 1.0 - score(part)])),
        "model": reply.model,
        "usage": usage(reply, parts),
        "worker_port": reply.port,
    })
    .to_string()
}

/// `/v1/rerank`: best first.
pub fn ranks(reply: &Reply, parts: &[Progress]) -> String {
    let with_documents = reply.body["return_documents"] != false;
    let rank = |part: usize, progress: &Progress| {
        let mut rank = json!({
            "score": score(part),
            "index": part,
            "meta_info": MetaInfo::of_ended(reply, part, progress),
        });
        if with_documents {
            rank["document"] = reply.body["documents"][part].clone();
        }
        rank
    };
    per_part(parts, rank).to_string()
}

/// `/encode` and `/classify`
pub fn encodings(reply: &Reply, parts: &[Progress]) -> String {
    let encoding = |part: usize, progress: &Progress| {
        let meta_info = MetaInfo::of_ended(reply, part, progress);
        json!({"embedding": EMBEDDING, "meta_info": meta_info})
    };
    let encodings = per_part(parts, encoding);
    match reply.is_list {
        true => encodings.to_string(),
        false => encodings[0].to_string(),
    }
}
