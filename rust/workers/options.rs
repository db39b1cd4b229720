//! Options of the workers: who they are, what they are called, and how they are checked.

use std::time::Duration;

use super::WORKERS_MAX;
use super::node_id::{self, NodeIdFrom};
use super::source::{DnsName, Source};
use super::url::WorkerUrl;
use crate::routing::check_weight;

#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// URLs of the workers, http://HOST:PORT[/BASE]; dns+http://NAME:PORT[/BASE] stands for a worker at each address of
    /// the name, looked up every 5 s: new addresses join, lost ones leave when nothing is in flight there, and a look-up
    /// that fails or finds none removes nobody
    #[arg(long, num_args = 0.., value_name = "URL")]
    pub worker_urls: Vec<Source>,

    /// Names of workers in traces and headers, instead of what node_id_from says
    #[arg(long, num_args = 0.., value_name = "URL=NAME", value_parser = node_id::parse_entry)]
    pub node_ids: Vec<(WorkerUrl, String)>,

    /// What a worker's node_id is made from
    #[arg(long, value_enum, default_value_t = NodeIdFrom::Port)]
    pub node_id_from: NodeIdFrom,

    /// Shares of the workers under the policy fixed_probability, numbers >= 0; a worker not named has 1
    #[arg(long, num_args = 0.., value_name = "URL=NUMBER", value_parser = parse_weight)]
    pub worker_weights: Vec<(WorkerUrl, f64)>,

    /// Seconds after which a worker that has never been healthy is reported as an error in the log, and /add_worker waits no longer
    #[arg(long, default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub worker_startup_timeout_secs: u64,

    /// Longest pause between the checks of a worker that has never been healthy, in seconds; the first follow after 0.1 s, 0.2 s, 0.4 s and so on
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub worker_startup_check_interval: u64,

    /// Failed checks in a row that make a worker unhealthy
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub health_failure_threshold: u32,

    /// Good checks in a row that make an unhealthy worker healthy again
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub health_success_threshold: u32,

    /// Seconds a worker has to answer a check
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub health_check_timeout_secs: u64,

    /// Seconds between the checks of a worker
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub health_check_interval_secs: u64,

    /// Path of the check, answered with a 2xx status by a healthy worker
    #[arg(long, default_value = "/health", value_parser = parse_path)]
    pub health_check_endpoint: String,

    /// Take every worker for healthy, always
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub disable_health_check: bool,

    #[command(flatten)]
    pub breaker: super::breaker::Options,
}

impl Options {
    /// What no single value shows.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if self.worker_urls.len() > WORKERS_MAX {
            let why = format!("{} workers; at most {WORKERS_MAX}", self.worker_urls.len());
            return Err(("worker_urls", why));
        }
        super::url::check_distinct(&self.worker_urls).map_err(|why| ("worker_urls", why))?;
        let named: Vec<_> = self.node_ids.iter().map(|(url, _)| url.clone()).collect();
        super::url::check_distinct(&named).map_err(|why| ("node_ids", why))?;
        let weighed: Vec<_> = self.worker_weights.iter().map(|(url, _)| url.clone()).collect();
        super::url::check_distinct(&weighed).map_err(|why| ("worker_weights", why))?;
        if self.dns_names().next().is_some() {
            // Any URL may turn out to be one of its workers.
            return Ok(());
        }
        let is_stranger = |named: &WorkerUrl| !self.urls().any(|url| url == named);
        if let Some(url) = weighed.iter().find(|url| is_stranger(url)) {
            return Err(("worker_weights", format!("{url} is not one of worker_urls")));
        }
        if !self.worker_urls.is_empty() && self.urls().all(|url| self.weight(url) == 0.0) {
            return Err((
                "worker_weights",
                "every worker has weight 0; give at least one a number above 0".into(),
            ));
        }
        Ok(())
    }

    /// The workers that are named one by one.
    pub fn urls(&self) -> impl Iterator<Item = &WorkerUrl> {
        self.worker_urls.iter().filter_map(|source| match source {
            Source::Url(url) => Some(url),
            Source::Dns(_) => None,
        })
    }

    /// The names whose addresses are workers.
    pub fn dns_names(&self) -> impl Iterator<Item = &DnsName> {
        self.worker_urls.iter().filter_map(|source| match source {
            Source::Url(_) => None,
            Source::Dns(name) => Some(name),
        })
    }

    pub fn weight(&self, url: &WorkerUrl) -> f64 {
        self.worker_weights
            .iter()
            .find(|(named, _)| named == url)
            .map_or(1.0, |(_, weight)| *weight)
    }

    pub fn check_timeout(&self) -> Duration {
        Duration::from_secs(self.health_check_timeout_secs)
    }
}

/// The two sides of `URL=VALUE`.
pub(super) fn split_entry<'a>(entry: &'a str, value: &str) -> Result<(&'a str, &'a str), String> {
    entry.split_once('=').ok_or_else(|| format!("{entry:?} is not of the form URL={value}"))
}

fn parse_weight(entry: &str) -> Result<(WorkerUrl, f64), String> {
    let (url, number) = split_entry(entry, "NUMBER")?;
    let weight = number.parse().map_err(|_| format!("the weight {number:?} is not a number"))?;
    Ok((url.parse()?, check_weight(weight)?))
}

fn parse_path(path: &str) -> Result<String, String> {
    match path.parse::<hyper::Uri>() {
        Ok(uri) if path.starts_with('/') && uri.authority().is_none() => Ok(path.to_owned()),
        _ => Err(format!("{path:?} is not a path like /health")),
    }
}
