"""A run's results: one row per request, what they amount to, and the files they are kept in."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .attribution import Disagreement, Row
from .columns import COLUMNS, STAMP_PREFIX
from .exchange import Exchange

# A microsecond: finer than the clock of an event loop.
_DECIMALS = "%.6f"


# The clients' measures that a summary describes, in seconds.
_MEASURES = ("ttft", "itl_mean", "server_latency", "total_latency", "queue_time")
_ROUTER_MEASURES = ("router_queue_ms", "router_ttft_ms", "router_latency_ms")

CUMULATIVE_COLUMNS = ("time", "node_id", "finished", "PREFILL_THROUGHPUT", "DECODE_THROUGHPUT", "AVG_LATENCY")
SYSTEM = "system"

DECISION_COLUMNS = (
    "req_id",
    "routing_policy",
    "reason",
    "worker_url",
    "node_id",
    "chosen",
    "in_flight",
    "matched_tokens",
    "pending_tokens",
    "speed",
    "same_prefix",
    "score",
)
_ERRORS_SHOWN = 5


def row(exchange: Exchange) -> Row:
    """What the client knows of a request, as a row; the worker is the header's."""
    sent, finished, arrived = exchange.sent_at, exchange.finished_at, exchange.request.arrival_time
    made: Row = {
        "req_id": exchange.request_id,
        "input_length": exchange.request.input_length,
        "decode_length": exchange.tokens_received,
        "arrival_time": arrived,
        "to_server_time": sent,
        "finish_time": finished,
        "server_latency": _between(sent, finished),
        "total_latency": _between(arrived, finished),
        "ttft": _between(sent, exchange.first_content_at),
        "queue_time": _between(arrived, sent),
        "itl_mean": _token_gap(exchange),
        "itl_p99": _gap_p99(exchange.gaps),
        "success": exchange.succeeded,
        "error": exchange.error or None,
        "http_status": exchange.http_status,
        "prompt_tokens": exchange.prompt_tokens,
        "cached_tokens": exchange.cached_tokens,
        "completion_tokens": exchange.completion_tokens,
        "worker_url": exchange.header_worker,
    }
    made.update((STAMP_PREFIX + name, value) for name, value in sorted(exchange.stamps.items()))
    return made


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


def _token_gap(exchange: Exchange) -> float | None:
    """The mean time from one token to the next; unknown if all came in one frame."""
    tokens = exchange.completion_tokens
    if not exchange.gaps or tokens is None or tokens < 2:
        return None
    return sum(gap for gap, _ in exchange.gaps) / (tokens - 1)


def _gap_p99(gaps: Sequence[tuple[float, int]]) -> float | None:
    """The 99th percentile of the time per token, k tokens that came together counting as k."""
    if not gaps:
        return None
    seconds, tokens = np.array([gap for gap, _ in gaps]), np.array([max(1, count) for _, count in gaps])
    return float(np.percentile(np.repeat(seconds / tokens, tokens), 99))


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table: the columns in their order, SGLang's stamps by name, then what an analysis has added."""
    given = dict.fromkeys(name for row in rows for name in row)
    stamps = sorted(name for name in given if name.startswith(STAMP_PREFIX))
    kinds = {column.name: column.kind for column in COLUMNS} | dict.fromkeys(stamps, "Float64")
    table = {name: pd.array([row.get(name) for row in rows], dtype=kind) for name, kind in kinds.items()}  # type: ignore[call-overload]
    added = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in given if name not in kinds}
    return pd.DataFrame({**table, **{name: values.convert_dtypes() for name, values in added.items()}})


def described(values: pd.Series[Any]) -> dict[str, float | int | None]:
    """Mean, median, p95, p99 and how many they are of; ``None`` without values."""
    known = values.dropna().to_numpy(dtype=float)
    if not len(known):
        return {"count": 0, "mean": None, "median": None, "p95": None, "p99": None}
    median, p95, p99 = (float(value) for value in np.percentile(known, [50, 95, 99]))
    return {"count": len(known), "mean": float(known.mean()), "median": median, "p95": p95, "p99": p99}


def succeeded(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of requests that succeeded."""
    return rows[rows["success"].fillna(False).astype(bool)]


def tokens(rows: pd.DataFrame, name: str) -> int | None:
    """Sum of a column of counts, of the requests that succeeded; ``None`` if one of them is not known."""
    counts = succeeded(rows)[name]
    return None if counts.isna().any() else int(counts.sum())


def hit_rate(rows: pd.DataFrame) -> float | None:
    """Cached prompt tokens / prompt tokens of the requests that succeeded; ``None`` if a count is not known."""
    prompt, cached = tokens(rows, "prompt_tokens"), tokens(rows, "cached_tokens")
    return cached / prompt if prompt and cached is not None else None


def part(rows: pd.DataFrame, duration_secs: float) -> dict[str, Any]:
    """What some requests amount to; rates are over the duration of the whole run."""
    good = succeeded(rows)
    counts = {name: tokens(rows, f"{name}_tokens") for name in ("prompt", "cached", "completion")}
    return {
        "requests": {"total": len(rows), "succeeded": len(good), "failed": len(rows) - len(good)},
        "tokens": counts,
        "hit_rate": hit_rate(rows),
        "rates": {
            "requests_per_sec": _rate(len(good), duration_secs),
            "prompt_tokens_per_sec": _rate(counts["prompt"], duration_secs),
            "completion_tokens_per_sec": _rate(counts["completion"], duration_secs),
        },
        "secs": {name: described(good[name]) for name in _MEASURES},
        "router_ms": {name: described(good[name]) for name in _ROUTER_MEASURES},
    }


def _rate(count: float | None, secs: float) -> float | None:
    return count / secs if count is not None and secs > 0 else None


def cumulative(rows: pd.DataFrame) -> pd.DataFrame:
    """Throughput and latency so far, at each request's end: a line for its node and one for the system.

    Throughputs are in tokens per second since the first arrival: tokens that the worker counted, prompt and answer.
    ``AVG_LATENCY`` is the mean ``total_latency`` in seconds of the requests that have succeeded so far. From the first
    request on whose tokens nobody told, a throughput is not known.
    """
    good = succeeded(rows).sort_values("finish_time", kind="stable")
    parts = [_running(good, SYSTEM), *(_running(its, str(node)) for node, its in good.groupby("node_id"))]
    table = pd.concat(parts)[list(CUMULATIVE_COLUMNS)]
    return table.sort_values("time", kind="stable", ignore_index=True)


def _running(good: pd.DataFrame, node: str) -> pd.DataFrame:
    time = good["finish_time"]
    finished = np.arange(1, len(good) + 1)
    return pd.DataFrame(
        {
            "time": time,
            "node_id": node,
            "finished": finished,
            "PREFILL_THROUGHPUT": good["prompt_tokens"].cumsum(skipna=False) / time,
            "DECODE_THROUGHPUT": good["completion_tokens"].cumsum(skipna=False) / time,
            "AVG_LATENCY": good["total_latency"].cumsum() / finished,
        }
    )


@dataclass
class Results:
    """What came of one run."""

    rows: list[Row]
    # How late the generator's event loop was each time it was looked at, in seconds.
    lags: Sequence[float] = ()
    disagreements: list[Disagreement] = field(default_factory=list)
    # Requests of the load; fewer were sent if it was interrupted.
    planned: int = 0
    interrupted: bool = False
    # What was run and where: goes into the summary as it is.
    about: dict[str, Any] = field(default_factory=dict)
    # The candidates of each pick, if they were asked for.
    decisions: list[Row] = field(default_factory=list)

    @property
    def table(self) -> pd.DataFrame:
        """The rows as a table."""
        return frame(self.rows)

    def summary(self) -> dict[str, Any]:
        """Counts, rates, and latencies in total and per node; ``None`` where nothing is known."""
        rows = self.table
        ends, sent = rows["finish_time"].dropna(), rows["to_server_time"].dropna()
        duration = float(ends.max() - sent.min()) if len(ends) and len(sent) else 0.0
        total = part(rows, duration)
        total["requests"] |= {
            "planned": self.planned,
            "unrouted": int(rows["worker_url"].isna().sum()),
            "errors": {str(text): int(count) for text, count in rows["error"].value_counts().items()},
        }
        nodes = {str(node): part(its, duration) for node, its in rows.groupby("node_id")}
        return {
            **self.about,
            "interrupted": self.interrupted,
            "duration_secs": duration,
            **total,
            "mean_in_flight": _rate(float(rows["server_latency"].sum()), duration),
            "arrivals": self._arrivals(rows),
            "wait_secs": _waits(rows),
            "nodes": nodes,
            "disagreements": [{"req_id": name, "problem": problem} for name, problem in self.disagreements],
        }

    def _arrivals(self, rows: pd.DataFrame) -> dict[str, Any]:
        """How the generator kept to its schedule."""
        planned, sent = rows["arrival_time"], rows["to_server_time"].dropna()
        late = rows["queue_time"].dropna()
        span = float(planned.max() - planned.min()) if len(planned) else 0.0
        sent_span = float(sent.max() - sent.min()) if len(sent) else 0.0
        return {
            "scheduled_span_secs": span,
            "achieved_span_secs": sent_span,
            "scheduled_per_sec": _rate(len(planned) - 1, span),
            "achieved_per_sec": _rate(len(sent) - 1, sent_span),
            "lateness_secs": {**described(late), "max": float(late.max()) if len(late) else None},
            "loop_lag_secs": described(pd.Series(self.lags, dtype=float)),
        }


def decisions(rows: Sequence[Row]) -> pd.DataFrame:
    """The file of decisions: one row per request and candidate."""
    return pd.DataFrame(rows, columns=list(DECISION_COLUMNS)).convert_dtypes()


def text(summary: dict[str, Any]) -> str:
    """A summary for the terminal."""
    requests, arrivals = summary["requests"], summary["arrivals"]
    errors = "".join(f"\n  {count} x {error}" for error, count in list(requests["errors"].items())[:_ERRORS_SHOWN])
    late = arrivals["lateness_secs"]
    lines = [
        f"{requests['total']} requests in {summary['duration_secs']:.2f} s: {requests['succeeded']} succeeded, "
        f"{requests['failed']} failed, {requests['unrouted']} without a worker{errors}",
        f"offered {_number(arrivals['scheduled_per_sec'])}/s, sent {_number(arrivals['achieved_per_sec'])}/s, "
        f"late by {_millis(late['median'])} ms (median), {_millis(late['p99'])} (p99), {_millis(late['max'])} (most)",
        "",
        _nodes(summary).to_string(),
    ]
    return "\n".join(lines)


def _nodes(summary: dict[str, Any]) -> pd.DataFrame:
    """A line per node and one for all."""
    parts = {**summary["nodes"], "all": summary}
    return pd.DataFrame.from_dict({name: _line(part) for name, part in parts.items()}, orient="index")


def _line(part: dict[str, Any]) -> dict[str, str]:
    secs, rates = part["secs"], part["rates"]
    hits = part["hit_rate"]
    return {
        "requests": str(part["requests"]["total"]),
        "failed": str(part["requests"]["failed"]),
        "hits %": "-" if hits is None else f"{hits * 100:.1f}",
        "TTFT ms mean": _millis(secs["ttft"]["mean"]),
        "p99": _millis(secs["ttft"]["p99"]),
        "ITL ms mean": _millis(secs["itl_mean"]["mean"]),
        "E2E ms mean": _millis(secs["total_latency"]["mean"]),
        "p99 ": _millis(secs["total_latency"]["p99"]),
        "prompt tok/s": _number(rates["prompt_tokens_per_sec"]),
        "answer tok/s": _number(rates["completion_tokens_per_sec"]),
    }


def _millis(secs: float | None) -> str:
    return "-" if secs is None else f"{secs * 1e3:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _waits(rows: pd.DataFrame) -> dict[str, float | None]:
    """The median TTFT, or latency where nothing is streamed, of the first and of the last quarter to arrive."""
    good = succeeded(rows).sort_values("arrival_time", kind="stable")
    waits = good["ttft" if good["ttft"].notna().any() else "total_latency"].dropna().to_numpy(dtype=float)
    quarter = len(waits) // 4
    if not quarter:
        return {"first_quarter": None, "last_quarter": None}
    return {"first_quarter": float(np.median(waits[:quarter])), "last_quarter": float(np.median(waits[-quarter:]))}


def save_csv(table: pd.DataFrame, path: Path) -> Path:
    """Write a table; returns where it is."""
    return save_text(path, table.to_csv(index=False, float_format=_DECIMALS))


def save_json(value: dict[str, Any], path: Path) -> Path:
    """Write an object; returns where it is. What is not a number is ``null``."""
    return save_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if math.isinf(value) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def save_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all: what was there before is not lost to a full disk. Returns where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
        ) as file:
            try:
                file.write(text)
                file.flush()
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    return path
