"""Every column of a run's CSV, in its order, with its unit and its meaning. ``docs/results.md`` is made of this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column; ``source`` is whose word it is: schedule, client, answer or trace."""

    name: str
    unit: str
    source: str
    meaning: str

    @property
    def kind(self) -> str:
        """The pandas type that holds it; every one of them knows a missing value."""
        return _KINDS.get(self.name) or _KINDS_BY_UNIT.get(self.unit, "string")


def _columns(source: str, *rows: tuple[str, str, str]) -> tuple[Column, ...]:
    return tuple(Column(name, unit, source, meaning) for name, unit, meaning in rows)


_BY_NAME = {
    column.name: column
    for column in (
        *_columns(
            "schedule",
            ("req_id", "", "the request's id, sent as `x-request-id`"),
            (
                "input_length",
                "tokens",
                "length of the prompt as the dataset has it: drawn, counted by the tokenizer, or the trace's own. "
                "Empty where nobody counted it. What the worker counted is `prompt_tokens`",
            ),
            ("arrival_time", "s", "when the request was scheduled to arrive"),
        ),
        *_columns(
            "client",
            ("to_server_time", "s", "when the request's head was written to its connection"),
            ("finish_time", "s", "when the last byte of the answer was read, or the request failed"),
            ("server_latency", "s", "`finish_time` - `to_server_time`"),
            ("total_latency", "s", "`finish_time` - `arrival_time`"),
            ("ttft", "s", "first content of the stream - `to_server_time`; empty unless streamed"),
            (
                "queue_time",
                "s",
                "`to_server_time` - `arrival_time`: how late it was sent, with the wait for a place of "
                "`--max-concurrency`. What it waited at the worker is `sglang_queue_time`",
            ),
            (
                "itl_mean",
                "s",
                "mean time between two tokens: (last content - first content) / (`completion_tokens` - 1); "
                "empty unless streamed with two tokens or more",
            ),
            (
                "itl_p99",
                "s",
                "99th percentile of the gaps between frames with content; where the worker says how many tokens came, "
                "k tokens of one frame count as k gaps of a k-th each",
            ),
            ("success", "", "`True` if the answer was a 2xx and came whole"),
            ("error", "", "what went wrong; empty for a success"),
            ("http_status", "", "status of the answer; empty if there was none"),
        ),
        *_columns(
            "answer",
            (
                "decode_length",
                "tokens",
                "tokens received, by the last count that the answer gave, also of one that broke off; empty if "
                "it gave none",
            ),
            ("prompt_tokens", "tokens", "tokens of the prompt as the worker counted them"),
            ("cached_tokens", "tokens", "those found in the worker's cache; empty if it does not report them"),
            ("completion_tokens", "tokens", "tokens of the answer as the worker counted them at its end"),
        ),
        *_columns(
            "client",
            (
                "worker_url",
                "",
                "the worker that served it: header `x-sglang-worker`, checked against the trace and the answer; empty "
                "if it was refused before a worker was picked",
            ),
        ),
        *_columns(
            "trace",
            ("node_id", "", "the worker's name"),
            ("gpu_id", "", "the trace's `node_id` once more, under the name that analysis scripts know"),
            ("routing_policy", "", "the policy"),
            ("trace_status", "", "`completed` or `failed`, as the router saw it"),
            ("reason", "", "why the policy picked this worker"),
            (
                "matched_tokens",
                "tokens",
                "prefix that the policy expected in the worker's cache; empty without a prefix tree",
            ),
            ("attempts", "", "workers it was sent to"),
            ("router_queue_ms", "ms", "arrival at the router until admission"),
            (
                "router_ttft_ms",
                "ms",
                "arrival at the router until the first frame with content passed; empty unless streamed",
            ),
            ("router_latency_ms", "ms", "arrival at the router until the last byte passed"),
        ),
    )
}

# The order is the contract with scripts that read the file.
COLUMNS = tuple(
    _BY_NAME[name]
    for name in [
        "req_id",
        "input_length",
        "decode_length",
        "arrival_time",
        "to_server_time",
        "finish_time",
        "server_latency",
        "total_latency",
        "ttft",
        "queue_time",
        "itl_mean",
        "itl_p99",
        "success",
        "error",
        "http_status",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "worker_url",
        "node_id",
        "gpu_id",
        "routing_policy",
        "trace_status",
        "reason",
        "matched_tokens",
        "attempts",
        "router_queue_ms",
        "router_ttft_ms",
        "router_latency_ms",
    ]
)
NAMES = tuple(column.name for column in COLUMNS)

# How values are held; all others are text.
_KINDS = {"success": "boolean", "http_status": "Int64", "attempts": "Int64"}
_KINDS_BY_UNIT = {"tokens": "Int64", "s": "Float64", "ms": "Float64"}

# What SGLang tells of itself in `meta_info` comes after the columns, under this prefix.
STAMP_PREFIX = "sglang_"
# Its stamps, by the ends of their names.
STAMP_ENDS = ("_time", "_ts", "_latency", "_delay", "_duration", "_throughput")
