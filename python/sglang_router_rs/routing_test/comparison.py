"""Finished runs of the same load side by side: what each metric was, and how sure that is.

A line of the table is a policy, with tracking on or off; its repeats are further draws of the load. With two repeats or
more a metric has a 95 % interval of its mean (Student's t over the repeats); with one it has none. Since the same draw
was sent to every policy, policies are compared in pairs: the ratio to the first one is the geometric mean of the ratios
of the repeats, with the t interval of their logarithms, so that what differs between draws cancels.

What is not known is NaN, and empty in text, CSV and JSON. Latencies and tokens per second are of the requests that
succeeded. Nothing here reads or writes files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
# What stands for the node of requests that were refused before a worker was picked.
NO_WORKER = "no worker"
# Columns of a table for the terminal.
WIDTH = 120

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
    # One row per request, with the columns of ``columns.NAMES``; SGLang's stamps may follow.
    rows: pd.DataFrame
    # The run's summary.json.
    summary: dict[str, Any]
    # CPU time of the router over the run, and its memory at the end.
    router_cpu_secs: float | None
    router_rss_bytes: int | None

    @property
    def variant(self) -> Variant:
        """The line of the table that it belongs to."""
        return self.policy, self.tracking


@dataclass(frozen=True)
class Estimate:
    """A mean over repeats with its interval, which is NaN with less than two."""

    value: float
    low: float
    high: float
    repeats: int

    @property
    def half_width(self) -> float:
        """The ± of the interval."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """There is an interval, and the value is outside."""
        return self.low > value or self.high < value


@dataclass(frozen=True)
class Metric:
    """What is measured of a run; ``better`` is the direction that one wants, if there is one."""

    name: str
    label: str
    unit: str
    better: str
    meaning: str
    # Of a run, and the nodes of all runs.
    measure: Callable[[Run, Sequence[str]], float]


# --- rows -------------------------------------------------------------------------------------------------------------


def numbers(rows: pd.DataFrame, name: str) -> Numbers:
    """A column as numbers, NaN where it is empty."""
    return pd.to_numeric(rows[name]).to_numpy(dtype=np.float64, na_value=np.nan)


def succeeded(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of requests that succeeded."""
    return rows[rows["success"].eq(True)]


def known(rows: pd.DataFrame, name: str) -> Numbers:
    """What is known of a column, of the requests that succeeded."""
    values = numbers(succeeded(rows), name)
    return values[~np.isnan(values)]


def nodes(runs: Iterable[Run]) -> dict[str, str]:
    """The workers that any run used, as ``worker_url`` and what to call it: the ``node_id`` if no other has the same.

    A worker that no run used is not known.
    """
    pairs = pd.concat([run.rows[["worker_url", "node_id"]] for run in runs]).dropna(subset=["worker_url"])
    names = {str(url): str(url) for url in pairs["worker_url"].unique()}
    for url, node_id in pairs.dropna().drop_duplicates().itertuples(index=False):
        names[str(url)] = str(node_id)
    given = list(names.values())
    labels = {url: name if given.count(name) == 1 else f"{name} ({url})" for url, name in names.items()}
    return dict(sorted(labels.items(), key=lambda item: _natural(item[1])))


def hit_rate(rows: pd.DataFrame) -> float:
    """Share of prompt tokens that were found in the worker's cache, in %, of the rows where both are known."""
    prompt, cached = numbers(rows, "prompt_tokens"), numbers(rows, "cached_tokens")
    both = ~(np.isnan(prompt) | np.isnan(cached))
    return _quotient(100 * cached[both].sum(), prompt[both].sum())


def _natural(text: str) -> list[tuple[int, str]]:
    # gpu_10 after gpu_2.
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _quotient(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


# --- metrics ----------------------------------------------------------------------------------------------------------


def _requests(run: Run, _: Sequence[str]) -> float:
    return len(run.rows)


def _failed(run: Run, _: Sequence[str]) -> float:
    return len(run.rows) - len(succeeded(run.rows))


def _completed_per_sec(run: Run, _: Sequence[str]) -> float:
    return _quotient(len(succeeded(run.rows)), float(run.summary["duration_secs"]))


def _tokens_per_sec(column: str) -> Callable[[Run, Sequence[str]], float]:
    def measure(run: Run, _: Sequence[str]) -> float:
        # One that did not report makes the sum unknown.
        return _quotient(numbers(succeeded(run.rows), column).sum(), float(run.summary["duration_secs"]))

    return measure


def _hit_rate(run: Run, _: Sequence[str]) -> float:
    return hit_rate(run.rows)


def _request_imbalance(run: Run, urls: Sequence[str]) -> float:
    return _imbalance([float(run.rows["worker_url"].eq(url).sum()) for url in urls])


def _prefill_imbalance(run: Run, urls: Sequence[str]) -> float:
    uncached = pd.Series(numbers(run.rows, "prompt_tokens") - numbers(run.rows, "cached_tokens"), run.rows.index)
    return _imbalance([float(uncached[run.rows["worker_url"].eq(url)].sum()) for url in urls])


def _imbalance(loads: list[float]) -> float:
    return _quotient(max(loads), sum(loads) / len(loads)) if loads else math.nan


def _cpu_per_request(run: Run, _: Sequence[str]) -> float:
    return math.nan if run.router_cpu_secs is None else _quotient(run.router_cpu_secs * 1e6, len(run.rows))


def _memory(run: Run, _: Sequence[str]) -> float:
    return math.nan if run.router_rss_bytes is None else run.router_rss_bytes / 2**20


def _latency(name: str, label: str, column: str, meaning: str, *percentiles: int) -> Iterator[Metric]:
    def mean(run: Run, _: Sequence[str]) -> float:
        values = known(run.rows, column)
        return float(values.mean() * 1000) if len(values) else math.nan

    def at(percentile: int) -> Callable[[Run, Sequence[str]], float]:
        def measure(run: Run, _: Sequence[str]) -> float:
            values = known(run.rows, column)
            return float(np.percentile(values, percentile) * 1000) if len(values) else math.nan

        return measure

    yield Metric(f"{name}_mean", f"{label} mean", "ms", "lower", meaning, mean)
    for percentile in percentiles:
        shown = f"{label} p{percentile}"
        yield Metric(f"{name}_p{percentile}", shown, "ms", "lower", meaning, at(percentile))


METRICS = (
    Metric("requests", "requests", "", "", "that were sent", _requests),
    Metric("failed", "failed", "", "lower", "that did not succeed", _failed),
    *_latency("ttft", "TTFT", "ttft", "from the sending of a request to the first content of its stream", 50, 95, 99),
    *_latency("itl", "ITL", "itl_mean", "between two tokens: each request's mean, averaged over requests"),
    *_latency("e2e", "E2E", "total_latency", "from the scheduled arrival to the last byte of the answer", 50, 95, 99),
    Metric(
        "completed_per_sec",
        "completed",
        "requests/s",
        "higher",
        "requests that succeeded per second",
        _completed_per_sec,
    ),
    Metric(
        "prompt_tokens_per_sec",
        "prompt tokens",
        "tokens/s",
        "higher",
        "as the workers counted them; empty if one answer told no count",
        _tokens_per_sec("prompt_tokens"),
    ),
    Metric(
        "completion_tokens_per_sec",
        "completion tokens",
        "tokens/s",
        "higher",
        "as the workers counted them; empty if one answer told no count",
        _tokens_per_sec("completion_tokens"),
    ),
    Metric(
        "hit_rate",
        "prefix hit rate",
        "%",
        "higher",
        "sum of cached_tokens / sum of prompt_tokens, over the requests where both are known",
        _hit_rate,
    ),
    Metric(
        "request_imbalance",
        "request imbalance",
        "max/mean",
        "lower",
        "requests of the busiest worker / mean of all workers: 1 is even",
        _request_imbalance,
    ),
    Metric(
        "prefill_imbalance",
        "prefill imbalance",
        "max/mean",
        "lower",
        "the same of prompt tokens that were not cached",
        _prefill_imbalance,
    ),
    Metric("router_cpu", "router CPU", "µs/request", "lower", "CPU time of the router / requests", _cpu_per_request),
    Metric("router_memory", "router memory", "MiB", "lower", "resident memory of the router at the end", _memory),
)
METRIC = {metric.name: metric for metric in METRICS}
# Those in which policies are compared with the first one, and which the report puts in words.
COMPARED = (
    "ttft_mean",
    "ttft_p99",
    "e2e_mean",
    "e2e_p99",
    "completed_per_sec",
    "completion_tokens_per_sec",
    "hit_rate",
)
# Those in which tracking may cost something.
COSTS = ("router_cpu", "router_memory", "e2e_p50", "e2e_p99")
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


# --- tables -----------------------------------------------------------------------------------------------------------


def mean_interval(values: Iterable[float]) -> Estimate:
    """Mean of what is known, with Student's t interval: mean ± t(0.975, n - 1) · s / √n; none with n < 2."""
    sample = np.array([value for value in values if not math.isnan(value)])
    count = len(sample)
    mean = float(sample.mean()) if count else math.nan
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * sample.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def ratio(values: pd.Series[float], base: pd.Series[float]) -> Estimate:
    """Geometric mean of values / base, paired by repeat, with the t interval of the logarithms.

    NaN if a value of a pair is not above 0. Repeats that only one of the two has are left out.
    """
    pairs = pd.concat([values, base], axis=1, join="inner").dropna().to_numpy(dtype=np.float64)
    if (pairs <= 0).any():
        return Estimate(math.nan, math.nan, math.nan, 0)
    log = mean_interval(np.log(pairs[:, 0] / pairs[:, 1]))
    return Estimate(math.exp(log.value), math.exp(log.low), math.exp(log.high), log.repeats)


def difference(values: pd.Series[float], base: pd.Series[float]) -> Estimate:
    """Mean of values - base, paired by repeat, with its t interval."""
    pairs = pd.concat([values, base], axis=1, join="inner").dropna().to_numpy(dtype=np.float64)
    return mean_interval(pairs[:, 0] - pairs[:, 1])


def measured(runs: Sequence[Run]) -> pd.DataFrame:
    """Every metric of every run; the index is (policy, tracking, repeat).

    Raises:
        ValueError: without runs, or if two have the same policy, tracking and repeat.
    """
    if not runs:
        raise ValueError("no runs to compare")
    keys = [(run.policy, run.tracking, run.repeat) for run in runs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise ValueError(
            f"two runs of policy {twice[0]}, tracking {twice[1]}, repeat {twice[2]}: each must be there once"
        )
    urls = list(nodes(runs))
    return pd.DataFrame(
        [[metric.measure(run, urls) for metric in METRICS] for run in runs],
        index=pd.MultiIndex.from_tuples(keys, names=["policy", "tracking", "repeat"]),
        columns=[metric.name for metric in METRICS],
        dtype=np.float64,
    )


def variants(runs: Iterable[Run]) -> list[Variant]:
    """The lines of the table, in the order of the runs."""
    return list(dict.fromkeys(run.variant for run in runs))


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """One line per (policy, tracking); the columns are (metric, statistic), in the metric's unit.

    Statistics: ``mean`` over the repeats, ``ci_low`` and ``ci_high`` of its 95 % interval, ``repeats`` where it is
    known; ``ratio`` to the first policy with the same tracking, ``ratio_low`` and ``ratio_high``, ``pairs``.

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
            own, to_first = mean_interval(sample), ratio(sample, base)
            statistics = {
                "mean": own.value,
                "ci_low": own.low,
                "ci_high": own.high,
                "repeats": own.repeats,
                "ratio": to_first.value,
                "ratio_low": to_first.low,
                "ratio_high": to_first.high,
                "pairs": to_first.repeats,
            }
            for statistic, value in statistics.items():
                columns.setdefault((metric.name, statistic), []).append(value)
    index = pd.MultiIndex.from_tuples(order, names=["policy", "tracking"])
    made = pd.DataFrame(columns, index=index)
    counts = [column for column in made.columns if column[1] in ("repeats", "pairs")]
    return made.astype(dict.fromkeys(counts, np.int64))


def tracking_cost(runs: Sequence[Run]) -> pd.DataFrame:
    """What tracking adds: on - off, paired by repeat, per policy that ran with both; empty if none did.

    One line per (policy, metric): ``unit``, ``off``, ``on`` (means), ``difference``, ``ci_low``, ``ci_high``,
    ``repeats``.
    """
    values = measured(runs)
    order = variants(runs)
    found = []
    for policy in dict.fromkeys(policy for policy, _ in order):
        if not {(policy, True), (policy, False)} <= set(order):
            continue
        for metric in (METRIC[name] for name in COSTS):
            on, off = _sample(values, (policy, True), metric), _sample(values, (policy, False), metric)
            cost = difference(on, off)
            means = (float(off.mean()), float(on.mean()))
            found.append((policy, metric.name, metric.unit, *means, cost.value, cost.low, cost.high, cost.repeats))
    names = ["policy", "metric", "unit", "off", "on", "difference", "ci_low", "ci_high", "repeats"]
    return pd.DataFrame(found, columns=names).set_index(["policy", "metric"])


def per_node(runs: Sequence[Run]) -> pd.DataFrame:
    """One line per policy and worker, over the runs that ``shown`` selects; NaN where nothing is known.

    Requests that no worker was picked for are the line ``NO_WORKER``.
    """
    names = nodes(runs)
    found = []
    for policy, its_runs in shown(runs).items():
        rows = pd.concat([run.rows for run in its_runs])
        parts = [(name, rows[rows["worker_url"].eq(url)]) for url, name in names.items()]
        unserved = rows[rows["worker_url"].isna()]
        if len(unserved):
            parts.append((NO_WORKER, unserved))
        for name, here in parts:
            ttft, e2e = known(here, "ttft") * 1000, known(here, "total_latency") * 1000
            found.append(
                {
                    "policy": policy,
                    "node": name,
                    "requests": len(here),
                    "share": _quotient(100 * len(here), len(rows)),
                    "failed": len(here) - len(succeeded(here)),
                    "prompt_tokens": numbers(succeeded(here), "prompt_tokens").sum(),
                    "completion_tokens": numbers(succeeded(here), "completion_tokens").sum(),
                    "hit_rate": hit_rate(here),
                    "ttft_mean": float(ttft.mean()) if len(ttft) else math.nan,
                    "e2e_mean": float(e2e.mean()) if len(e2e) else math.nan,
                    "e2e_p99": float(np.percentile(e2e, 99)) if len(e2e) else math.nan,
                }
            )
    return pd.DataFrame(found, columns=list(NODE_COLUMNS))


def shown(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each policy that plots and node tables show: those with tracking, or all if it has none."""
    of: dict[str, list[Run]] = {}
    for run in runs:
        of.setdefault(run.policy, []).append(run)
    return {policy: [run for run in its if run.tracking] or its for policy, its in of.items()}


def _sample(values: pd.DataFrame, variant: Variant, metric: Metric) -> pd.Series[float]:
    # By repeat; empty if this policy did not run that way.
    here = values.xs(variant[0], level="policy").loc[lambda of: of.index.get_level_values("tracking") == variant[1]]
    sample: pd.Series[float] = here.droplevel("tracking")[metric.name]
    return sample


# --- for people -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A metric across the table, as text: a cell for each line of the table, empty where nothing is known."""

    label: str
    unit: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


def lines(of: pd.DataFrame) -> list[Line]:
    """The metrics of a table, such as ``12.3 ±0.4``, the best of each marked; those that nobody knows are left out."""
    found = []
    for metric in METRICS:
        estimates = [_estimate(row[metric.name], "mean", "ci") for _, row in _rows(of)]
        means = [estimate.value for estimate in estimates]
        if all(map(math.isnan, means)):
            continue
        # Counts have no unit.
        whole = not metric.unit and all(mean == round(mean) for mean in means)
        places = 0 if whole else decimals(means)
        cells = tuple(with_interval(estimate, places) for estimate in estimates)
        found.append(Line(metric.label, metric.unit, cells, _best(means, metric.better)))
    return found


def changes(of: pd.DataFrame) -> list[Line]:
    """How far each policy is from the first one, such as ``-12.3 % [-14.0, -10.5]``; none with one policy."""
    first = of.index[0][0]
    others = of[of.index.get_level_values("policy") != first]
    found = []
    for metric in (METRIC[name] for name in COMPARED if len(others)):
        cells = tuple(change(_estimate(row[metric.name], "ratio", "ratio")) for _, row in _rows(others))
        if any(cells):
            found.append(Line(metric.label, "", cells, (False,) * len(cells)))
    return found


def text(of: pd.DataFrame) -> str:
    """A table for the terminal, at most ``WIDTH`` columns wide."""
    several = int(of.xs("repeats", axis=1, level=1).to_numpy().max()) > 1
    notes = ["* best of the line."] if len(of) > 1 else []
    if several:
        notes.append("± half the 95 % interval of the mean over the repeats.")
    parts = [*_blocks(lines(of), list(of.index)), " ".join(notes)]
    compared = changes(of)
    if compared:
        first = of.index[0][0]
        interval = ", with the 95 % interval over the repeats" if several else ""
        others = [variant for variant in of.index if variant[0] != first]
        title = f"Change from {_shortened(first)}, in percent of its value, paired by load{interval}:"
        parts += ["", title, *_blocks(compared, others)]
    return "\n".join(parts) + "\n"


def tracking_text(cost: pd.DataFrame) -> str:
    """What tracking adds, for the terminal: a column per policy; empty for an empty table."""
    found = tracking_lines(cost)
    if not found:
        return ""
    policies = [(str(policy), True) for policy in cost.index.unique("policy")]
    return "\n".join(["Tracking on - off, paired by load:", *_blocks(found, policies)]) + "\n"


def tracking_lines(cost: pd.DataFrame) -> list[Line]:
    """What tracking adds, such as ``+2.2 [-3.1, +7.4]``; a cell per policy, empty where nothing is known."""
    found = []
    for name in COSTS if len(cost) else ():
        rows = [row for _, row in cost.xs(name, level="metric").iterrows()]
        added = [_estimate(row, "difference", "ci") for row in rows]
        sizes = [abs(end) for more in added for end in (more.value, more.low, more.high) if not math.isnan(end)]
        places = decimals([max(sizes, default=0)])
        cells = tuple(_added(more, places) for more in added)
        if any(cells):
            found.append(Line(METRIC[name].label, METRIC[name].unit, cells, (False,) * len(cells)))
    return found


def _added(more: Estimate, places: int) -> str:
    if math.isnan(more.value):
        return ""
    interval = "" if math.isnan(more.low) else f" [{more.low:+,.{places}f}, {more.high:+,.{places}f}]"
    return f"{more.value:+,.{places}f}{interval}"


def decimals(values: Iterable[float]) -> int:
    """Decimal places with which the smallest of the values has three digits, at most three."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return 0
    return min(max(2 - math.floor(math.log10(min(sizes))), 0), 3)


def with_interval(estimate: Estimate, places: int) -> str:
    """The value, and ± its interval if there is one; empty if it is not known."""
    if math.isnan(estimate.value):
        return ""
    # What every repeat has in common, such as a count, needs no interval.
    half = f" ±{estimate.half_width:,.{places}f}" if estimate.half_width > 0 else ""
    return f"{estimate.value:,.{places}f}{half}"


def change(to_first: Estimate) -> str:
    """A ratio as a change in percent, with its interval if there is one; empty if it is not known."""
    if math.isnan(to_first.value):
        return ""
    value, low, high = (100 * (part - 1) for part in (to_first.value, to_first.low, to_first.high))
    return f"{value:+.1f} %" + ("" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]")


def variant_label(variant: Variant, of: Iterable[Variant]) -> str:
    """The policy, and whether it was tracked if that differs among them."""
    policy, tracking = variant
    return policy if len({tracked for _, tracked in of}) == 1 else f"{policy}, tracking {'on' if tracking else 'off'}"


def _rows(of: pd.DataFrame) -> Iterator[tuple[Variant, Any]]:
    for variant, (_, row) in zip(of.index, of.iterrows(), strict=True):
        yield variant, row


def _estimate(row: Any, value: str, interval: str) -> Estimate:
    repeats = row["pairs" if value == "ratio" else "repeats"]
    return Estimate(row[value], row[f"{interval}_low"], row[f"{interval}_high"], int(repeats))


def _best(means: list[float], better: str) -> tuple[bool, ...]:
    values = [mean for mean in means if not math.isnan(mean)]
    if not better or min(values) == max(values):
        return (False,) * len(means)
    best = min(values) if better == "lower" else max(values)
    return tuple(mean == best for mean in means)


def _blocks(of: list[Line], columns: list[Variant]) -> Iterator[str]:
    # Under each other, each with as many columns as fit.
    labels = [f"{line.label} ({line.unit})" if line.unit else line.label for line in of]
    heads = [(_shortened(policy), f"tracking {'on' if tracking else 'off'}") for policy, tracking in columns]
    both = len({tracking for _, tracking in columns}) > 1
    cells = [[cell + ("*" if best else " ") for cell, best in zip(line.cells, line.best, strict=True)] for line in of]
    left = max(map(len, labels))
    words = [f"{part} " for head in heads for part in head[: 1 + both]] + [cell for line in cells for cell in line]
    wide = max(map(len, words)) + 2
    fit = max((WIDTH - left) // wide, 1)
    for start in range(0, len(columns), fit):
        part = slice(start, start + fit)
        if start:
            yield ""
        for row in range(1 + both):
            yield _row("", [f"{head[row]} " for head in heads[part]], left, wide)
        for label, line in zip(labels, cells, strict=True):
            yield _row(label, line[part], left, wide)


def _row(label: str, cells: list[str], left: int, wide: int) -> str:
    return (label.ljust(left) + "".join(cell.rjust(wide) for cell in cells)).rstrip()


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


# --- for programs -----------------------------------------------------------------------------------------------------


def tidy(of: pd.DataFrame) -> pd.DataFrame:
    """A table with one row per policy, tracking and metric: plain numbers, NaN where nothing is known."""
    rows = [
        (
            policy,
            tracking,
            metric.name,
            metric.unit,
            *(row[metric.name][key] for key in ("mean", "ci_low", "ci_high", "repeats")),
        )
        for (policy, tracking), row in _rows(of)
        for metric in METRICS
    ]
    made = pd.DataFrame(rows, columns=["policy", "tracking", "metric", "unit", "mean", "ci_low", "ci_high", "repeats"])
    return made.astype({"repeats": np.int64})


def as_dict(of: pd.DataFrame, cost: pd.DataFrame) -> dict[str, Any]:
    """A table and ``tracking_cost`` as plain values: ``metrics``, ``ratios`` to the ``baseline``, ``tracking``."""
    ratios = [
        {
            "policy": policy,
            "tracking": tracking,
            "metric": name,
            **{key: row[name][key] for key in ("ratio", "ratio_low", "ratio_high")},
            "pairs": int(row[name]["pairs"]),
        }
        for (policy, tracking), row in _rows(of)
        for name in METRIC
    ]
    return {
        "baseline": of.index[0][0],
        "confidence": CONFIDENCE,
        "metrics": tidy(of).to_dict("records"),
        "ratios": ratios,
        "tracking": cost.reset_index().to_dict("records"),
    }
