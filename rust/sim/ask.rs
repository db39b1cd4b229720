//! Reading a request: what its JSON body asks of the model.
//!
//! The one idea: every endpoint's body comes down to prompts in tokens and a number of tokens to
//! generate. Fields that change neither are passed over, as a look-alike has no use for them; those
//! that do are checked, and an error names field, value and range.

use std::fmt::Display;

use serde_json::Value;

use super::tokens::{self, MAX_OUTPUT_TOKENS};

/// Tokens to generate when a request does not say.
const DEFAULT_OUTPUT_TOKENS: usize = 128;

/// The most parts (prompts times samples) of one request.
pub const MAX_PARTS: usize = 4096;

/// The most tokens that all answers of one request have together.
pub const MAX_TOKENS: usize = 4 << 20;

/// What a request asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ask {
    /// The prompts, in tokens.
    pub prompts: Vec<Vec<u32>>,
    /// Whether the prompts came as a list.
    pub is_list: bool,
    /// Answers to each prompt.
    pub samples: usize,
    /// Tokens in each answer.
    pub output_tokens: usize,
}

/// Why a body cannot be served, in words for the client.
pub type BadAsk = String;

impl Ask {
    fn new(
        (prompts, is_list): (Vec<Vec<u32>>, bool),
        samples: usize,
        output_tokens: usize,
    ) -> Self {
        Self { prompts, is_list, samples, output_tokens }
    }

    /// The prompt of each part: each prompt as often as it has answers.
    pub fn parts(&self) -> Result<Vec<Vec<u32>>, BadAsk> {
        let parts = self.prompts.len().saturating_mul(self.samples);
        if parts > MAX_PARTS {
            return Err(format!("a request may have at most {MAX_PARTS} answers, got {parts}"));
        }
        if parts.saturating_mul(self.output_tokens) > MAX_TOKENS {
            let asked = parts.saturating_mul(self.output_tokens);
            return Err(format!("a request may ask for {MAX_TOKENS} tokens in all, got {asked}"));
        }
        let repeat = |prompt| std::iter::repeat_n(prompt, self.samples);
        Ok(self.prompts.iter().flat_map(repeat).cloned().collect())
    }
}

/// `/generate`: `text` or `input_ids`, one or a list, and `sampling_params`.
pub fn generate(body: &Value) -> Result<Ask, BadAsk> {
    let params = &body["sampling_params"];
    if !params.is_null() && !params.is_object() {
        return Err("sampling_params must be an object".into());
    }
    let output_tokens = output_tokens(params, &["max_new_tokens"])?;
    Ok(Ask::new(native_prompts(body)?, samples(params)?, output_tokens))
}

/// `/encode` and `/classify`: prompts as for `/generate`, nothing to generate.
pub fn encode(body: &Value) -> Result<Ask, BadAsk> {
    Ok(Ask::new(native_prompts(body)?, 1, 0))
}

/// `/v1/completions`: `prompt`.
pub fn completions(body: &Value) -> Result<Ask, BadAsk> {
    let output_tokens = output_tokens(body, &["max_tokens"])?;
    Ok(Ask::new(prompts(body, "prompt")?, samples(body)?, output_tokens))
}

/// `/v1/chat/completions`: `messages`.
pub fn chat(body: &Value) -> Result<Ask, BadAsk> {
    let output_tokens = output_tokens(body, &["max_completion_tokens", "max_tokens"])?;
    let prompt = conversation(&Value::Null, &body["messages"], "messages")?;
    Ok(Ask::new((vec![prompt], false), samples(body)?, output_tokens))
}

/// `/v1/messages`: `system` and `messages`.
pub fn messages(body: &Value) -> Result<Ask, BadAsk> {
    let output_tokens = output_tokens(body, &["max_tokens"])?;
    let prompt = conversation(&body["system"], &body["messages"], "messages")?;
    Ok(Ask::new((vec![prompt], false), 1, output_tokens))
}

/// `/v1/responses`: `instructions` and `input`, a string or a list of messages.
pub fn responses(body: &Value) -> Result<Ask, BadAsk> {
    let output_tokens = output_tokens(body, &["max_output_tokens"])?;
    let prompt = match &body["input"] {
        Value::String(text) => {
            let message = serde_json::json!([{"role": "user", "content": text}]);
            conversation(&body["instructions"], &message, "input")?
        }
        input => conversation(&body["instructions"], input, "input")?,
    };
    Ok(Ask::new((vec![prompt], false), 1, output_tokens))
}

/// `/v1/embeddings` and `/v1/classify`: `input`.
pub fn input(body: &Value) -> Result<Ask, BadAsk> {
    Ok(Ask::new(prompts(body, "input")?, 1, 0))
}

/// `/v1/score`: `query` with each of `items`.
pub fn score(body: &Value) -> Result<Ask, BadAsk> {
    pairs(body, "items")
}

/// `/v1/rerank`: `query` with each of `documents`.
pub fn rerank(body: &Value) -> Result<Ask, BadAsk> {
    pairs(body, "documents")
}

/// The token lists in `tokens`: one, or a list of them (then true).
pub fn token_lists(body: &Value) -> Result<(Vec<Vec<u32>>, bool), BadAsk> {
    match body["tokens"].as_array() {
        Some(items) if items.first().is_some_and(Value::is_array) => {
            let lists = items.iter().map(|item| token_ids(item.as_array(), "tokens"));
            Ok((lists.collect::<Result<_, _>>()?, true))
        }
        items => Ok((vec![token_ids(items, "tokens")?], false)),
    }
}

/// The prompts in field `name`: a string, token ids, or a list of those (then true).
pub fn prompts(body: &Value, name: &str) -> Result<(Vec<Vec<u32>>, bool), BadAsk> {
    match &body[name] {
        Value::Null => Err(format!("{name} is required")),
        Value::String(text) => Ok((vec![tokens::encode(text)], false)),
        Value::Array(items) if items.first().is_none_or(Value::is_number) => {
            Ok((vec![token_ids(Some(items), name)?], false))
        }
        Value::Array(items) => {
            let one = |item: &Value| match item {
                Value::Array(ids) if ids.first().is_some_and(Value::is_number) => {
                    token_ids(Some(ids), name)
                }
                item => Ok(tokens::encode(&text_of(item))),
            };
            Ok((items.iter().map(one).collect::<Result<_, _>>()?, true))
        }
        _ => Err(format!("{name} must be a string, a list of token ids, or a list of those")),
    }
}

fn native_prompts(body: &Value) -> Result<(Vec<Vec<u32>>, bool), BadAsk> {
    match ["text", "input_ids"].into_iter().find(|name| !body[*name].is_null()) {
        Some(name) => prompts(body, name),
        None => Err("Either text, input_ids or input_embeds should be provided.".into()),
    }
}

fn pairs(body: &Value, name: &str) -> Result<Ask, BadAsk> {
    let query = text_of(&body["query"]);
    match body[name].as_array() {
        Some(items) if !items.is_empty() => {
            let pair = |item| tokens::encode(&format!("{query}\n{}", text_of(item)));
            Ok(Ask::new((items.iter().map(pair).collect(), true), 1, 0))
        }
        _ => Err(format!("{name} must be a list that is not empty")),
    }
}

/// A conversation in tokens. Each piece starts at a token border, as with a real chat template, so
/// that the worker's answer, sent back in the next turn, consists of the tokens it generated.
fn conversation(system: &Value, messages: &Value, name: &str) -> Result<Vec<u32>, BadAsk> {
    let messages = match messages.as_array() {
        Some(messages) if !messages.is_empty() => messages,
        _ => {
            return Err(format!("{name} must be a list of messages that is not empty"));
        }
    };
    let mut prompt = Vec::new();
    if !system.is_null() {
        prompt.extend(tokens::encode("<|system|>"));
        prompt.extend(tokens::encode(&text_of(system)));
    }
    for message in messages {
        let role = message["role"].as_str().unwrap_or("user");
        prompt.extend(tokens::encode(&format!("<|{role}|>")));
        prompt.extend(tokens::encode(&text_of(&message["content"])));
    }
    prompt.extend(tokens::encode("<|assistant|>"));
    Ok(prompt)
}

/// The text of a message's content: itself, its parts' texts, or its JSON (images and the like).
fn text_of(content: &Value) -> String {
    match content {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(text_of).collect(),
        other => other["text"].as_str().map_or_else(|| other.to_string(), str::to_owned),
    }
}

fn token_ids(items: Option<&Vec<Value>>, name: &str) -> Result<Vec<u32>, BadAsk> {
    let items = items.filter(|items| !items.is_empty());
    let items = items.ok_or_else(|| format!("{name} must be a list that is not empty"))?;
    let token_id = |item: &Value| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("{name} must hold token ids from 0 to {}, got {item}", u32::MAX))
    };
    items.iter().map(token_id).collect()
}

fn samples(params: &Value) -> Result<usize, BadAsk> {
    match &params["n"] {
        Value::Null => Ok(1),
        n => integer("n", n, 1, format_args!("at least 1")),
    }
}

/// Tokens to generate, from the first of these fields that is there.
fn output_tokens(params: &Value, names: &[&str]) -> Result<usize, BadAsk> {
    match names.iter().find(|name| !params[**name].is_null()) {
        None => Ok(DEFAULT_OUTPUT_TOKENS),
        Some(name) => {
            let count = integer(name, &params[*name], 0, format_args!("at least 0"))?;
            Ok(count.min(MAX_OUTPUT_TOKENS))
        }
    }
}

fn integer(name: &str, value: &Value, min: usize, range: impl Display) -> Result<usize, BadAsk> {
    let integer = value.as_u64().map(|integer| usize::try_from(integer).unwrap_or(usize::MAX));
    integer
        .filter(|integer| *integer >= min)
        .ok_or_else(|| format!("{name} must be an integer of {range}, got {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn prompts_come_in_four_forms() {
        let read = |text| generate(&json!({"text": text})).map(|ask| (ask.prompts, ask.is_list));
        let ids = |ids| generate(&json!({"input_ids": ids})).map(|ask| (ask.prompts, ask.is_list));
        let abcd = tokens::encode("abcd");
        assert_eq!(read(json!("abcd")), Ok((vec![abcd.clone()], false)));
        assert_eq!(read(json!(["abcd", "abcd"])), Ok((vec![abcd.clone(), abcd], true)));
        assert_eq!(ids(json!([1, 2])), Ok((vec![vec![1, 2]], false)));
        assert_eq!(ids(json!([[1], [2, 3]])), Ok((vec![vec![1], vec![2, 3]], true)));
    }

    #[test]
    fn the_number_of_tokens_has_a_default_and_a_limit() {
        let read = |params| generate(&json!({"text": "a", "sampling_params": params}));
        assert_eq!(read(json!(null)).unwrap().output_tokens, 128);
        assert_eq!(read(json!({"max_new_tokens": 7})).unwrap().output_tokens, 7);
        assert_eq!(
            read(json!({"max_new_tokens": u64::MAX})).unwrap().output_tokens,
            MAX_OUTPUT_TOKENS
        );
        let chat = |name: &str| chat(&json!({"messages": [{"content": "a"}], name: 9}));
        assert_eq!(chat("max_tokens").unwrap().output_tokens, 9);
        assert_eq!(chat("max_completion_tokens").unwrap().output_tokens, 9);
    }

    #[test]
    fn a_bad_field_is_named() {
        let error = |body: Value| generate(&body).unwrap_err();
        assert!(error(json!({})).contains("text, input_ids"));
        assert!(error(json!({"text": 7})).contains("text must be"));
        assert!(error(json!({"input_ids": []})).contains("not empty"));
        assert!(error(json!({"input_ids": [1, -2]})).contains("got -2"));
        let params = |params: Value| error(json!({"text": "a", "sampling_params": params}));
        assert!(params(json!({"max_new_tokens": -1})).contains("max_new_tokens"));
        assert!(params(json!({"n": 0})).contains("n must be an integer of at least 1, got 0"));
        assert!(params(json!([])).contains("must be an object"));
        assert!(chat(&json!({"messages": "hello"})).unwrap_err().contains("messages"));
        assert!(completions(&json!({})).unwrap_err().contains("prompt is required"));
        assert!(rerank(&json!({"query": "a"})).unwrap_err().contains("documents"));
    }

    #[test]
    fn parts_are_prompts_times_samples_up_to_a_limit() {
        let ask = Ask { prompts: vec![vec![1], vec![2]], samples: 2, ..Ask::default() };
        assert_eq!(ask.parts().unwrap(), [vec![1], vec![1], vec![2], vec![2]]);
        let ask = Ask { samples: usize::MAX, ..ask };
        assert!(ask.parts().unwrap_err().contains("4096"));
        let ask = Ask { samples: 40, output_tokens: 131_072, ..ask };
        assert!(ask.parts().unwrap_err().contains("4194304"));
    }

    #[test]
    fn the_next_turn_begins_with_prompt_and_answer() {
        let (answer, ids) = tokens::output(10);
        let mut said = vec![json!({"role": "user", "content": "Hi!"})];
        let mut first = chat(&json!({"messages": said})).unwrap().prompts.remove(0);
        said.push(json!({"role": "assistant", "content": answer}));
        said.push(json!({"role": "user", "content": [{"type": "text", "text": "More"}]}));
        let second = chat(&json!({"messages": said})).unwrap().prompts.remove(0);
        first.extend(ids);
        assert!(second.starts_with(&first));
    }
}
