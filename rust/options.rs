//! Every option of the router, composed of what the modules declare.
//!
//! The one idea: there is one parser, clap's, and one declaration per option, a field of some module's `Options`.
//! A Python keyword, an environment variable and a key of a configuration file become flags and go through that
//! parser, so that name, default, range and error are the same from everywhere. Keyword or flag beats environment
//! beats file beats default.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::ffi::OsString;
use std::fmt;
use std::num::ParseIntError;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, parser::ValueSource};
use serde_json::Value;

use crate::{routing, server, telemetry, tracking, upstream, workers};

/// Environment variables are `SGLANG_ROUTER__<NAME>`. Two underscores: Kubernetes itself sets `SGLANG_ROUTER_PORT`
/// for a Service of that name.
pub const ENVIRONMENT_PREFIX: &str = "SGLANG_ROUTER__";

#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    #[command(flatten)]
    pub workers: workers::Options,
    #[command(flatten)]
    pub routing: routing::Options,
    #[command(flatten)]
    pub server: server::Options,
    #[command(flatten)]
    pub tracking: tracking::Options,
    #[command(flatten)]
    pub upstream: upstream::Options,
    #[command(flatten)]
    pub logging: telemetry::logging::Options,

    /// TOML or JSON file of options: flat keys, named like the keywords
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// One option as someone set it: its name and its values as text. A boolean or number has one value,
/// a list or map (`KEY=VALUE`) any number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub name: String,
    pub values: Vec<String>,
}

/// Where a setting came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Keyword,
    Environment,
    File(PathBuf),
}

/// Why options were refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("{}: there is no such option{}", place(.origin, .name), hint(.nearest.as_deref()))]
    Unknown { origin: Source, name: String, nearest: Option<String> },
    #[error("{}: {message}", place(.origin, .name))]
    Invalid { origin: Source, name: String, message: String },
    #[error("{0}")]
    File(String),
}

fn place(origin: &Source, name: &str) -> String {
    match origin {
        Source::Keyword => name.to_owned(),
        Source::Environment => format!("{ENVIRONMENT_PREFIX}{}", name.to_ascii_uppercase()),
        Source::File(path) => format!("{name} in {}", path.display()),
    }
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map(|name| format!("; did you mean {name}?")).unwrap_or_default()
}

/// The options as a clap command of their own.
pub fn command() -> Command {
    Options::augment_args(Command::new("launch")).args_override_self(true)
}

impl Options {
    /// Options from Python keywords, and from the file that the keyword `config` names.
    pub fn from_keywords(keywords: &[Setting]) -> Result<Self, OptionError> {
        parse(keywords, &Source::Keyword)?;
        let config = keywords.iter().find(|setting| setting.name == "config");
        let file = match config.and_then(|setting| setting.values.first()) {
            Some(path) => read_file(Path::new(path))?,
            None => vec![],
        };
        let mut settings =
            without(file, |name| keywords.iter().any(|setting| setting.name == name));
        settings.extend_from_slice(keywords);
        parse(&settings, &Source::Keyword)?.checked()
    }

    /// Options from the flags that clap has parsed as `matches`, the environment, and the file that either names.
    /// `flags` are those same flags as they were written; `defaults` replace the declared ones.
    pub fn from_command_line(
        matches: &ArgMatches,
        flags: &[String],
        environment: impl Iterator<Item = (OsString, OsString)>,
        defaults: &[Setting],
    ) -> Result<Self, OptionError> {
        let is_flag = |name: &str| matches.value_source(name) == Some(ValueSource::CommandLine);
        let environment = from_environment(environment)?;
        parse(&environment, &Source::Environment)?;
        let environment = without(environment, is_flag);
        let config = match matches.get_one::<PathBuf>("config") {
            Some(path) => Some(path.clone()),
            None => environment
                .iter()
                .find(|setting| setting.name == "config")
                .and_then(|setting| setting.values.first())
                .map(PathBuf::from),
        };
        let file = config.map_or_else(|| Ok(vec![]), |path| read_file(&path))?;
        let is_set =
            |name: &str| is_flag(name) || environment.iter().any(|setting| setting.name == name);
        let mut argv = argv(defaults);
        argv.extend(self::argv(&without(file, is_set)));
        argv.extend(self::argv(&environment));
        argv.extend_from_slice(flags);
        parse_argv(argv, &Source::Keyword)?.checked()
    }

    /// These options, if they go together: what no single one shows, nor one source alone.
    fn checked(self) -> Result<Self, OptionError> {
        let check = self.workers.check().and_then(|()| self.server.check());
        let check = check.and_then(|()| self.tracking.check());
        check.map(|()| self).map_err(|(name, message)| OptionError::Invalid {
            origin: Source::Keyword,
            name: name.to_owned(),
            message,
        })
    }
}

/// Parses settings of one source.
fn parse(settings: &[Setting], origin: &Source) -> Result<Options, OptionError> {
    let command = command();
    for Setting { name, .. } in settings {
        let is_known = command.get_arguments().any(|arg| arg.get_id() == name.as_str());
        if !is_known {
            let nearest = nearest(&command, name);
            return Err(OptionError::Unknown {
                origin: origin.clone(),
                name: name.clone(),
                nearest,
            });
        }
    }
    parse_argv(argv(settings), origin)
}

fn parse_argv(argv: Vec<String>, origin: &Source) -> Result<Options, OptionError> {
    let argv = std::iter::once("launch".to_owned()).chain(argv);
    command()
        .try_get_matches_from(argv)
        .and_then(|matches| Options::from_arg_matches(&matches))
        .map_err(|error| invalid(&error, origin))
}

/// Flags that say what the settings say.
fn argv(settings: &[Setting]) -> Vec<String> {
    let mut argv = Vec::new();
    for Setting { name, values } in settings {
        let flag = format!("--{}", name.replace('_', "-"));
        if values.is_empty() {
            argv.push(flag);
        } else {
            argv.extend(values.iter().map(|value| format!("{flag}={value}")));
        }
    }
    argv
}

fn without(settings: Vec<Setting>, is_taken: impl Fn(&str) -> bool) -> Vec<Setting> {
    settings.into_iter().filter(|setting| !is_taken(&setting.name)).collect()
}

fn nearest(command: &Command, name: &str) -> Option<String> {
    command
        .get_arguments()
        .map(|arg| arg.get_id().as_str())
        .map(|known| (strsim::jaro_winkler(known, name), known))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .map(|(_, known)| known.to_owned())
}

/// clap's error in the words of an option instead of a flag.
fn invalid(error: &clap::Error, origin: &Source) -> OptionError {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    // `--port <PORT>`
    let flag = text(ContextKind::InvalidArg).unwrap_or_default();
    let flag = flag.trim_start_matches('-').split([' ', '=', '[']).next().unwrap_or_default();
    let value = text(ContextKind::InvalidValue).unwrap_or_default();
    let why = match (error.source(), text(ContextKind::ValidValue)) {
        (Some(source), _) if source.is::<ParseIntError>() => {
            format!("not a whole number {}", integer_range(flag))
        }
        (Some(source), _) => source.to_string(),
        (None, Some(valid)) => format!("not one of {valid}"),
        (None, None) if error.kind() == ErrorKind::InvalidValue => "a value is missing".to_owned(),
        (None, None) => error.to_string().lines().next().unwrap_or_default().to_owned(),
    };
    let message = if value.is_empty() { why } else { format!("bad value {value:?}: {why}") };
    OptionError::Invalid { origin: origin.clone(), name: flag.replace('-', "_"), message }
}

/// The range of an integer option in words. clap tells it only to who leaves it.
fn integer_range(flag: &str) -> String {
    let beyond = |value: i64| {
        let argv = ["launch".to_owned(), format!("--{flag}={value}")];
        let error = command().try_get_matches_from(argv).err()?;
        let text = error.source()?.to_string();
        text.split_once(" is not in ").map(|(_, range)| format!("in {range}"))
    };
    beyond(i64::MAX).or_else(|| beyond(0)).unwrap_or_else(|| "in 0..=2^64-1".to_owned())
}

fn from_environment(
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Vec<Setting>, OptionError> {
    let command = command();
    let mut settings = Vec::new();
    for (variable, text) in environment {
        let variable = variable.to_string_lossy();
        let Some(name) = variable.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        let name = name.to_ascii_lowercase();
        let text = text.into_string().map_err(|text| OptionError::Invalid {
            origin: Source::Environment,
            name: name.clone(),
            message: format!("bad value {text:?}: not UTF-8"),
        })?;
        let is_list = command.get_arguments().any(|arg| {
            arg.get_id() == name.as_str() && matches!(arg.get_action(), ArgAction::Append)
        });
        let values = if is_list {
            text.split(',')
                .map(|item| item.trim().to_owned())
                .filter(|item| !item.is_empty())
                .collect()
        } else {
            vec![text]
        };
        settings.push(Setting { name, values });
    }
    Ok(settings)
}

/// The settings of a TOML (`.toml`) or JSON (any other name) file, each checked by itself.
fn read_file(path: &Path) -> Result<Vec<Setting>, OptionError> {
    let failed = |why: &dyn fmt::Display| {
        OptionError::File(format!("cannot read the options in {}: {why}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    let is_toml = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml"));
    let keys: BTreeMap<String, Value> = if is_toml {
        toml::from_str(&text).map_err(|error| failed(&without_excerpt(&error)))?
    } else {
        serde_json::from_str(&text).map_err(|error| failed(&error))?
    };
    let origin = Source::File(path.to_owned());
    let mut settings = Vec::new();
    for (name, value) in keys {
        let values = values(&value).ok_or_else(|| OptionError::Invalid {
            origin: origin.clone(),
            name: name.clone(),
            message: format!("{value} is neither a boolean, a number, a string, nor a flat list or table of those"),
        })?;
        settings.push(Setting { name, values });
    }
    if settings.iter().any(|setting| setting.name == "config") {
        let message = "a file of options does not name another one".to_owned();
        return Err(OptionError::Invalid { origin, name: "config".to_owned(), message });
    }
    parse(&settings, &origin)?;
    Ok(settings)
}

/// Where a TOML text is wrong and why, without the line itself: there may be a key in it.
fn without_excerpt(error: &toml::de::Error) -> String {
    let place = error.to_string().lines().next().unwrap_or_default().to_owned();
    format!("{place}: {}", error.message())
}

fn values(value: &Value) -> Option<Vec<String>> {
    let scalar = |value: &Value| match value {
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::String(text) => Some(text.clone()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    };
    match value {
        Value::Array(items) => items.iter().map(scalar).collect(),
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| scalar(value).map(|value| format!("{key}={value}")))
            .collect(),
        value => Some(vec![scalar(value)?]),
    }
}

/// An option as the documentation and the Python signature show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The keyword, and the flag with dashes instead of underscores.
    pub name: String,
    pub shape: Shape,
    /// As text; None where the option is absent by default, empty for a list or map.
    pub default: Option<String>,
    pub choices: Vec<String>,
    pub help: String,
    /// Other names of the flag.
    pub aliases: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Boolean,
    Integer,
    Number,
    Text,
    List,
    Map,
}

/// Every option, in the order of the documentation.
pub fn described() -> Vec<Described> {
    command().get_arguments().filter(|arg| arg.get_id() != "help").map(describe).collect()
}

fn describe(arg: &Arg) -> Described {
    let shape = shape(arg);
    let default = arg.get_default_values().first().map(|text| text.to_string_lossy().into_owned());
    let choices = arg.get_possible_values();
    Described {
        name: arg.get_id().to_string(),
        shape,
        default,
        choices: if shape == Shape::Boolean {
            vec![]
        } else {
            choices.iter().map(|choice| choice.get_name().to_owned()).collect()
        },
        help: arg.get_help().map(ToString::to_string).unwrap_or_default(),
        aliases: arg.get_all_aliases().unwrap_or_default().into_iter().map(str::to_owned).collect(),
    }
}

fn shape(arg: &Arg) -> Shape {
    let id = arg.get_value_parser().type_id();
    let is_any = |types: &[TypeId]| types.iter().any(|of| id == *of);
    let is_map =
        || arg.get_value_names().is_some_and(|names| names.iter().any(|name| name.contains('=')));
    if matches!(arg.get_action(), ArgAction::Append) {
        if is_map() { Shape::Map } else { Shape::List }
    } else if is_any(&[TypeId::of::<bool>()]) {
        Shape::Boolean
    } else if is_any(&[TypeId::of::<f64>()]) {
        Shape::Number
    } else if is_any(&[
        TypeId::of::<u16>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
        TypeId::of::<i64>(),
        TypeId::of::<usize>(),
    ]) {
        Shape::Integer
    } else {
        Shape::Text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(name: &str, values: &[&str]) -> Setting {
        Setting { name: name.into(), values: values.iter().map(|value| (*value).into()).collect() }
    }

    fn keywords(settings: &[Setting]) -> Result<Options, String> {
        Options::from_keywords(settings).map_err(|error| error.to_string())
    }

    fn command_line(flags: &[&str], environment: &[(&str, &str)]) -> Result<Options, String> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).into()).collect();
        let argv = std::iter::once("launch".to_owned()).chain(flags.clone());
        let matches = command().try_get_matches_from(argv).map_err(|error| error.to_string())?;
        let environment = environment.iter().map(|(name, text)| ((*name).into(), (*text).into()));
        Options::from_command_line(&matches, &flags, environment, &[])
            .map_err(|error| error.to_string())
    }

    /// A file in the temporary folder, gone with the value.
    struct File(PathBuf);

    impl File {
        fn new(name: &str, text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("{}-{name}", std::process::id()));
            std::fs::write(&path, text).expect("temporary file");
            Self(path)
        }

        fn flag(&self) -> String {
            format!("--config={}", self.0.display())
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn clap_finds_no_fault_with_the_options() {
        command().debug_assert();
    }

    #[test]
    fn defaults() {
        let options = keywords(&[]).expect("defaults");
        assert_eq!((options.server.port, options.server.host.as_str()), (30000, "127.0.0.1"));
        assert!(!options.tracking.enable_request_tracking);
    }

    #[test]
    fn errors_name_option_value_and_range() {
        let error =
            |name: &str, values: &[&str]| keywords(&[setting(name, values)]).expect_err(name);
        assert_eq!(
            error("port", &["70000"]),
            "port: bad value \"70000\": 70000 is not in 0..=65535"
        );
        assert!(error("policy", &["best"]).contains("not one of random, round_robin"));
        assert!(error("prot", &["1"]).contains("did you mean port?"));
        assert!(error("worker_kv_tokens", &["0"]).contains("1..="));
        assert!(error("worker_urls", &["localhost:1"]).contains("no scheme"));
        assert!(error("worker_urls", &["http://a:1", "http://a:1/"]).starts_with("worker_urls: "));
        assert!(error("cache_threshold", &["nan"]).contains("0 to 1"));
        assert_eq!(
            error("request_timeout_secs", &["-1"]),
            "request_timeout_secs: bad value \"-1\": not a whole number in 1..=604800"
        );
        assert!(error("port", &["http"]).contains("0..=65535"));
        assert!(error("trace_ttl_seconds", &["x"]).contains("in 1.."));
        assert!(error("seed", &["-1"]).contains("in 0..=2^64-1"));
        assert!(error("disable_retries", &["maybe"]).contains("disable_retries"));
        assert!(error("trace_log", &["x"]).contains("enable_request_tracking, which is off"));
        assert!(
            error("trace_candidates", &["3"]).contains("enable_request_tracking, which is off")
        );
        assert!(error("trace_candidates", &["-2"]).contains("in -1.."));
        assert!(error("trace_log_keep", &["1000"]).contains("0..=999"));
        let origin = error("cors_allowed_origins", &["https://a.test/"]);
        assert!(
            origin.starts_with("cors_allowed_origins: bad value \"https://a.test/\""),
            "{origin}"
        );
        assert!(origin.contains("such as https://chat.example.org"), "{origin}");
    }

    #[test]
    fn a_key_is_shown_nowhere() {
        let keys = [setting("api_key", &["sesame"]), setting("admin_api_key", &["sesame-2"])];
        let shown = format!("{:?}", keywords(&keys).expect("keys"));
        assert!(shown.contains("api_key: Some((hidden))") && !shown.contains("sesame"), "{shown}");
        let toml = File::new("keys.toml", "port = 1\napi_key = sesame");
        let json = File::new("keys.json", r#"{"admin_api_key": "sesame "}"#);
        for (error, place) in [
            (keywords(&[setting("api_key", &["sesame sesame"])]), "api_key: bad value"),
            (command_line(&["--api-key", "sesame\t"], &[]), "--api-key"),
            (
                command_line(&[], &[("SGLANG_ROUTER__API_KEY", " sesame")]),
                "SGLANG_ROUTER__API_KEY: ",
            ),
            (command_line(&[&toml.flag()], &[]), "line 2, column 11"),
            (command_line(&[&json.flag()], &[]), "admin_api_key in "),
            (keywords(&[setting("api_key", &[""])]), "a key is 1 to 512 visible ASCII characters"),
            (command_line(&["--admin-api-key="], &[]), "a key is 1 to 512 visible ASCII"),
        ] {
            let error = error.expect_err(place);
            assert!(error.contains(place) && !error.contains("sesame"), "{error}");
        }
    }

    #[test]
    fn lists_maps_and_empty_lists() {
        let urls = setting("worker_urls", &["http://a:1", "http://b:2"]);
        let names = setting("node_ids", &["http://a:1=left"]);
        let options = keywords(&[urls, names]).expect("options");
        assert_eq!(options.workers.worker_urls.len(), 2);
        assert_eq!(options.workers.node_ids[0].1, "left");
        assert!(
            keywords(&[setting("worker_urls", &[])]).expect("none").workers.worker_urls.is_empty()
        );
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let file =
            File::new("a.toml", "port = 1\nhost = \"h\"\nseed = 7\nworker_urls = ['http://f:1']");
        let environment = [
            ("SGLANG_ROUTER__PORT", "2"),
            ("SGLANG_ROUTER__HOST", "e"),
            ("SGLANG_ROUTER_PORT", "tcp://10.0.0.1:80"),
            ("SGLANG_ROUTER__WORKER_URLS", "http://e:1, http://e:2"),
        ];
        let options = command_line(&["--port", "3", &file.flag()], &environment).expect("options");
        assert_eq!((options.server.port, options.server.host.as_str()), (3, "e"));
        assert_eq!(options.routing.seed, Some(7));
        let urls: Vec<_> = options.workers.worker_urls.iter().map(ToString::to_string).collect();
        assert_eq!(urls, ["http://e:1", "http://e:2"]);
    }

    #[test]
    fn a_file_may_be_json_and_its_errors_name_it() {
        let file = File::new("b.json", r#"{"port": 5, "node_ids": {"http://a:1": "x"}}"#);
        let options = command_line(&[&file.flag()], &[]).expect("options");
        assert_eq!((options.server.port, options.workers.node_ids[0].1.as_str()), (5, "x"));
        let bad = File::new("c.json", r#"{"port": 70000}"#);
        let error = command_line(&[&bad.flag()], &[]).expect_err("range");
        assert!(
            error.contains("port in ") && error.contains("c.json") && error.contains("0..=65535")
        );
        let other = File::new("e.toml", "config = 'x.toml'");
        assert!(command_line(&[&other.flag()], &[]).expect_err("other").contains("another one"));
        let nested = File::new("d.toml", "[port]\nx = [1]");
        assert!(command_line(&[&nested.flag()], &[]).expect_err("nested").contains("flat"));
        assert!(
            command_line(&["--config=/nowhere.toml"], &[])
                .expect_err("none")
                .contains("/nowhere.toml")
        );
    }

    #[test]
    fn options_are_checked_against_each_other_when_all_sources_have_spoken() {
        let weights = [("SGLANG_ROUTER__WORKER_WEIGHTS", "http://w:1=2")];
        assert!(command_line(&["--worker-urls", "http://w:1"], &weights).is_ok());
        let error = command_line(&["--worker-urls", "http://v:1"], &weights).expect_err("stranger");
        assert!(error.contains("not one of worker_urls"), "{error}");
        for name in ["trace_prompt_blocks", "trace_candidates", "trace_log"] {
            let flag = format!("--{}=1", name.replace('_', "-"));
            let error = command_line(&[&flag], &[]).expect_err("nothing is traced");
            assert!(error.contains(name) && error.contains("enable_request_tracking"), "{error}");
        }
    }

    #[test]
    fn only_variables_of_the_router_have_to_be_text() {
        use std::os::unix::ffi::OsStringExt;
        let odd = OsString::from_vec(vec![0xff]);
        assert_eq!(from_environment([("X".into(), odd.clone())].into_iter()), Ok(vec![]));
        let ours = ("SGLANG_ROUTER__HOST".into(), odd);
        let error = from_environment([ours].into_iter()).expect_err("not text").to_string();
        assert!(error.contains("SGLANG_ROUTER__HOST") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn an_environment_variable_with_a_wrong_name_or_value_is_named() {
        let error = command_line(&[], &[("SGLANG_ROUTER__PROT", "1")]).expect_err("name");
        assert!(error.contains("SGLANG_ROUTER__PROT") && error.contains("port"), "{error}");
        let error = command_line(&[], &[("SGLANG_ROUTER__PORT", "x")]).expect_err("value");
        assert!(error.starts_with("SGLANG_ROUTER__PORT: bad value"), "{error}");
    }

    #[test]
    fn booleans_stand_alone_or_with_a_value() {
        let is_on = |flags: &[&str]| {
            command_line(flags, &[]).expect("flags").tracking.enable_request_tracking
        };
        assert!(is_on(&["--enable-request-tracking"]));
        assert!(!is_on(&["--enable-request-tracking=false"]));
        assert!(is_on(&["--enable-request-tracing"]));
        assert!(
            !is_on(&["--enable-request-tracking", "--enable-request-tracking=false"]),
            "the last wins"
        );
    }

    #[test]
    fn shapes() {
        let shape = |name: &str| {
            described().into_iter().find(|option| option.name == name).map(|option| option.shape)
        };
        assert_eq!(shape("port"), Some(Shape::Integer));
        assert_eq!(shape("seed"), Some(Shape::Integer));
        assert_eq!(shape("max_tree_size"), Some(Shape::Integer));
        assert_eq!(shape("cache_threshold"), Some(Shape::Number));
        assert_eq!(shape("policy"), Some(Shape::Text));
        assert_eq!(shape("disable_retries"), Some(Shape::Boolean));
        assert_eq!(shape("worker_urls"), Some(Shape::List));
        assert_eq!(shape("worker_weights"), Some(Shape::Map));
    }
}
