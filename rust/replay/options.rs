//! The options of `replay`: its own, those of simulated workers, and those of routing.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value};

use super::cluster::{Loss, Setup};
use super::synthetic::Kind;
use super::trace::BLOCK_TOKENS;
use crate::routing::{self, Choice};
use crate::sim::engine::Config;
use crate::sim::hardware::{Hardware, MAX_PAGE_TOKENS};

// The pages of a prompt are made of its blocks.
const _: () = assert!(BLOCK_TOKENS.is_multiple_of(MAX_PAGE_TOKENS as usize));

/// Replay a trace through policies and simulated workers, in virtual time
#[derive(Clone, Debug)]
pub struct Options {
    pub flags: Flags,
    /// One run each.
    pub policies: Vec<Choice>,
    /// What was set and is not as by default, by the option's name, but for [`TOLD_ELSEWHERE`].
    pub settings: Map<String, Value>,
}

/// Options that are not settings: the first line of the results tells them, or they say where results go.
const TOLD_ELSEWHERE: &[&str] = &[
    "trace",
    "synthetic",
    "num_requests",
    "workers",
    "policy",
    "write",
    "csv",
    "json",
    "plot",
    "notes",
];

/// What the command line says, but for the list of policies.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct Flags {
    /// JSON lines of a Mooncake trace: timestamp (ms), input_length, output_length, hash_ids
    #[arg(required_unless_present = "synthetic", conflicts_with = "synthetic")]
    pub trace: Option<PathBuf>,

    /// Make a trace instead of reading one
    #[arg(long, value_enum, ignore_case = true)]
    pub synthetic: Option<Kind>,

    /// Requests of the trace, the first ones of a file; without it all of a file, or 3000
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub num_requests: Option<u32>,

    /// Write the trace that --synthetic makes to this file
    #[arg(long, value_name = "FILE", requires = "synthetic", conflicts_with = "trace")]
    pub write: Option<PathBuf>,

    /// Arrivals come that many times faster, 0.001 to 1000
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_parser = factor)]
    pub rate_scale: f64,

    /// Simulated workers
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub workers: u32,

    /// Speed of each worker, by which prefill and decode are that many times faster, 0.001 to 1000; fewer speeds
    /// than workers are taken in turn
    #[arg(long, value_delimiter = ',', default_values_t = [1.0])]
    #[arg(allow_negative_numbers = true, value_parser = factor)]
    pub speeds: Vec<f64>,

    /// Weight of each worker under fixed_probability, at least 0; fewer weights than workers are taken in turn
    #[arg(long, value_delimiter = ',', default_values_t = [1.0])]
    #[arg(allow_negative_numbers = true, value_parser = weight)]
    pub worker_weights: Vec<f64>,

    /// Worker that dies at a second of the replay, and perhaps comes back with an empty cache, such as 3@600 or 3@600-900
    #[arg(long, value_name = "WORKER@SECONDS[-SECONDS]", value_delimiter = ',')]
    pub lose: Vec<Lost>,

    #[command(flatten)]
    pub hardware: Hardware,

    #[command(flatten)]
    pub routing: routing::Options,

    /// Write one row per policy and request to this file
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,

    /// Print the results as JSON
    #[arg(long, default_value_t = false)]
    pub json: bool,

    /// Write plots of the results to this file, .html or .png (in the Python package)
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,

    /// Write what plots show and rows do not have to this file, as JSON
    #[arg(long, value_name = "FILE", hide = true)]
    pub notes: Option<PathBuf>,
}

impl FromArgMatches for Options {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let policies = matches.get_many("policy").into_iter().flatten().copied().collect();
        let flags = Flags::from_arg_matches(matches)?;
        Ok(Self { flags, policies, settings: settings(matches) })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Options {
    /// Of routing's options the policy becomes a list, and the seed has a default; of the workers' options the size of
    /// a page has another one.
    fn augment_args(command: Command) -> Command {
        let list = |policy: Arg| {
            policy
                .action(ArgAction::Append)
                .value_delimiter(',')
                .help("The rules that pick a worker for each request, one run each; FILE.py:NAME is one of your own in Python")
        };
        let seed = |seed: Arg| {
            seed.default_value("0")
                .help("Makes another trace with --synthetic, and other random draws")
        };
        Flags::augment_args(command)
            .about("Replay a trace through policies and simulated workers, in virtual time")
            .mut_arg("policy", list)
            .mut_arg("seed", seed)
            .mut_arg("page_tokens", |page| page.default_value("16"))
            .mut_arg("eviction_interval_secs", |without_effect| without_effect.hide(true))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl Options {
    /// The workers and what happens to them.
    ///
    /// # Errors
    /// Options that do not go together, in a sentence that names them.
    pub fn setup(&self) -> Result<Setup, String> {
        let Flags { speeds, worker_weights, lose, hardware, routing, .. } = &self.flags;
        let workers = self.flags.workers as usize;
        let speeds = in_turn("--speeds", speeds, workers)?;
        let weights = in_turn("--worker-weights", worker_weights, workers)?;
        if weights.iter().all(|weight| *weight == 0.0) {
            return Err("--worker-weights: one of them must be over 0".to_owned());
        }
        let whole = hardware.engine();
        let engine = |speed: &f64| Config {
            prefill_rate: whole.prefill_rate * speed,
            step_base_secs: whole.step_base_secs / speed,
            step_per_seq_secs: whole.step_per_seq_secs / speed,
            ..whole.clone()
        };
        Ok(Setup {
            engines: speeds.iter().map(engine).collect(),
            is_kv_told: !hardware.hide_kv,
            weights,
            losses: losses(lose, workers)?,
            seed: routing.seed.unwrap_or_default(),
        })
    }

    /// The options of routing for one of the policies.
    pub fn routing(&self, policy: impl Into<Choice>) -> routing::Options {
        routing::Options { policy: policy.into(), ..self.flags.routing.clone() }
    }

    /// Checks that no policy is named twice, which would make rows that cannot be told apart.
    ///
    /// # Errors
    /// A sentence that names it.
    pub fn check_policies(&self) -> Result<(), String> {
        let twice = (1..self.policies.len())
            .find(|place| self.policies[..*place].contains(&self.policies[*place]));
        twice.map_or(Ok(()), |place| {
            Err(format!("--policy: {} is named twice", self.policies[place]))
        })
    }
}

/// What was set on the command line and is not as by default. Numbers are numbers, and lists are lists.
fn settings(matches: &ArgMatches) -> Map<String, Value> {
    let command = Options::augment_args(Command::new("replay"));
    let is_set = |id: &str| {
        matches.value_source(id) == Some(ValueSource::CommandLine) && !TOLD_ELSEWHERE.contains(&id)
    };
    let setting = |arg: &Arg| {
        let id = arg.get_id().as_str();
        let raw = if is_set(id) { matches.get_raw(id) } else { None };
        let mut values: Vec<_> = raw?.map(value).collect();
        let defaults: Vec<_> = arg.get_default_values().iter().map(|text| value(text)).collect();
        if values == defaults {
            return None;
        }
        let is_list = arg.get_value_delimiter().is_some();
        let value = if is_list { Value::from(values) } else { values.pop()? };
        Some((id.to_owned(), value))
    };
    command.get_arguments().filter_map(setting).collect()
}

/// A value of the command line as JSON. Equal numbers are equal, however they were written.
fn value(text: &OsStr) -> Value {
    let text = text.to_string_lossy();
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    match (text.parse::<u64>(), number, text.parse::<bool>()) {
        (Ok(whole), ..) => whole.into(),
        (_, Some(number), _) if number.fract() == 0.0 && (0.0..1e15).contains(&number) => {
            (number as u64).into()
        }
        (_, Some(number), _) => number.into(),
        (.., Ok(truth)) => truth.into(),
        _ => text.into(),
    }
}

/// One for each worker: those there are, again and again.
fn in_turn(option: &str, values: &[f64], workers: usize) -> Result<Vec<f64>, String> {
    let count = values.len();
    if !workers.is_multiple_of(count) {
        return Err(format!(
            "{option}: {workers} workers cannot take {count} values in turn evenly"
        ));
    }
    Ok(values.iter().copied().cycle().take(workers).collect())
}

/// The losses, if each is of a worker that is there at the time.
fn losses(lost: &[Lost], workers: usize) -> Result<Vec<Loss>, String> {
    let mut losses: Vec<Loss> = lost.iter().map(|lost| lost.0).collect();
    losses.sort_by(|one, other| {
        one.worker.cmp(&other.worker).then(one.at_secs.total_cmp(&other.at_secs))
    });
    for loss in &losses {
        if loss.worker >= workers {
            let last = workers - 1;
            return Err(format!("--lose: there is no worker {}, only 0 to {last}", loss.worker));
        }
    }
    for pair in losses.windows(2) {
        let is_gone = pair[0].back_at_secs.is_none_or(|back| back >= pair[1].at_secs);
        if pair[0].worker == pair[1].worker && is_gone {
            let Loss { worker, at_secs, .. } = pair[1];
            return Err(format!("--lose: worker {worker} is lost already at {at_secs} s"));
        }
    }
    Ok(losses)
}

/// One value of `--lose`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lost(Loss);

impl FromStr for Lost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "must be WORKER@SECONDS or WORKER@SECONDS-SECONDS, workers counted from 0";
        let (worker, times) = text.split_once('@').ok_or_else(form)?;
        let (at, back) = match times.split_once('-') {
            Some((at, back)) => (at, Some(back)),
            None => (times, None),
        };
        let secs = |text: &str| {
            let secs: Option<f64> = text.parse().ok();
            secs.filter(|secs| (0.0..=1e12).contains(secs)).ok_or_else(form)
        };
        let worker = worker.parse().map_err(|_| form())?;
        let loss = Loss { worker, at_secs: secs(at)?, back_at_secs: back.map(secs).transpose()? };
        match loss.back_at_secs {
            Some(back) if back <= loss.at_secs => {
                Err("must come back after it was lost".to_owned())
            }
            _ => Ok(Self(loss)),
        }
    }
}

fn factor(text: &str) -> Result<f64, String> {
    let factor = text.parse().ok().filter(|factor| (0.001..=1000.0).contains(factor));
    factor.ok_or_else(|| "must be a number from 0.001 to 1000".to_owned())
}

fn weight(text: &str) -> Result<f64, String> {
    let number = text.parse().map_err(|_| "must be a number".to_owned())?;
    routing::check_weight(number)
}
