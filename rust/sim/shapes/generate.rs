//! `/generate`: SGLang's own shape. Every frame of a stream repeats all text and tokens so far.

use serde::Serialize;

use super::super::answer::{Moment, Reply};
use super::super::tokens;
use super::super::worker::{Finish, Progress};
use super::data;

#[derive(Serialize)]
struct Answer<'a> {
    text: &'a str,
    output_ids: &'a [u32],
    meta_info: MetaInfo<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
}

/// What SGLang tells about a request beside its answer. Durations are in simulated seconds.
#[derive(Serialize)]
pub struct MetaInfo<'a> {
    id: &'a str,
    finish_reason: Option<FinishReason>,
    prompt_tokens: usize,
    cached_tokens: usize,
    completion_tokens: usize,
    worker_port: u16,
    queue_time: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    e2e_latency: Option<f64>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FinishReason {
    Length { length: usize },
    Abort { message: &'static str },
}

impl<'a> MetaInfo<'a> {
    /// Of a part that has ended.
    pub fn of_ended(reply: &'a Reply, part: usize, progress: &Progress) -> Self {
        let finish_reason = progress.finish.map(|finish| match finish {
            Finish::Length => FinishReason::Length { length: progress.completion_tokens },
            Finish::Abort => FinishReason::Abort { message: "Abort by /abort_request" },
        });
        let running = Self::of_running(reply, part, progress, progress.completion_tokens);
        Self { finish_reason, e2e_latency: Some(progress.e2e_secs), ..running }
    }

    fn of_running(reply: &'a Reply, part: usize, progress: &Progress, tokens: usize) -> Self {
        Self {
            id: &reply.rids[part],
            finish_reason: None,
            prompt_tokens: progress.prompt_tokens,
            cached_tokens: progress.cached_tokens,
            completion_tokens: tokens,
            worker_port: reply.port,
            queue_time: progress.queue_secs,
            e2e_latency: None,
        }
    }
}

fn json<'a>(meta_info: MetaInfo<'a>, index: Option<usize>) -> String {
    let (text, output_ids) = tokens::output(meta_info.completion_tokens);
    let answer = Answer { text, output_ids, meta_info, index };
    serde_json::to_string(&answer).expect("an answer is plain data")
}

/// The answer, or a list of them.
pub fn whole(reply: &Reply, parts: &[Progress]) -> String {
    let one = |(part, progress)| json(MetaInfo::of_ended(reply, part, progress), None);
    let answers: Vec<_> = parts.iter().enumerate().map(one).collect();
    match reply.is_list {
        true => format!("[{}]", answers.join(",")),
        false => answers.concat(),
    }
}

/// A frame whenever tokens are told.
pub fn frame(reply: &Reply, parts: &[Progress], moment: Moment) -> String {
    let index = |part| reply.is_list.then_some(part);
    match moment {
        Moment::Tokens { part, to, last: false, .. } => {
            let meta_info = MetaInfo::of_running(reply, part, &parts[part], to);
            data(&json(meta_info, index(part)))
        }
        Moment::Tokens { part, last: true, .. } | Moment::Closing { part, told: false } => {
            data(&json(MetaInfo::of_ended(reply, part, &parts[part]), index(part)))
        }
        Moment::Done => data("[DONE]"),
        Moment::Opening(_) | Moment::Closing { told: true, .. } | Moment::Summary => String::new(),
    }
}
