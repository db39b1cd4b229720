"""What a comparison shows, in sentences computed from it. A difference is claimed only where the data hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from . import comparison
from .comparison import METRIC, Metric, Run

# What is put in words, and how it is said.
SAID = {
    "ttft_mean": "Lowest mean TTFT",
    "ttft_p99": "Lowest p99 of TTFT",
    "e2e_mean": "Lowest mean E2E latency",
    "e2e_p99": "Lowest p99 of E2E latency",
    "completion_tokens_per_sec": "Most completion tokens per second",
    "hit_rate": "Highest prefix hit rate",
    "request_imbalance": "Most even spread of requests",
}


def findings(runs: Sequence[Run]) -> list[str]:
    """The sentences, of the runs that ``comparison.shown`` selects."""
    selected = comparison.shown(runs)
    values = comparison.measured([run for its in selected.values() for run in its]).droplevel("tracking")
    said = [_failures(selected)]
    if len(selected) > 1:
        repeats = max(len(its) for its in selected.values())
        said.append(_confidence(repeats))
        said += [sentence for name in SAID if (sentence := _best(values, METRIC[name], repeats))]
    return said


def _failures(selected: dict[str, list[Run]]) -> str:
    counts = {policy: (_failed(its), sum(len(run.rows) for run in its)) for policy, its in selected.items()}
    some = [f"{policy} {failed:,} of {total:,}" for policy, (failed, total) in counts.items() if failed]
    if not some:
        return f"All {sum(total for _, total in counts.values()):,} requests succeeded."
    return f"Requests that failed: {', '.join(some)}. Latencies and rates leave them out."


def _failed(runs: list[Run]) -> int:
    return sum(len(run.rows) - len(comparison.succeeded(run.rows)) for run in runs)


def _confidence(repeats: int) -> str:
    if repeats < 2:
        return (
            "One run per policy: nothing tells a difference from chance, and there are no intervals. "
            "More repeats (--repeats) would."
        )
    return (
        f"{repeats} repeats: policies are told apart where the 95 % interval of their ratio, paired by load, leaves "
        "out 1 (of their difference 0, where a value is 0). Intervals are not corrected for the number of comparisons."
    )


def _best(values: pd.DataFrame, metric: Metric, repeats: int) -> str:
    # The best policy of a metric, by how much, and whom it is not told apart from.
    samples = {
        policy: values.loc[[policy], metric.name].droplevel("policy") for policy in values.index.unique("policy")
    }
    means = {policy: float(sample.mean()) for policy, sample in samples.items() if sample.notna().any()}
    if len(means) < 2:
        return ""
    ranked = sorted(means, key=lambda policy: means[policy], reverse=metric.better == "higher")
    best, others = ranked[0], ranked[1:]
    places = comparison.decimals(means.values())
    if means[best] == means[ranked[-1]]:
        return f"{SAID[metric.name]}: the same for all, {means[best]:,.{places}f} {metric.unit}."
    own = comparison.with_interval(comparison.mean_interval(samples[best]), places)
    ratios = {policy: comparison.ratio(samples[policy], samples[best]) for policy in others}
    following = others[0]
    by = "" if math.isnan(ratios[following].value) else f" ({comparison.change(ratios[following])})"
    sentence = (
        f"{SAID[metric.name]}: {best}, {own} {metric.unit}; next {following}, {means[following]:,.{places}f}{by}."
    )
    if repeats < 2:
        return sentence
    unclear = [policy for policy in others if not _apart(samples[policy], samples[best])]
    if not unclear:
        return f"{sentence} Told apart from every other policy."
    return f"{sentence} Not told apart from {', '.join(unclear)}."


def _apart(one: pd.Series[float], other: pd.Series[float]) -> bool:
    of_ratio = comparison.ratio(one, other)
    return comparison.difference(one, other).excludes(0) if math.isnan(of_ratio.value) else of_ratio.excludes(1)
