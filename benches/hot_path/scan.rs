//! Reading: the body of a request, and what an answer says, by the size of the body and by the form of the prompt.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use sglang_router_rs::request::scan;
use sglang_router_rs::upstream::answer::Reader;

use crate::load::SEED;

const SIZES: [usize; 5] = [1 << 10, 2_400, 1 << 14, 1 << 17, 1 << 20];

/// A line of English with the escape that every line of a prompt ends with.
const LINE: &str =
    "You are a careful assistant who answers in plain words and says where a fact is from.\\n";

/// Lines in one message of a conversation.
const MESSAGE_LINES: usize = 6;

pub fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scan");
    for (form, body_of) in
        [("text", text as fn(usize) -> String), ("chat", chat), ("input_ids", ids)]
    {
        for size in SIZES {
            let body = body_of(size);
            assert!(!scan(body.as_bytes()).prompt.is_empty(), "{form} has a prompt");
            group.throughput(Throughput::Bytes(body.len() as u64));
            group.bench_function(BenchmarkId::new(form, size), |bencher| {
                bencher.iter(|| black_box(scan(black_box(body.as_bytes()))));
            });
        }
    }
    group.finish();
    answers(criterion);
}

fn text(size: usize) -> String {
    let text = LINE.repeat(size / LINE.len());
    format!(
        r#"{{"text":"{text}","sampling_params":{{"max_new_tokens":64,"temperature":0}},"stream":true}}"#
    )
}

fn chat(size: usize) -> String {
    let content = LINE.repeat(MESSAGE_LINES.min(size / LINE.len() / 2));
    let message = |role| format!(r#"{{"role":"{role}","content":"{content}"}}"#);
    let turn = [message("user"), message("assistant")].join(",");
    let turns = vec![turn.as_str(); (size / turn.len()).max(1)].join(",");
    format!(r#"{{"model":"llama-3.1-8b","messages":[{turns}],"max_tokens":64,"stream":true}}"#)
}

fn ids(size: usize) -> String {
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut ids = Vec::new();
    let mut len = 0;
    while len < size {
        let id = random.u32(..128_000).to_string();
        len += id.len() + 1;
        ids.push(id);
    }
    format!(r#"{{"input_ids":[{}],"sampling_params":{{"max_new_tokens":64}}}}"#, ids.join(","))
}

/// A whole answer of `/generate`; and one event of a stream, long after the first.
fn answers(criterion: &mut Criterion) {
    let meta = r#""meta_info":{"id":"0123456789abcdef0123456789abcdef","finish_reason":{"type":"length","length":64},"prompt_tokens":600,"completion_tokens":64,"cached_tokens":300,"e2e_latency":0.731}"#;
    let generated = LINE.repeat(4);
    let whole = format!(r#"{{"text":"{generated}","output_ids":[],{meta}}}"#);
    let frame = format!("data: {whole}\n\n");
    let delta = "data: {\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"llama-3.1-8b\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" plain\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n";

    let mut group = criterion.benchmark_group("answer");
    group.throughput(Throughput::Bytes(whole.len() as u64));
    group.bench_function("generate", |bencher| {
        bencher.iter(|| {
            let mut reader = Reader::new(Some("application/json"), None);
            reader.read(black_box(whole.as_bytes()));
            black_box(reader.finish())
        });
    });
    for (name, event) in [("generate_event", frame.as_str()), ("chat_event", delta)] {
        group.throughput(Throughput::Bytes(event.len() as u64));
        group.bench_function(name, |bencher| {
            let mut reader = Reader::new(Some("text/event-stream"), None);
            assert!(reader.read(event.as_bytes()), "{name} has content");
            bencher.iter(|| black_box(reader.read(black_box(event.as_bytes()))));
        });
    }
    group.finish();
}
