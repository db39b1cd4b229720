//! What a replay shows: a table or JSON of all policies, and a CSV row for each request.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::cluster::{Outcome, Setup};
use super::trace::Trace;

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
    /// Share of the prompt tokens that one endless cache would have: no policy can reach more.
    pub hit_rate_bound: f64,
    pub workers: usize,
}

/// One policy's replay in numbers. Times are seconds from arrival, to a first token over all requests that
/// got one, to the end over those that did not fail; `None` without any.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub policy: String,
    /// Share of the prompt tokens that were in the worker's cache.
    pub hit_rate: Option<f64>,
    pub ttft_mean_secs: Option<f64>,
    pub ttft_p50_secs: Option<f64>,
    pub ttft_p90_secs: Option<f64>,
    pub ttft_p99_secs: Option<f64>,
    pub e2e_mean_secs: Option<f64>,
    pub e2e_p99_secs: Option<f64>,
    /// Seconds of prefill of the worker with the most, divided by the mean over all workers.
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
            hit_rate_bound: trace.reusable_tokens() as f64 / prompt_tokens as f64,
            workers: setup.engines.len(),
        }
    }
}

impl Summary {
    pub fn new(run: &Run, trace: &Trace, setup: &Setup) -> Self {
        let (mut prompt_tokens, mut cached_tokens) = (0, 0);
        let mut prefill_secs = vec![0.0; setup.engines.len()];
        let (mut ttft, mut e2e) = (Vec::new(), Vec::new());
        for (asked, outcome) in trace.requests.iter().zip(&run.outcomes) {
            if let Some(cached) = outcome.cached_tokens {
                prompt_tokens += u64::from(asked.prompt_tokens);
                cached_tokens += u64::from(cached);
            }
            if let (Some(worker), Some(secs)) = (outcome.worker, outcome.prefill_secs) {
                prefill_secs[worker as usize] += secs;
            }
            ttft.extend(outcome.first_at_secs.map(|at| at - asked.at_secs));
            let answered = outcome.ended_at_secs.filter(|_| outcome.error.is_none());
            e2e.extend(answered.map(|at| at - asked.at_secs));
        }
        ttft.sort_unstable_by(f64::total_cmp);
        e2e.sort_unstable_by(f64::total_cmp);
        let most = prefill_secs.iter().copied().fold(0.0, f64::max);
        let mean_work = mean(&prefill_secs).filter(|mean| *mean > 0.0);
        Self {
            policy: run.policy.clone(),
            hit_rate: (prompt_tokens > 0).then(|| cached_tokens as f64 / prompt_tokens as f64),
            ttft_mean_secs: mean(&ttft),
            ttft_p50_secs: percentile(&ttft, 50.0),
            ttft_p90_secs: percentile(&ttft, 90.0),
            ttft_p99_secs: percentile(&ttft, 99.0),
            e2e_mean_secs: mean(&e2e),
            e2e_p99_secs: percentile(&e2e, 99.0),
            imbalance: mean_work.map(|mean| most / mean),
            failed: run.outcomes.iter().filter(|outcome| outcome.error.is_some()).count(),
        }
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
    /// The trace in two lines, and a table with a row for each policy.
    pub fn table(&self) -> String {
        let About { name, requests, span_secs, prompt_tokens, output_tokens, .. } = &self.trace;
        let each = |tokens: &u64| tokens / *requests as u64;
        let mut text = format!(
            "{name}: {requests} requests in {span_secs:.1} s to {} workers, {prompt_tokens} prompt tokens ({} each), \
             {output_tokens} answer tokens ({} each)\n\
             one endless cache would have {:.1} % of the prompt tokens\n\n",
            self.trace.workers,
            each(prompt_tokens),
            each(output_tokens),
            100.0 * self.trace.hit_rate_bound,
        );
        let mut rows = vec![HEAD.map(str::to_owned)];
        rows.extend(self.policies.iter().map(Summary::row));
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
    "p90",
    "p99",
    "E2E mean",
    "p99",
    "imbalance",
    "failed",
];

impl Summary {
    fn row(&self) -> [String; HEAD.len()] {
        let secs = |secs: Option<f64>| shown(secs, |secs| format!("{secs:.3} s"));
        [
            self.policy.clone(),
            shown(self.hit_rate, |share| format!("{:.1} %", 100.0 * share)),
            secs(self.ttft_mean_secs),
            secs(self.ttft_p50_secs),
            secs(self.ttft_p90_secs),
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
pub fn write_csv(path: &Path, trace: &Trace, runs: &[Run]) -> io::Result<()> {
    let mut csv = csv::Writer::from_path(path)?;
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
