"""What is measured of one run of a comparison: a table of metrics, each a number with a unit.

A figure that a run's summary has is the summary's; only what compares its workers is worked out here. What is not known
is NaN: a missing count makes a sum unknown, not smaller. All columns of the rows know a missing value, so rows are
chosen by ``at``, ``succeeded`` and ``failed``, for which missing is no match.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from .results import succeeded

Numbers = np.ndarray[Any, np.dtype[np.float64]]
# A policy, and whether requests were tracked.
Variant = tuple[str, bool]


@dataclass(frozen=True)
class Run:
    """One draw of the load, sent through a router with one policy."""

    policy: str
    tracking: bool
    # From 0. Runs with the same number were sent the same requests.
    repeat: int
    # One row per request, as ``results.frame`` makes them.
    rows: pd.DataFrame
    # What ``Results.summary`` says of the rows.
    summary: dict[str, Any]
    # CPU time of the router over the run, and its memory at the end.
    router_cpu_secs: float | None
    router_rss_bytes: int | None
    # URLs of all workers that the router had, as it writes them; and the names of those that have one.
    workers: tuple[str, ...]
    node_ids: Mapping[str, str] = field(default_factory=dict)
    # When a worker was lost on purpose: from and to, in seconds since the first arrival; infinite if for good.
    losses: tuple[tuple[float, float], ...] = ()
    # Why it must not be compared, such as that it was interrupted; empty if it may.
    flaw: str = ""

    @property
    def variant(self) -> Variant:
        """The line of the table that it belongs to."""
        return self.policy, self.tracking

    @property
    def is_whole(self) -> bool:
        """It may be compared."""
        return not self.flaw


@dataclass(frozen=True)
class Metric:
    """What is measured of a run; ``better`` is the direction that one wants, if there is one."""

    name: str
    label: str
    unit: str
    better: str
    meaning: str
    measure: Callable[[Run], float]
    # How the best of it is put in words; such metrics are those that policies are compared in.
    best: str = ""


# --- rows -------------------------------------------------------------------------------------------------------------


def numbers(rows: pd.DataFrame, name: str) -> Numbers:
    """A column as numbers, NaN where it is empty."""
    return rows[name].to_numpy(dtype=np.float64, na_value=np.nan)


def failed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of requests that did not succeed."""
    return rows[~rows["success"].fillna(False).astype(bool)]


def at(rows: pd.DataFrame, url: str) -> pd.DataFrame:
    """The rows of requests that this worker got."""
    return rows[rows["worker_url"].eq(url).fillna(False).astype(bool)]


def known(rows: pd.DataFrame, name: str) -> Numbers:
    """What is known of a column, of the requests that succeeded."""
    values = numbers(succeeded(rows), name)
    return values[~np.isnan(values)]


def nodes(runs: Iterable[Run]) -> dict[str, str]:
    """All workers of the runs, idle ones too, as URL and what to call it: its name if no other has the same."""
    names: dict[str, str] = {}
    for run in runs:
        pairs = run.rows[["worker_url", "node_id"]].dropna(subset=["worker_url"]).drop_duplicates()
        for url in (*run.workers, *pairs["worker_url"]):
            names.setdefault(url, url)
        names |= dict(pairs.dropna().itertuples(index=False)) | dict(run.node_ids)
    given = list(names.values())
    labels = {url: name if given.count(name) == 1 else f"{name} ({url})" for url, name in names.items()}
    return dict(sorted(labels.items(), key=lambda item: _natural(item[1])))


def _natural(text: str) -> list[tuple[int, str]]:
    # gpu_10 after gpu_2.
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


# --- metrics ----------------------------------------------------------------------------------------------------------


def or_nan(value: float | None) -> float:
    """A figure of a summary as a number."""
    return math.nan if value is None else value


def _of_summary(*path: str, times: float = 1) -> Callable[[Run], float]:
    def measure(run: Run) -> float:
        value: Any = functools.reduce(operator.getitem, path, run.summary)
        return or_nan(value) * times

    return measure


def _request_imbalance(run: Run) -> float:
    return _imbalance([len(at(run.rows, url)) for url in nodes([run])])


def _prefill_imbalance(run: Run) -> float:
    good = succeeded(run.rows)
    uncached = good.assign(uncached=good["prompt_tokens"] - good["cached_tokens"])
    # The sum of numbers of which one is NaN is NaN.
    return _imbalance([float(numbers(at(uncached, url), "uncached").sum()) for url in nodes([run])])


def _imbalance(loads: Sequence[float]) -> float:
    mean = sum(loads) / len(loads) if loads else 0
    return max(loads) / mean if mean and not math.isnan(mean) else math.nan


def _cpu_per_request(run: Run) -> float:
    requests = len(run.rows)
    return or_nan(run.router_cpu_secs) * 1e6 / requests if requests else math.nan


def _memory(run: Run) -> float:
    return or_nan(run.router_rss_bytes) / 2**20


def _latency(name: str, label: str, column: str, meaning: str) -> Iterator[Metric]:
    best = {"mean": f"Lowest mean {label}", "p99": f"Lowest p99 of {label}"}
    for shown, key in (("mean", "mean"), ("p50", "median"), ("p95", "p95"), ("p99", "p99")):
        measure = _of_summary("secs", column, key, times=1000)
        yield Metric(f"{name}_{shown}", f"{label} {shown}", "ms", "lower", meaning, measure, best.get(shown, ""))


_COUNTED = "as the workers counted them, of requests that succeeded; empty if one answer told no count"

METRICS = (
    Metric("requests", "requests", "", "", "that were sent", _of_summary("requests", "total")),
    Metric("failed", "failed", "", "lower", "that did not succeed", _of_summary("requests", "failed")),
    *_latency("ttft", "TTFT", "ttft", "from the sending of a request to the first content of its stream"),
    Metric(
        "itl_mean",
        "ITL mean",
        "ms",
        "lower",
        "between two tokens: each request's mean, averaged over requests",
        _of_summary("secs", "itl_mean", "mean", times=1000),
    ),
    *_latency("e2e", "E2E", "total_latency", "from the scheduled arrival to the last byte of the answer"),
    Metric(
        "completed_per_sec",
        "completed",
        "requests/s",
        "higher",
        "requests that succeeded per second",
        _of_summary("rates", "requests_per_sec"),
        "Most requests completed per second",
    ),
    Metric(
        "prompt_tokens_per_sec",
        "prompt tokens",
        "tokens/s",
        "higher",
        _COUNTED,
        _of_summary("rates", "prompt_tokens_per_sec"),
    ),
    Metric(
        "completion_tokens_per_sec",
        "completion tokens",
        "tokens/s",
        "higher",
        _COUNTED,
        _of_summary("rates", "completion_tokens_per_sec"),
        "Most completion tokens per second",
    ),
    Metric(
        "hit_rate",
        "prefix hit rate",
        "%",
        "higher",
        "sum of cached_tokens / sum of prompt_tokens, of requests that succeeded; empty if one answer told no count",
        _of_summary("hit_rate", times=100),
        "Highest prefix hit rate",
    ),
    Metric(
        "request_imbalance",
        "request imbalance",
        "max/mean",
        "lower",
        "requests of the busiest worker / mean of all workers, idle ones too: 1 is even",
        _request_imbalance,
        "Most even spread of requests",
    ),
    Metric(
        "prefill_imbalance",
        "prefill imbalance",
        "max/mean",
        "lower",
        "the same of prompt tokens that were not cached, of requests that succeeded; empty if one answer told no count",
        _prefill_imbalance,
    ),
    Metric("router_cpu", "router CPU", "µs/request", "lower", "CPU time of the router / requests", _cpu_per_request),
    Metric("router_memory", "router memory", "MiB", "lower", "resident memory of the router at the end", _memory),
)
METRIC = {metric.name: metric for metric in METRICS}
# Those in which tracking may cost something.
COSTS = tuple(METRIC[name] for name in ("router_cpu", "router_memory", "e2e_p50", "e2e_p99"))
