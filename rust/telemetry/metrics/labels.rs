//! The sets of labels, each declared once: the type, and the names that the documentation shows.
//!
//! Every value is bounded: routes, policies, reasons, statuses and causes are those declared, workers those known,
//! models at most [`super::MODELS_MAX`] and one for all others.

use std::fmt;
use std::fmt::Write;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

/// A set of labels that knows their names.
pub trait Labels {
    const NAMES: &'static [&'static str];
}

macro_rules! labels {
    ($($(#[$doc:meta])* $set:ident { $($(#[$label_doc:meta])* $label:ident: $type:ty,)* })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
        pub struct $set { $($(#[$label_doc])* pub $label: $type,)* }

        impl Labels for $set {
            const NAMES: &'static [&'static str] = &[$(stringify!($label)),*];
        }
    )* };
}

labels! {
    RouteLabels { method: &'static str, path: Text, }

    StatusLabels {
        status_code: u16,
        /// The router's own error code, empty for a worker's answer.
        error_code: &'static str,
    }

    ResultLabels { result: &'static str, }

    RequestLabels {
        router_type: Http,
        backend_type: Regular,
        connection_mode: Http,
        model: Text,
        endpoint: &'static str,
        streaming: bool,
    }

    RequestErrorLabels {
        router_type: Http,
        backend_type: Regular,
        connection_mode: Http,
        model: Text,
        endpoint: &'static str,
        error_type: &'static str,
    }

    RequestDurationLabels {
        router_type: Http,
        backend_type: Regular,
        connection_mode: Http,
        model: Text,
        endpoint: &'static str,
    }

    UpstreamLabels { router_type: Http, status_code: u16, }

    GenerationLabels {
        router_type: Http,
        backend_type: Regular,
        model: Text,
        endpoint: &'static str,
    }

    TokenLabels {
        router_type: Http,
        backend_type: Regular,
        model: Text,
        endpoint: &'static str,
        token_type: &'static str,
    }

    PickLabels {
        worker_type: Regular,
        connection_mode: Http,
        model: Text,
        policy: &'static str,
    }

    ReasonLabels { policy: &'static str, reason: &'static str, }

    WorkerErrorLabels { worker_type: Regular, connection_mode: Http, error_type: &'static str, }

    RetryLabels { worker_type: Regular, endpoint: &'static str, }

    BackoffLabels {
        /// The attempt that follows the pause: 2 and up.
        attempt: u32,
    }

    CauseLabels { cause: &'static str, }

    WorkerLabels { worker: Text, }

    WorkerStateLabels { worker: Text, node_id: Text, state: &'static str, }

    PoolLabels { worker_type: Regular, connection_mode: Http, model: Text, }

    CheckLabels { worker_type: Regular, result: &'static str, }

    TransitionLabels { worker: Text, from: &'static str, to: &'static str, }

    OutcomeLabels { worker: Text, outcome: &'static str, }

    BuildLabels { version: &'static str, policy: &'static str, }
}

/// The value of `router_type` and `connection_mode`: the router speaks HTTP on both sides.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Http;

impl EncodeLabelValue for Http {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str("http")
    }
}

/// The value of `backend_type` and `worker_type`: no worker does prefill or decode alone.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Regular;

impl EncodeLabelValue for Regular {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str("regular")
    }
}

/// A text that others chose, escaped as the format asks.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Text(pub Arc<str>);

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl EncodeLabelValue for Text {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|letter| match letter {
            '\\' => encoder.write_str("\\\\"),
            '"' => encoder.write_str("\\\""),
            '\n' => encoder.write_str("\\n"),
            letter => encoder.write_char(letter),
        })
    }
}
