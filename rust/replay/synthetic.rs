//! Traces that are made: loads of two kinds whose prompts begin alike as such loads' do.
//!
//! Both are drawn from a seed alone, in whole milliseconds, so that a trace that was written and read
//! again is the same.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use clap::ValueEnum;
use fastrand::Rng;

use super::trace::{Asked, BLOCK_TOKENS, Trace};

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Conversations: each turn's prompt begins with the turn before
    Chat,
    /// Tool loops behind long system prompts that many share, starting in bursts
    Agents,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Agents => "agents",
        }
    }

    /// The first so many requests of such a load.
    pub fn make(self, requests: usize, seed: u64) -> Trace {
        let mut load = Load { rng: Rng::with_seed(seed), blocks: 0, turns: BinaryHeap::new() };
        let trace = match self {
            Self::Chat => chat(&mut load, requests),
            Self::Agents => agents(&mut load, requests),
        };
        trace.renumbered()
    }
}

/// Sessions that go on.
struct Load {
    rng: Rng,
    /// Numbers of blocks that were used.
    blocks: u32,
    /// The next turn of each session, the earliest on top.
    turns: BinaryHeap<Reverse<Turn>>,
}

/// The next turn of a session. Compared by its time, then by its number.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    at_ms: u64,
    /// Sessions are numbered in the order of their beginning.
    session: u64,
    turns_left: u32,
    history: History,
}

/// What a session's prompts have in common so far.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct History {
    tokens: usize,
    /// Its whole blocks.
    blocks: Vec<u32>,
}

impl Load {
    fn block(&mut self) -> u32 {
        self.blocks += 1;
        self.blocks - 1
    }

    /// More tokens after these. A block that was not whole becomes another one, as its text goes on
    /// differently.
    fn extend(&mut self, history: &mut History, tokens: usize) {
        history.tokens += tokens;
        while history.blocks.len() < history.tokens / BLOCK_TOKENS {
            let block = self.block();
            history.blocks.push(block);
        }
    }

    fn ask(&mut self, turn: &Turn, output_tokens: usize) -> Asked {
        let Turn { at_ms, session, history, .. } = turn;
        let mut blocks = history.blocks.clone();
        if blocks.len() * BLOCK_TOKENS < history.tokens {
            blocks.push(self.block());
        }
        Asked {
            at_secs: *at_ms as f64 / 1e3,
            prompt_tokens: history.tokens as u32,
            output_tokens: output_tokens as u32,
            blocks: blocks.into(),
            routing_key: Some(session.to_string().into()),
        }
    }

    /// From an exponential distribution.
    fn pause_ms(&mut self, mean_secs: f64) -> f64 {
        -(1.0 - self.rng.f64()).ln() * mean_secs * 1e3
    }

    /// From a lognormal distribution, cut to `1..=most`.
    fn length(&mut self, median: f64, sigma: f64, most: usize) -> usize {
        // The method of Box and Muller (1958).
        let radius = (-2.0 * (1.0 - self.rng.f64()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * self.rng.f64()).cos();
        ((median * (sigma * normal).exp()) as usize).clamp(1, most)
    }

    /// From a geometric distribution, at least 1.
    fn count(&mut self, mean: f64) -> u32 {
        let mut count = 1;
        while count < 1000 && self.rng.f64() > 1.0 / mean {
            count += 1;
        }
        count
    }
}

/// The longest prompt: no turn comes after it.
const MAX_PROMPT_TOKENS: usize = 120_000;

/// Sessions begin at a steady rate, at random; a turn follows the one before after a minute or so of
/// reading and writing. All prompts begin with the same block.
fn chat(load: &mut Load, requests: usize) -> Trace {
    let system = History { tokens: BLOCK_TOKENS, blocks: vec![load.block()] };
    let (mut begins_ms, mut session) = (0.0, 0);
    let mut trace = Trace::default();
    while trace.requests.len() < requests {
        while load.turns.peek().is_none_or(|Reverse(turn)| begins_ms <= turn.at_ms as f64) {
            let mut history = system.clone();
            let first = load.length(4000.0, 1.2, MAX_PROMPT_TOKENS / 2);
            load.extend(&mut history, first);
            let turns_left = load.count(3.0);
            load.turns.push(Reverse(Turn {
                at_ms: begins_ms as u64,
                session,
                turns_left,
                history,
            }));
            session += 1;
            begins_ms += load.pause_ms(0.42);
        }
        let Some(Reverse(mut turn)) = load.turns.pop() else { continue };
        let output_tokens = load.length(250.0, 0.9, 4096);
        let asked = load.ask(&turn, output_tokens);
        trace.requests.push(asked);
        let question = load.length(600.0, 1.3, MAX_PROMPT_TOKENS / 4);
        load.extend(&mut turn.history, output_tokens + question);
        turn.turns_left -= 1;
        turn.at_ms += 10_000 + load.pause_ms(60.0) as u64;
        if turn.turns_left > 0 && turn.history.tokens <= MAX_PROMPT_TOKENS {
            load.turns.push(Reverse(turn));
        }
    }
    trace
}

/// Bursts of tasks, each behind one of some system prompts; a step follows the one before as soon as a tool has
/// answered.
fn agents(load: &mut Load, requests: usize) -> Trace {
    let systems: Vec<History> = (0..24)
        .map(|_| {
            let mut history = History::default();
            let tokens = load.length(6000.0, 0.6, 32_000);
            load.extend(&mut history, tokens);
            history
        })
        .collect();
    let (mut burst_ms, mut session) = (0.0, 0);
    let mut trace = Trace::default();
    while trace.requests.len() < requests {
        while load.turns.peek().is_none_or(|Reverse(turn)| burst_ms <= turn.at_ms as f64) {
            // A few are used far more than the others.
            let share = load.rng.f64();
            let system = systems[(share * share * systems.len() as f64) as usize].clone();
            for _ in 0..load.count(5.0) {
                let mut history = system.clone();
                let task = load.length(800.0, 1.0, 16_000);
                load.extend(&mut history, task);
                let turns_left = load.count(8.0);
                let at_ms = (burst_ms + load.pause_ms(0.2)) as u64;
                load.turns.push(Reverse(Turn { at_ms, session, turns_left, history }));
                session += 1;
            }
            burst_ms += load.pause_ms(3.0);
        }
        let Some(Reverse(mut turn)) = load.turns.pop() else { continue };
        let output_tokens = load.length(90.0, 0.8, 4096);
        let asked = load.ask(&turn, output_tokens);
        trace.requests.push(asked);
        let result = load.length(700.0, 1.3, 30_000);
        load.extend(&mut turn.history, output_tokens + result);
        turn.turns_left -= 1;
        turn.at_ms += 2_000 + 20 * output_tokens as u64 + load.pause_ms(4.0) as u64;
        if turn.turns_left > 0 && turn.history.tokens <= MAX_PROMPT_TOKENS {
            load.turns.push(Reverse(turn));
        }
    }
    trace
}
