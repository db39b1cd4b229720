//! What a worker says about itself on `/get_server_info`. Every field may be missing.

use serde::Deserialize;
use serde_json::Value;

/// A longer model name is taken for nonsense.
const NAME_BYTES_MAX: usize = 1024;

/// A worker's own words, as far as the router uses them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServerInfo {
    /// The name clients call the model by.
    pub model_id: Option<String>,
    pub base_gpu_id: Option<u64>,
    /// Size of its KV cache in tokens.
    pub kv_tokens: Option<u64>,
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
}

impl ServerInfo {
    /// Reads an answer; None where it is not a JSON object. A field of another type is unknown.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let answer: Answer = serde_json::from_slice(body).ok()?;
        let is_name = |text: &&str| text.len() <= NAME_BYTES_MAX;
        let text = |value: &Value| value.as_str().filter(is_name).map(str::to_owned);
        Some(Self {
            model_id: text(&answer.served_model_name).or_else(|| text(&answer.model_path)),
            base_gpu_id: answer.base_gpu_id.as_u64(),
            kv_tokens: answer.max_total_num_tokens.as_u64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_and_what_is_not_is_unknown() {
        let body = br#"{"model_path":"m","base_gpu_id":2,"max_total_num_tokens":9,"x":[]}"#;
        let info = ServerInfo::parse(body).expect("object");
        assert_eq!(info.model_id.as_deref(), Some("m"));
        assert_eq!((info.base_gpu_id, info.kv_tokens), (Some(2), Some(9)));
        let odd = br#"{"base_gpu_id":-1,"max_total_num_tokens":"many","served_model_name":5}"#;
        assert_eq!(ServerInfo::parse(odd), Some(ServerInfo::default()));
        assert_eq!(ServerInfo::parse(b"nope"), None);
    }
}
