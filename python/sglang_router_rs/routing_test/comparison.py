"""Finished runs of the same load side by side: what each metric was, and how sure that is.

A line of the table is a policy, with tracking on or off; its repeats are further draws of the load. With two repeats or
more a metric has a 95 % interval of its mean (Student's t over the repeats); with one it has none. Since the same draw
was sent to every policy, policies are compared in pairs: by the mean of the differences of the repeats that both have,
with its interval, so that what differs between draws cancels.

What is not known is NaN, and empty in text, CSV and JSON. Only whole runs are compared. Nothing here reads or writes
files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from . import results
from .metrics import COSTS, METRICS, Metric, Run, Variant, at, nodes, or_nan

CONFIDENCE = 0.95
# What stands for the node of requests that were refused before a worker was picked.
NO_WORKER = "no worker"
# Columns of ``per_node``, and what they are called.
NODE_COLUMNS = {
    "policy": "policy",
    "node": "worker",
    "requests": "requests",
    "share": "share (%)",
    "failed": "failed",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens",
    "hit_rate": "hit rate (%)",
    "ttft_mean": "TTFT mean (ms)",
    "e2e_mean": "E2E mean (ms)",
    "e2e_p99": "E2E p99 (ms)",
}


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, which is NaN with less than two values."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """The ± of the interval."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """There is an interval, and the value is outside."""
        return self.low > value or self.high < value

    def times(self, factor: float) -> Estimate:
        """In a unit of which there are that many in this one."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


# --- which runs count -------------------------------------------------------------------------------------------------

# Policy, tracking and repeat.
Turn = tuple[str, bool, int]


def turn(run: Run) -> Turn:
    """Which of the planned runs it is."""
    return *run.variant, run.repeat


def whole(runs: Iterable[Run], planned: Sequence[Turn]) -> list[Run]:
    """The runs that may be compared, in the order of the plan."""
    return sorted((run for run in runs if run.is_whole), key=lambda run: planned.index(turn(run)))


def left_out(runs: Sequence[Run], planned: Sequence[Turn]) -> list[str]:
    """In sentences, which of the planned runs are not compared, and why; none if all are."""
    flawed = [run for run in runs if not run.is_whole]
    said = []
    if len(runs) < len(planned):
        said.append(f"{len(runs)} of {len(planned)} runs were made.")
    if flawed:
        reasons = "; ".join(f"{_named(turn(run), planned)}: {run.flaw}" for run in flawed)
        said.append(f"{len(flawed)} of {len(runs)} runs left out of means, intervals and sentences: {reasons}.")
    made = {run.variant for run in runs if run.is_whole}
    missing = dict.fromkeys(_named(it, planned, repeat=False) for it in planned if it[:2] not in made)
    if missing:
        said.append(f"No whole run, and so not compared: {'; '.join(missing)}.")
    return said


def _named(it: Turn, planned: Sequence[Turn], repeat: bool = True) -> str:
    # As short as it can be told from the others.
    parts = [it[0]]
    if len({tracking for _, tracking, _ in planned}) > 1:
        parts.append(f"tracking {'on' if it[1] else 'off'}")
    if repeat and len({number for *_, number in planned}) > 1:
        parts.append(f"repeat {it[2] + 1}")
    return ", ".join(parts)


def variants(runs: Iterable[Run]) -> list[Variant]:
    """The lines of the table, in the order of the runs."""
    return list(dict.fromkeys(run.variant for run in runs))


def shown(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each policy that plots and node tables show: those with tracking, or all if it has none."""
    of: dict[str, list[Run]] = {}
    for run in runs:
        of.setdefault(run.policy, []).append(run)
    return {policy: [run for run in its if run.tracking] or its for policy, its in of.items()}


# --- statistics -------------------------------------------------------------------------------------------------------


def mean_interval(values: Iterable[float]) -> Estimate:
    """Mean of what is known, with Student's t interval: mean ± t(0.975, n - 1) · s / √n; none with n < 2."""
    sample = np.array([value for value in values if not math.isnan(value)])
    count = len(sample)
    mean = float(sample.mean()) if count else math.nan
    if count < 2:
        return Estimate(mean, math.nan, math.nan)
    # Most commands of the package need no statistics.
    from scipy.special import stdtrit  # noqa: PLC0415

    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * sample.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def _pairs(values: pd.Series[float], base: pd.Series[float]) -> pd.DataFrame:
    # By repeat; those that only one of the two has are left out.
    return pd.concat([values, base], axis=1, join="inner", keys=["value", "base"]).dropna()


# --- tables -----------------------------------------------------------------------------------------------------------


def measured(runs: Sequence[Run]) -> pd.DataFrame:
    """Every metric of every run; the index is (policy, tracking, repeat).

    Raises:
        ValueError: without runs, if one is not whole, or if two have the same policy, tracking and repeat.
    """
    if not runs:
        raise ValueError("no runs to compare")
    keys = [turn(run) for run in runs]
    for run, key in zip(runs, keys, strict=True):
        name = f"policy {run.policy}, tracking {run.tracking}, repeat {run.repeat}"
        if keys.count(key) > 1:
            raise ValueError(f"two runs of {name}: each must be there once")
        if not run.is_whole:
            raise ValueError(f"the run of {name} is not whole ({run.flaw}): leave it out")
    return pd.DataFrame(
        [[metric.measure(run) for metric in METRICS] for run in runs],
        index=pd.MultiIndex.from_tuples(keys, names=["policy", "tracking", "repeat"]),
        columns=[metric.name for metric in METRICS],
        dtype=np.float64,
    )


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """One line per (policy, tracking); the columns are (metric, statistic), in the metric's unit.

    Statistics: ``mean`` over the repeats, ``ci_low`` and ``ci_high`` of its 95 % interval, ``repeats`` where it is
    known; ``difference`` from the first policy with the same tracking, paired by repeat, ``difference_low`` and
    ``difference_high``, ``pairs``, and ``first_mean``, the first policy's mean in these pairs.

    Raises:
        ValueError: as ``measured``.
    """
    values = measured(runs)
    order = variants(runs)
    columns: dict[tuple[str, str], list[float]] = {}
    for metric in METRICS:
        for variant in order:
            sample = _sample(values, variant, metric)
            base = _sample(values, (order[0][0], variant[1]), metric)
            for statistic, value in _statistics(sample, base).items():
                columns.setdefault((metric.name, statistic), []).append(value)
    index = pd.MultiIndex.from_tuples(order, names=["policy", "tracking"])
    made = pd.DataFrame(columns, index=index)
    counts = [column for column in made.columns if column[1] in ("repeats", "pairs")]
    return made.astype(dict.fromkeys(counts, np.int64))


def _statistics(sample: pd.Series[float], base: pd.Series[float]) -> dict[str, float]:
    pairs = _pairs(sample, base)
    own, more = mean_interval(sample), mean_interval(pairs["value"] - pairs["base"])
    return {
        "mean": own.value,
        "ci_low": own.low,
        "ci_high": own.high,
        "repeats": int(sample.notna().sum()),
        "difference": more.value,
        "difference_low": more.low,
        "difference_high": more.high,
        "pairs": len(pairs),
        "first_mean": float(pairs["base"].mean()),
    }


def tracking_cost(runs: Sequence[Run]) -> pd.DataFrame:
    """What tracking adds: on - off, paired by repeat, per policy that ran with both; empty if none did.

    One line per (policy, metric): ``unit``, ``off``, ``on`` (means over the pairs), ``difference``, ``ci_low``,
    ``ci_high``, ``repeats``.
    """
    values = measured(runs)
    order = variants(runs)
    found = []
    for policy in dict.fromkeys(policy for policy, _ in order):
        if not {(policy, True), (policy, False)} <= set(order):
            continue
        for metric in COSTS:
            pairs = _pairs(_sample(values, (policy, True), metric), _sample(values, (policy, False), metric))
            cost = mean_interval(pairs["value"] - pairs["base"])
            means = (float(pairs["base"].mean()), float(pairs["value"].mean()))
            found.append((policy, metric.name, metric.unit, *means, cost.value, cost.low, cost.high, len(pairs)))
    names = ["policy", "metric", "unit", "off", "on", "difference", "ci_low", "ci_high", "repeats"]
    return pd.DataFrame(found, columns=names).set_index(["policy", "metric"])


def _sample(values: pd.DataFrame, variant: Variant, metric: Metric) -> pd.Series[float]:
    # By repeat; empty if this policy did not run that way.
    here = values.xs(variant[0], level="policy").loc[lambda of: of.index.get_level_values("tracking") == variant[1]]
    sample: pd.Series[float] = here.droplevel("tracking")[metric.name]
    return sample


def per_node(runs: Sequence[Run]) -> pd.DataFrame:
    """One line per policy and worker, over the runs that ``shown`` selects; NaN where nothing is known.

    Idle workers are there too. Requests that no worker was picked for are the line ``NO_WORKER``.
    """
    names = nodes(runs)
    found = []
    for policy, its_runs in shown(runs).items():
        rows = pd.concat([run.rows for run in its_runs])
        parts = {name: at(rows, url) for url, name in names.items()}
        unserved = rows[rows["worker_url"].isna()]
        if len(unserved):
            parts[NO_WORKER] = unserved
        found += [
            {"policy": policy, "node": name, "share": 100 * len(here) / len(rows) if len(rows) else math.nan}
            | _of_node(here)
            for name, here in parts.items()
        ]
    return pd.DataFrame(found, columns=list(NODE_COLUMNS))


def _of_node(rows: pd.DataFrame) -> dict[str, float]:
    made = results.part(rows, 0)
    requests, tokens, secs = made["requests"], made["tokens"], made["secs"]
    return {
        "requests": requests["total"],
        "failed": requests["failed"],
        "prompt_tokens": or_nan(tokens["prompt"]),
        "completion_tokens": or_nan(tokens["completion"]),
        "hit_rate": or_nan(made["hit_rate"]) * 100,
        "ttft_mean": or_nan(secs["ttft"]["mean"]) * 1000,
        "e2e_mean": or_nan(secs["total_latency"]["mean"]) * 1000,
        "e2e_p99": or_nan(secs["total_latency"]["p99"]) * 1000,
    }


# --- for programs -----------------------------------------------------------------------------------------------------


def tidy(of: pd.DataFrame) -> pd.DataFrame:
    """A table with one row per policy, tracking and metric: plain numbers, NaN where nothing is known."""
    statistics = ["mean", "ci_low", "ci_high", "repeats"]
    made = pd.DataFrame(_records(of, statistics))
    return made.astype({"repeats": np.int64})


def as_dict(of: pd.DataFrame, cost: pd.DataFrame) -> dict[str, Any]:
    """A table and ``tracking_cost`` as plain values; ``differences`` are from the ``baseline``."""
    differences = ["difference", "difference_low", "difference_high", "first_mean", "pairs"]
    return {
        "baseline": of.index[0][0],
        "confidence": CONFIDENCE,
        "metrics": tidy(of).to_dict("records"),
        "differences": _records(of, differences),
        "tracking": cost.reset_index().to_dict("records"),
    }


def _records(of: pd.DataFrame, statistics: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"policy": policy, "tracking": tracking, "metric": metric.name, "unit": metric.unit}
        | {name: of.loc[(policy, tracking), (metric.name, name)].item() for name in statistics}
        for policy, tracking in of.index
        for metric in METRICS
    ]
