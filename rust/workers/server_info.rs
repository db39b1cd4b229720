//! What a worker says about itself on `/server_info`. Every field may be missing.

use serde::Deserialize;
use serde_json::Value;

use crate::routing::KV_TOKENS_MAX;

/// A longer model name is taken for nonsense.
const NAME_BYTES_MAX: usize = 1024;
/// So are longer start-up times.
const STARTUP_TIME_BYTES_MAX: usize = 4096;

/// A worker's own words, as far as the router uses them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServerInfo {
    /// The name clients call the model by.
    pub model_id: Option<String>,
    pub base_gpu_id: Option<u64>,
    /// Size of its KV cache in tokens.
    pub kv_tokens: Option<u64>,
    /// What it says that is, if it cannot be.
    pub kv_tokens_nonsense: Option<String>,
    /// Drawn when the process started, unless an operator fixed it.
    random_seed: Option<i64>,
    /// How long each phase of the process's start took, as JSON: measured, so no two starts have the same.
    startup_time: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    served_model_name: Value,
    #[serde(default)]
    model_path: Value,
    #[serde(default)]
    base_gpu_id: Value,
    #[serde(default)]
    max_total_num_tokens: Value,
    #[serde(default)]
    random_seed: Value,
    #[serde(default)]
    startup_time: Value,
}

impl ServerInfo {
    /// Reads an answer; None where it is not a JSON object. A field of another type is unknown.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let answer: Answer = serde_json::from_slice(body).ok()?;
        let is_name = |text: &&str| text.len() <= NAME_BYTES_MAX;
        let text = |value: &Value| value.as_str().filter(is_name).map(str::to_owned);
        let kv_tokens = answer.max_total_num_tokens.as_u64();
        let kv_tokens = kv_tokens.filter(|tokens| (1..=KV_TOKENS_MAX).contains(tokens));
        let is_nonsense = kv_tokens.is_none() && !answer.max_total_num_tokens.is_null();
        let startup_time =
            (!answer.startup_time.is_null()).then(|| answer.startup_time.to_string());
        Some(Self {
            model_id: text(&answer.served_model_name).or_else(|| text(&answer.model_path)),
            base_gpu_id: answer.base_gpu_id.as_u64(),
            kv_tokens,
            kv_tokens_nonsense: is_nonsense
                .then(|| answer.max_total_num_tokens.to_string().chars().take(40).collect()),
            random_seed: answer.random_seed.as_i64(),
            startup_time: startup_time.filter(|text| text.len() <= STARTUP_TIME_BYTES_MAX),
        })
    }

    /// Whether it says anything that another process would not.
    pub fn names_its_process(&self) -> bool {
        self.random_seed.is_some() || self.startup_time.is_some()
    }

    /// Whether another process than the one of `earlier` says this. What either leaves out proves nothing.
    pub fn is_of_another_process(&self, earlier: &Self) -> bool {
        fn differ<T: PartialEq>(now: &Option<T>, earlier: &Option<T>) -> bool {
            now.is_some() && earlier.is_some() && now != earlier
        }
        differ(&self.random_seed, &earlier.random_seed)
            || differ(&self.startup_time, &earlier.startup_time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> ServerInfo {
        ServerInfo::parse(body.as_bytes()).expect("an object")
    }

    #[test]
    fn what_is_said_is_read_and_what_is_not_is_unknown() {
        let info = parse(r#"{"model_path":"m","base_gpu_id":2,"max_total_num_tokens":9,"x":[]}"#);
        assert_eq!(info.model_id.as_deref(), Some("m"));
        assert_eq!((info.base_gpu_id, info.kv_tokens), (Some(2), Some(9)));
        let odd = r#"{"base_gpu_id":-1,"max_total_num_tokens":"many","served_model_name":5,"random_seed":[]}"#;
        let kv_tokens_nonsense = Some(r#""many""#.to_owned());
        assert_eq!(parse(odd), ServerInfo { kv_tokens_nonsense, ..ServerInfo::default() });
        assert_eq!(ServerInfo::parse(b"nope"), None);
    }

    #[test]
    fn a_kv_cache_has_a_size_that_can_be() {
        for nonsense in ["0", "-5", "1.5", "1e300", "1099511627777", "[]"] {
            let info = parse(&format!(r#"{{"max_total_num_tokens":{nonsense}}}"#));
            assert!(info.kv_tokens.is_none() && info.kv_tokens_nonsense.is_some(), "{nonsense}");
        }
        let info = parse(r#"{"max_total_num_tokens":1099511627776}"#);
        assert_eq!((info.kv_tokens, info.kv_tokens_nonsense), (Some(1 << 40), None));
        assert_eq!(parse(r#"{"max_total_num_tokens":null}"#).kv_tokens_nonsense, None);
    }

    #[test]
    fn a_process_is_told_by_its_seed_and_by_how_long_its_start_took() {
        let first =
            parse(r#"{"random_seed":7,"startup_time":{"load_weight":1.5,"scheduler_e2e":2.5}}"#);
        let same =
            parse(r#"{"startup_time":{"scheduler_e2e":2.5,"load_weight":1.5},"random_seed":7}"#);
        assert!(!same.is_of_another_process(&first));
        for other in [
            r#"{"random_seed":8,"startup_time":{"load_weight":1.5,"scheduler_e2e":2.5}}"#,
            r#"{"random_seed":7,"startup_time":{"load_weight":1.6,"scheduler_e2e":2.5}}"#,
            r#"{"random_seed":8}"#,
        ] {
            assert!(parse(other).is_of_another_process(&first), "{other}");
        }
    }

    #[test]
    fn what_is_left_out_proves_nothing() {
        let known = parse(r#"{"random_seed":7,"startup_time":{"load_weight":1.5}}"#);
        let long = format!(r#"{{"random_seed":7,"startup_time":"{}"}}"#, "x".repeat(5000));
        for silent in ["{}", r#"{"random_seed":7}"#, r#"{"random_seed":null}"#, &long] {
            assert!(!parse(silent).is_of_another_process(&known), "{silent}");
            assert!(!known.is_of_another_process(&parse(silent)), "{silent}");
        }
    }
}
