//! How fast and how large simulated workers are: the options of the [`engine`](super::engine).

use clap::Args;

use super::engine::Config;

/// What a simulated worker can do.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct Hardware {
    /// Uncached prompt tokens per second, one request at a time.
    #[arg(long, default_value_t = 8000.0, allow_negative_numbers = true, value_parser = positive)]
    pub prefill_rate: f64,
    /// Seconds of a decode step.
    #[arg(long, default_value_t = 0.012, allow_negative_numbers = true, value_parser = positive)]
    pub step_base: f64,
    /// Seconds that each running request adds to a decode step.
    #[arg(long, default_value_t = 0.0003)]
    #[arg(allow_negative_numbers = true, value_parser = not_negative)]
    pub step_per_seq: f64,
    /// Tokens that the KV cache holds.
    #[arg(long, default_value_t = 400_000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    pub kv_tokens: u32,
    /// Tokens in a page of the KV cache (SGLang's --page-size), a power of two up to 512: larger is faster and finds
    /// fewer hits.
    #[arg(long, default_value_t = 1, value_parser = page)]
    pub page_tokens: u32,
    /// Requests that run at the same time; others wait.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_running: u32,
    /// Leave the size of the KV cache out of what workers tell of themselves.
    #[arg(long, default_value_t = false)]
    pub hide_kv: bool,
}

impl Hardware {
    /// The engine of such a worker.
    pub fn engine(&self) -> Config {
        Config {
            prefill_rate: self.prefill_rate,
            step_base_secs: self.step_base,
            step_per_seq_secs: self.step_per_seq,
            kv_tokens: self.kv_tokens as usize,
            max_running: self.max_running as usize,
            page_tokens: self.page_tokens as usize,
        }
    }
}

/// The largest page of the KV cache, in tokens.
pub const MAX_PAGE_TOKENS: u32 = 512;

/// The largest number an option takes: beyond it times could become infinite.
const MAX_NUMBER: f64 = 1e9;

/// A number over 0.
pub fn positive(text: &str) -> Result<f64, String> {
    let number = not_negative(text).ok().filter(|number| *number > 0.0);
    number.ok_or_else(|| format!("must be a number over 0, at most {MAX_NUMBER:e}"))
}

fn not_negative(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=MAX_NUMBER).contains(number));
    number.ok_or_else(|| format!("must be a number from 0 to {MAX_NUMBER:e}"))
}

fn page(text: &str) -> Result<u32, String> {
    let page: Option<u32> = text.parse().ok();
    page.filter(|page| page.is_power_of_two() && *page <= MAX_PAGE_TOKENS)
        .ok_or_else(|| format!("must be a power of two from 1 to {MAX_PAGE_TOKENS}"))
}
