//! A rule from outside: it is shown what the router's own rules see, and answers with a worker's place.
//!
//! The one idea: all that is believed of the workers is kept here, in an [`Outlook`] and the latest latencies, so that a
//! [`Chooser`] is one question and one answer. Where it comes from is not known here.
//!
//! Invariant: an answer that is no place of a worker, or none, fails the request; nothing else is picked instead.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use clap::builder::{EnumValueParser, PossibleValue, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use hashbrown::HashMap;
use parking_lot::{Mutex, RwLock};

use super::candidates::Weighed;
use super::outlook::{Outlook, View};
use super::{
    Options, Pick, PickError, Policy, PolicyKind, Replayed, Request, Target, Told, Underway,
    WorkerId,
};

/// The only reason: the rule's own reasons are not known.
pub const OWN_CHOICE: &str = "own_choice";

/// How a rule from outside is written.
const SHAPE: &str = "FILE.py:NAME";

/// Longest name of a rule from outside, in bytes.
pub const NAME_MAX: usize = 64;

/// Most different names of rules from outside in one process. They are never given back, as metrics keep them.
const NAMES_MAX: usize = 1000;

/// Which rule picks: one of the router's own, or one from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Rule(PolicyKind),
    Own(OwnName),
}

/// What a rule from outside is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnName {
    /// `FILE.py:NAME`, as it was written, or a name alone.
    pub text: &'static str,
    /// In traces, metrics and the log: without directories.
    name: &'static str,
}

impl Choice {
    /// A rule from outside, by `FILE.py:NAME` or by a name alone. In traces and metrics it is called so too, without
    /// directories and with `_` for what is not plain in the file's name; a name alone that is one of the router's own
    /// becomes `own_NAME`.
    ///
    /// # Errors
    /// NAME is none, or there have been too many; in a sentence.
    pub fn own(text: &str) -> Result<Self, String> {
        let (file, name) = match text.rsplit_once(':') {
            Some((file, name)) => (Some(file), name),
            None => (None, text),
        };
        let is_start = |first: char| first == '_' || first.is_alphabetic();
        let is_name = name.starts_with(is_start)
            && name.chars().all(|c| c == '_' || c.is_alphanumeric())
            && name.len() <= NAME_MAX;
        if !is_name {
            return Err(format!(
                "must be {SHAPE}, where NAME is a name in that file of at most {NAME_MAX} bytes"
            ));
        }
        let is_taken = PolicyKind::ALL.iter().any(|kind| kind.name() == name) || name == "pinned";
        let name = match file {
            Some(file) => kept(&format!("{}:{name}", plain(file)))?,
            None if is_taken => kept(&format!("own_{name}"))?,
            None => kept(name)?,
        };
        Ok(Self::Own(OwnName { text: kept(text)?, name }))
    }

    /// The name in traces, metrics and the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rule(kind) => kind.name(),
            Self::Own(own) => own.name,
        }
    }
}

impl From<PolicyKind> for Choice {
    fn from(kind: PolicyKind) -> Self {
        Self::Rule(kind)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rule(kind) => kind.name(),
            Self::Own(own) => own.text,
        })
    }
}

/// A file's own name, fit for a label, a line of the log and a column.
fn plain(file: &str) -> String {
    let name = Path::new(file).file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_alphanumeric() || "._-".contains(c) { c } else { '_' };
    name.chars().map(plain).collect()
}

/// The same text, for as long as the process lasts.
fn kept(text: &str) -> Result<&'static str, String> {
    static KEPT: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    let mut kept = KEPT.lock();
    if let Some(known) = kept.get(text) {
        return Ok(known);
    }
    if kept.len() >= NAMES_MAX {
        return Err(format!("this process has had {NAMES_MAX} names of policies already"));
    }
    let text: &'static str = Box::leak(text.into());
    kept.insert(text);
    Ok(text)
}

/// Reads the option: a [`PolicyKind`], or `FILE.py:NAME`.
#[derive(Clone, Copy, Debug)]
pub struct ChoiceParser;

impl TypedValueParser for ChoiceParser {
    type Value = Choice;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Choice, clap::Error> {
        if value.to_string_lossy().contains(".py:") {
            let own = |text: String| Choice::own(&text);
            let parser = clap::builder::StringValueParser::new().try_map(own);
            return parser.parse_ref(command, arg, value);
        }
        let rule = EnumValueParser::<PolicyKind>::new().parse_ref(command, arg, value);
        rule.map(Choice::Rule).map_err(naming_the_shape)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let values: Vec<_> =
            PolicyKind::ALL.iter().filter_map(clap::ValueEnum::to_possible_value).collect();
        Some(Box::new(values.into_iter()))
    }
}

/// The error that lists the router's own rules, which are not all that there can be.
fn naming_the_shape(mut error: clap::Error) -> clap::Error {
    if let Some(ContextValue::Strings(known)) = error.get(ContextKind::ValidValue) {
        let all = known.iter().cloned().chain([SHAPE.to_owned()]).collect();
        error.insert(ContextKind::ValidValue, ContextValue::Strings(all));
    }
    error
}

/// A worker as a rule from outside sees it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub target: &'a Arc<Target>,
    pub view: View,
    pub last: Latencies,
}

/// The latest latencies of a worker's answers, from when the request was first routed; `None` until there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Latencies {
    /// To the first content of a stream.
    pub ttft_ms: Option<f64>,
    /// To the end of an answer.
    pub e2e_ms: Option<f64>,
}

/// A rule from outside.
pub trait Chooser: Send + Sync {
    /// The place of one of the workers, which are never none.
    ///
    /// # Errors
    /// It failed, or answered with something else.
    fn choose(
        &self,
        request: &Request,
        input_tokens: u32,
        workers: &[Seen],
    ) -> Result<usize, PickError>;

    /// See [`Policy::wants_traces`].
    fn wants_traces(&self) -> bool {
        false
    }

    /// See [`Policy::finished`].
    fn finished(&self, _trace: String) {}

    /// See [`Policy::close`].
    fn close(&self) {}

    /// See [`Policy::replayed`].
    fn replayed(&self, _replayed: &Replayed) {}

    /// See [`Policy::remarks`].
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Why a rule from outside cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policy: {0}")]
pub struct LoadError(pub String);

/// Where rules from outside come from: `FILE.py:NAME` to the rule.
pub type Load<'a> = &'a (dyn Fn(&str) -> Result<Arc<dyn Chooser>, LoadError> + Sync);

/// The policy that `options` ask for, as it is at the start.
///
/// # Errors
/// It is from outside and cannot be loaded.
pub fn build(options: &Options, load: Load<'_>) -> Result<Arc<dyn Policy>, LoadError> {
    match options.policy {
        Choice::Rule(kind) => Ok(kind.build(options)),
        Choice::Own(own) => Ok(Arc::new(Own::new(load(own.text)?, options.worker_kv_tokens))),
    }
}

/// [`Load`] where there is no Python.
///
/// # Errors
/// Always.
pub fn load_nothing(text: &str) -> Result<Arc<dyn Chooser>, LoadError> {
    Err(LoadError(format!(
        "{text} is a policy in Python, which this program has not: install the Python package and run \
         python -m sglang_router_rs"
    )))
}

/// See the module.
struct Own {
    chooser: Arc<dyn Chooser>,
    outlook: Arc<Outlook>,
    latest: Arc<Latest>,
}

/// One entry per worker that has answered and has not left.
type Latest = RwLock<HashMap<WorkerId, Latencies>>;

impl Own {
    fn new(chooser: Arc<dyn Chooser>, kv_tokens: Option<u64>) -> Self {
        Self { chooser, outlook: Arc::new(Outlook::new(kv_tokens)), latest: Arc::default() }
    }
}

impl Policy for Own {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        _: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let views = self.outlook.see(request, targets);
        let seen: Vec<_> = {
            let latest = self.latest.read();
            let last = |target: &Arc<Target>| latest.get(&target.id).copied().unwrap_or_default();
            let seen = |(target, view)| Seen { target, view, last: last(target) };
            targets.iter().zip(views.workers.iter().copied()).map(seen).collect()
        };
        let index = self.chooser.choose(request, views.input_tokens, &seen)?;
        if let Some(weighed) = weighed {
            weighed.outlook(|index| views.workers[index]);
        }
        let matched_tokens = Some(views.workers[index].matched_tokens);
        Ok(Pick { index, reason: OWN_CHOICE, matched_tokens })
    }

    fn may_block(&self) -> bool {
        true
    }

    fn input_tokens(&self, request: &Request) -> Option<u32> {
        self.outlook.input_tokens(request)
    }

    fn matched_tokens(&self, request: &Request, worker: WorkerId) -> Option<u32> {
        Some(self.outlook.matched_tokens(request, worker))
    }

    fn sent(&self, request: &Request, target: &Arc<Target>) -> Option<Box<dyn Underway>> {
        Some(Box::new(Sent {
            in_outlook: self.outlook.sent(request, target),
            latest: self.latest.clone(),
            worker: target.id,
            at_secs: request.at_secs,
        }))
    }

    fn forget(&self, worker: WorkerId) {
        self.outlook.forget(worker);
        self.latest.write().remove(&worker);
    }

    fn wants_traces(&self) -> bool {
        self.chooser.wants_traces()
    }

    fn finished(&self, trace: String) {
        self.chooser.finished(trace);
    }

    fn close(&self) {
        self.chooser.close();
    }

    fn replayed(&self, replayed: &Replayed) {
        self.chooser.replayed(replayed);
    }

    fn remarks(&self) -> Vec<String> {
        self.chooser.remarks()
    }
}

struct Sent {
    in_outlook: Box<dyn Underway>,
    latest: Arc<Latest>,
    worker: WorkerId,
    at_secs: f64,
}

impl Sent {
    fn note(&self, at_secs: f64, latency: impl FnOnce(&mut Latencies) -> &mut Option<f64>) {
        let mut latest = self.latest.write();
        *latency(latest.entry(self.worker).or_default()) = Some((at_secs - self.at_secs) * 1e3);
    }
}

impl Underway for Sent {
    fn begun(&mut self, at_secs: f64) {
        self.in_outlook.begun(at_secs);
        self.note(at_secs, |latencies| &mut latencies.ttft_ms);
    }

    fn told(&mut self, told: &Told) {
        self.in_outlook.told(told);
    }

    fn answered(&mut self, at_secs: f64) {
        self.in_outlook.answered(at_secs);
        self.note(at_secs, |latencies| &mut latencies.e2e_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::candidates::explained;
    use crate::routing::tests::{loaded, options};

    /// The last one of those whose latest answer is not known.
    struct LastUnknown;

    impl Chooser for LastUnknown {
        fn choose(&self, _: &Request, _: u32, workers: &[Seen]) -> Result<usize, PickError> {
            workers.iter().rposition(|seen| seen.last.e2e_ms.is_none()).ok_or_else(|| PickError {
                message: "all are known".to_owned(),
                detail: format!("{:?}", workers[0].last),
            })
        }
    }

    #[test]
    fn a_rule_from_outside_sees_what_came_back() {
        let own = Own::new(Arc::new(LastUnknown), None);
        let (targets, _held) = loaded(&[0, 0]);
        let mut rng = fastrand::Rng::with_seed(1);
        let mut picked = Vec::new();
        let request = Request { at_secs: 2.0, ..Request::of(b"some prompt") };
        for _ in 0..2 {
            let (pick, candidates) =
                explained(&own, &request, &targets, &mut rng, 2).expect("one is unknown");
            assert_eq!((pick.reason, candidates.len()), (OWN_CHOICE, 2));
            let mut in_flight = targets[pick.index].begin();
            in_flight.heard_by(own.sent(&request, &targets[pick.index]));
            in_flight.begun(2.5);
            in_flight.answered(4.0);
            picked.push(pick.index);
        }
        assert_eq!(picked, [1, 0]);
        let error = own.pick(&request, &targets, &mut rng, None).expect_err("all are known");
        assert_eq!(error.detail, "Latencies { ttft_ms: Some(500.0), e2e_ms: Some(2000.0) }");
        own.forget(1);
        assert_eq!(own.pick(&request, &targets, &mut rng, None).map(|pick| pick.index), Ok(1));
    }

    #[test]
    fn a_rule_of_the_router_or_one_in_a_file() {
        let choice = |text: &str| options(&["--policy", text]).map(|options| options.policy);
        assert_eq!(choice("RANDOM"), Ok(PolicyKind::Random.into()));
        let own = choice("some where/mine.py:choose").expect("a file and a name");
        assert_eq!(own.name(), "mine.py:choose");
        assert_eq!(own.to_string(), "some where/mine.py:choose");
        let odd = choice("../my \"first\"\n-1.py:random").expect("a file and a name");
        assert_eq!(odd.name(), "my__first__-1.py:random");
        assert_eq!(Choice::own("random").map(Choice::name), Ok("own_random"));
        for bad in ["mine.py:", "mine.py:a-b", "mine.py:1", &format!("m.py:{}", "n".repeat(65))] {
            assert!(choice(bad).expect_err(bad).contains("FILE.py:NAME"));
        }
        for bad in ["mine.py", "mine:choose", "random.py"] {
            let refused = choice(bad).expect_err("no file and name");
            assert!(
                refused.contains("cache_aware") && refused.contains("FILE.py:NAME"),
                "{refused}"
            );
        }
        let options = options(&["--policy=mine.py:choose"]).expect("a file and a name");
        let refused = build(&options, &load_nothing).err().expect("no Python").to_string();
        assert!(refused.contains("mine.py:choose") && refused.contains("python -m"), "{refused}");
    }
}
