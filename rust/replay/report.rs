//! What a replay shows: a table or JSON of all policies, and a CSV row for each request.
//!
//! The numbers of a policy are those that the laboratory's comparisons have, by the same definitions: latencies and tokens
//! of the requests that succeeded.

use std::fmt::Write as _;
use std::fs::File;
use std::io;

use serde::Serialize;
use serde_json::{Map, Value};

use super::cluster::{Loss, Outcome, Setup};
use super::trace::{BLOCK_TOKENS, Trace};

/// One policy's replay.
#[derive(Debug)]
pub struct Run {
    pub policy: String,
    /// One per request of the trace.
    pub outcomes: Vec<Outcome>,
}

/// All that a replay tells, as `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Report {
    pub trace: About,
    /// The options that are not as by default, by name.
    pub settings: Map<String, Value>,
    pub policies: Vec<Summary>,
}

/// The trace as it was replayed.
#[derive(Debug, Serialize)]
pub struct About {
    pub name: String,
    pub requests: usize,
    pub span_secs: f64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    /// Share of the prompt tokens that one endless cache would have, counted in whole blocks. No policy can reach more in the
    /// replay; the traffic that the trace was made of may share more, in pieces shorter than a block.
    pub endless_cache_hit_rate: f64,
    pub workers: usize,
}

/// What plots show and rows do not have.
#[derive(Debug, Serialize)]
pub struct Notes<'a> {
    /// The lines above the table.
    pub header: Vec<String>,
    pub workers: usize,
    pub losses: &'a [Loss],
}

/// One policy's replay in numbers, of the requests that succeeded; `None` without any. Times are seconds from
/// arrival, to the first token and to the last.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub policy: String,
    /// Share of the prompt tokens that were in the worker's cache.
    pub hit_rate: Option<f64>,
    pub ttft_mean_secs: Option<f64>,
    pub ttft_p50_secs: Option<f64>,
    pub ttft_p95_secs: Option<f64>,
    pub ttft_p99_secs: Option<f64>,
    pub e2e_mean_secs: Option<f64>,
    pub e2e_p99_secs: Option<f64>,
    /// Prompt tokens that were not cached, of the worker with the most, divided by the mean over all workers.
    pub imbalance: Option<f64>,
    pub failed: usize,
}

impl About {
    pub fn new(name: String, trace: &Trace, setup: &Setup) -> Self {
        let (prompt_tokens, output_tokens) = (trace.prompt_tokens(), trace.output_tokens());
        Self {
            name,
            requests: trace.requests.len(),
            span_secs: trace.span_secs(),
            prompt_tokens,
            output_tokens,
            endless_cache_hit_rate: trace.reusable_tokens() as f64 / prompt_tokens as f64,
            workers: setup.engines.len(),
        }
    }
}

impl Summary {
    pub fn new(run: &Run, trace: &Trace, setup: &Setup) -> Self {
        let (mut prompt_tokens, mut cached_tokens) = (0, 0);
        let mut uncached = vec![0.0; setup.engines.len()];
        let (mut ttft, mut e2e) = (Vec::new(), Vec::new());
        let outcomes = trace.requests.iter().zip(&run.outcomes);
        for (asked, outcome) in outcomes.filter(|(_, outcome)| outcome.error.is_none()) {
            if let (Some(worker), Some(cached)) = (outcome.worker, outcome.cached_tokens) {
                prompt_tokens += u64::from(asked.prompt_tokens);
                cached_tokens += u64::from(cached);
                uncached[worker as usize] += f64::from(asked.prompt_tokens - cached);
            }
            ttft.extend(outcome.first_at_secs.map(|at| at - asked.at_secs));
            e2e.extend(outcome.ended_at_secs.map(|at| at - asked.at_secs));
        }
        ttft.sort_unstable_by(f64::total_cmp);
        e2e.sort_unstable_by(f64::total_cmp);
        let most = uncached.iter().copied().fold(0.0, f64::max);
        let mean_work = mean(&uncached).filter(|mean| *mean > 0.0);
        Self {
            policy: run.policy.clone(),
            hit_rate: (prompt_tokens > 0).then(|| cached_tokens as f64 / prompt_tokens as f64),
            ttft_mean_secs: mean(&ttft),
            ttft_p50_secs: percentile(&ttft, 50.0),
            ttft_p95_secs: percentile(&ttft, 95.0),
            ttft_p99_secs: percentile(&ttft, 99.0),
            e2e_mean_secs: mean(&e2e),
            e2e_p99_secs: percentile(&e2e, 99.0),
            imbalance: mean_work.map(|mean| most / mean),
            failed: run.errors().count(),
        }
    }
}

impl Run {
    /// Why requests failed, in the order of the trace.
    pub fn errors(&self) -> impl Iterator<Item = &str> {
        self.outcomes.iter().filter_map(|outcome| outcome.error.as_deref())
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Linear between the two nearest values, as numpy has it; `sorted` ascends.
fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = percent / 100.0 * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64))
}

impl Report {
    /// What was replayed: the trace, the settings if there are any, and what a cache can find in the trace.
    pub fn header(&self) -> Vec<String> {
        let About { name, requests, span_secs, prompt_tokens, output_tokens, .. } = &self.trace;
        let each = |tokens: &u64| tokens / *requests as u64;
        let mut lines = vec![format!(
            "{name}: {requests} requests in {span_secs:.1} s to {} workers, {prompt_tokens} prompt tokens ({} each), \
             {output_tokens} answer tokens ({} each)",
            self.trace.workers,
            each(prompt_tokens),
            each(output_tokens),
        )];
        if !self.settings.is_empty() {
            let settings: Vec<_> = self.settings.iter().map(flag).collect();
            lines.push(settings.join(" "));
        }
        lines.push(format!(
            "one endless cache would have {:.1} % of the prompt tokens, counted in whole blocks of {BLOCK_TOKENS} tokens",
            100.0 * self.trace.endless_cache_hit_rate,
        ));
        lines
    }

    /// The header, and a table with a row for each policy.
    pub fn table(&self) -> String {
        let mut text = self.header().join("\n") + "\n\n";
        let policies: Vec<_> = self.policies.iter().map(|summary| &*summary.policy).collect();
        let mut rows = vec![HEAD.map(str::to_owned)];
        let row = |summary: &Summary| summary.row(label(&summary.policy, &policies));
        rows.extend(self.policies.iter().map(row));
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
        let widths: [_; HEAD.len()] = std::array::from_fn(|column| width(column).unwrap_or(0));
        for row in &rows {
            let [policy, numbers @ ..] = row;
            let _ = write!(text, "{policy:<0$}", widths[0]);
            for (number, width) in numbers.iter().zip(&widths[1..]) {
                let _ = write!(text, "  {number:>width$}");
            }
            text.push('\n');
        }
        text
    }

    /// The same as JSON, one object over several lines.
    pub fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("names and numbers");
        text.push('\n');
        text
    }
}

const HEAD: [&str; 10] = [
    "policy",
    "hit rate",
    "TTFT mean",
    "p50",
    "p95",
    "p99",
    "E2E mean",
    "p99",
    "imbalance",
    "failed",
];

/// A setting as it stands on a command line.
fn flag((name, value): (&String, &Value)) -> String {
    let name = name.replace('_', "-");
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match value {
        Value::Bool(true) => format!("--{name}"),
        Value::Array(values) => {
            format!("--{name} {}", values.iter().map(text).collect::<Vec<_>>().join(","))
        }
        value => format!("--{name} {}", text(value)),
    }
}

/// What the table calls a policy: a file's without its directories, but for as many as tell it from another one.
fn label<'a>(policy: &'a str, policies: &[&str]) -> &'a str {
    let parts = policy.split('/').count();
    let mut labels = (1..parts).map(|parts| (last_parts(policy, parts), parts));
    let is_alone = |(label, parts): &(&str, usize)| {
        policies.iter().all(|other| *other == policy || last_parts(other, *parts) != *label)
    };
    labels.find(is_alone).map_or(policy, |(label, _)| label)
}

/// The end of a path that has that many parts, all of it if there are fewer.
fn last_parts(path: &str, parts: usize) -> &str {
    path.rmatch_indices('/').nth(parts - 1).map_or(path, |(slash, _)| &path[slash + 1..])
}

impl Summary {
    fn row(&self, label: &str) -> [String; HEAD.len()] {
        let secs = |secs: Option<f64>| shown(secs, |secs| format!("{secs:.3} s"));
        [
            label.to_owned(),
            shown(self.hit_rate, |share| format!("{:.1} %", 100.0 * share)),
            secs(self.ttft_mean_secs),
            secs(self.ttft_p50_secs),
            secs(self.ttft_p95_secs),
            secs(self.ttft_p99_secs),
            secs(self.e2e_mean_secs),
            secs(self.e2e_p99_secs),
            shown(self.imbalance, |ratio| format!("{ratio:.2}")),
            self.failed.to_string(),
        ]
    }
}

fn shown(value: Option<f64>, show: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

/// A row of the CSV. Times are seconds; what is not known is empty.
#[derive(Serialize)]
struct Row<'a> {
    policy: &'a str,
    /// Counted from 0, in the order of the trace.
    request: usize,
    arrival_secs: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    worker: Option<u32>,
    reason: Option<&'a str>,
    matched_tokens: Option<u32>,
    attempts: u32,
    cached_tokens: Option<u32>,
    prefill_secs: Option<f64>,
    /// From arrival to the first token.
    ttft_secs: Option<f64>,
    /// From arrival to the last token, or until it failed.
    e2e_secs: Option<f64>,
    error: Option<&'a str>,
}

/// Writes a row for each policy and request.
///
/// # Errors
/// The system's, for a file that cannot be written.
pub fn write_csv(file: File, trace: &Trace, runs: &[Run]) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(file);
    for run in runs {
        for (request, (asked, outcome)) in trace.requests.iter().zip(&run.outcomes).enumerate() {
            csv.serialize(Row {
                policy: &run.policy,
                request,
                arrival_secs: asked.at_secs,
                prompt_tokens: asked.prompt_tokens,
                output_tokens: asked.output_tokens,
                worker: outcome.worker,
                reason: outcome.reason,
                matched_tokens: outcome.matched_tokens,
                attempts: outcome.attempts,
                cached_tokens: outcome.cached_tokens,
                prefill_secs: outcome.prefill_secs,
                ttft_secs: outcome.first_at_secs.map(|at| at - asked.at_secs),
                e2e_secs: outcome.ended_at_secs.map(|at| at - asked.at_secs),
                error: outcome.error.as_deref(),
            })?;
        }
    }
    csv.flush()
}
