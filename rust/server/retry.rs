//! When an attempt is followed by another one, and after which pause.

use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{self, HeaderMap};

use crate::workers::breaker::Outcome;

#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// Attempts in total before a request fails, each at another worker where there is one
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub retry_max_retries: u32,

    /// Milliseconds before the first repeated attempt; none after a failed connection while there is another worker
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(0..=3_600_000))]
    pub retry_initial_backoff_ms: u64,

    /// Longest pause between attempts in milliseconds
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(0..=3_600_000))]
    pub retry_max_backoff_ms: u64,

    /// What each pause is multiplied by for the next one, 1 to 100
    #[arg(long, default_value_t = 1.5, value_parser = parse_multiplier)]
    pub retry_backoff_multiplier: f64,

    /// Share of a pause that it is shortened or lengthened by at random, 0 to 1
    #[arg(long, default_value_t = 0.2, value_parser = parse_share)]
    pub retry_jitter_factor: f64,

    /// Send each request to one worker only, whatever happens
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub disable_retries: bool,
}

fn parse_multiplier(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (1.0..=100.0).contains(&value) => Ok(value),
        _ => Err("must be a number from 1 to 100".to_owned()),
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("must be a number from 0 to 1".to_owned()),
    }
}

impl Options {
    pub(super) fn attempts_max(&self) -> u32 {
        if self.disable_retries { 1 } else { self.retry_max_retries }
    }

    /// The pause before the attempt that follows so many pauses.
    pub(super) fn backoff(&self, pauses: u32, draw: &mut fastrand::Rng) -> Duration {
        let grown = self.retry_initial_backoff_ms as f64
            * self.retry_backoff_multiplier.powi(pauses.min(1000) as i32);
        let even = grown.min(self.retry_max_backoff_ms as f64);
        let jitter = 1.0 + self.retry_jitter_factor * (2.0 * draw.f64() - 1.0);
        Duration::from_secs_f64(even * jitter / 1e3)
    }
}

/// Statuses that another worker, or the same one a moment later, may not answer with.
pub(super) fn is_retryable(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

/// How long a worker that says that it is full is left alone, unless it says so itself, and at most.
const PRESSURE: Duration = Duration::from_secs(1);
const PRESSURE_MAX: Duration = Duration::from_secs(10);

/// What an answer that is an error says of its worker; None of one that is no error.
pub(super) fn verdict(status: StatusCode, headers: &HeaderMap) -> Option<Outcome> {
    match status.as_u16() {
        429 | 503 => {
            let asked = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
            let asked = asked.and_then(|secs| secs.trim().parse().ok()).map(Duration::from_secs);
            Some(Outcome::Pressure(asked.unwrap_or(PRESSURE).min(PRESSURE_MAX)))
        }
        // A redirection leads to nowhere the router would go; 501 and 505 are about the request.
        300..=499 | 501 | 505 => Some(Outcome::Neutral),
        500.. => Some(Outcome::Failure),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: Options = Options {
        retry_max_retries: 5,
        retry_initial_backoff_ms: 50,
        retry_max_backoff_ms: 1000,
        retry_backoff_multiplier: 1.5,
        retry_jitter_factor: 0.2,
        disable_retries: false,
    };

    #[test]
    fn pauses_grow_up_to_their_bound_with_jitter_around_them() {
        let mut draw = fastrand::Rng::with_seed(7);
        for (pauses, even_ms) in
            [(0, 50.0), (1, 75.0), (2, 112.5), (9, 1000.0), (4_000_000, 1000.0)]
        {
            for _ in 0..100 {
                let ms = OPTIONS.backoff(pauses, &mut draw).as_secs_f64() * 1e3;
                assert!((0.8 * even_ms..=1.2 * even_ms).contains(&ms), "{pauses}: {ms}");
            }
        }
        let exact = Options { retry_jitter_factor: 0.0, ..OPTIONS };
        assert_eq!(exact.backoff(1, &mut draw), Duration::from_millis(75));
    }

    #[test]
    fn statuses_say_who_is_to_blame() {
        let verdict = |status: u16, retry_after: Option<&str>| {
            let status = StatusCode::from_u16(status).expect("a status");
            let value = |text: &str| text.parse().expect("a value");
            let headers = retry_after.map(|text| (header::RETRY_AFTER, value(text)));
            verdict(status, &headers.into_iter().collect())
        };
        for fine in [200, 204] {
            assert_eq!(verdict(fine, None), None);
        }
        for client in [302, 400, 401, 404, 408, 422, 501] {
            assert_eq!(verdict(client, None), Some(Outcome::Neutral));
        }
        for failure in [500, 502, 504, 507] {
            assert_eq!(verdict(failure, None), Some(Outcome::Failure));
        }
        assert_eq!(verdict(429, None), Some(Outcome::Pressure(PRESSURE)));
        assert_eq!(verdict(503, Some("3")), Some(Outcome::Pressure(Duration::from_secs(3))));
        assert_eq!(verdict(503, Some("99999")), Some(Outcome::Pressure(PRESSURE_MAX)));
        assert_eq!(verdict(429, Some("Fri, 31 Dec")), Some(Outcome::Pressure(PRESSURE)));
    }
}
