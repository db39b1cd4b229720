"""What a comparison shows, in sentences computed from it. A difference is claimed only where the data hold it.

A metric is put in words over the repeats that all policies have, so that the means of a sentence, their differences and
the order of the policies come from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from . import comparison
from .comparison import mean_interval
from .metrics import METRICS, Metric, Run, failed
from .side_by_side import decimals, signed, with_interval

# What would tell differences from chance.
REPEATS = "More repeats (--repeats)"
SEEDS = "Other --seed values"


def findings(runs: Sequence[Run], more: str = REPEATS) -> list[str]:
    """The sentences, of the runs that ``comparison.shown`` selects.

    Args:
        runs: what is compared.
        more: how whoever made the runs gets more of them, where one run does not suffice.

    Raises:
        ValueError: as ``comparison.measured``.
    """
    selected = comparison.shown(runs)
    values = comparison.measured([run for its in selected.values() for run in its]).droplevel("tracking")
    said = [_failures(selected)]
    if len(selected) > 1:
        said.append(_confidence([len(its) for its in selected.values()], more))
        # Repeats by policies; a policy of which the metric is not known is not spoken of.
        samples = ((metric, values[metric.name].unstack("policy")[list(selected)]) for metric in METRICS if metric.best)
        said += [_best(sample.dropna(axis=1, how="all").dropna(), metric) for metric, sample in samples]
    return [sentence for sentence in said if sentence]


def _failures(selected: dict[str, list[Run]]) -> str:
    counts = {
        policy: (sum(len(failed(run.rows)) for run in its), sum(len(run.rows) for run in its))
        for policy, its in selected.items()
    }
    some = [f"{policy} {broken:,} of {total:,}" for policy, (broken, total) in counts.items() if broken]
    if not some:
        return f"All {sum(total for _, total in counts.values()):,} requests succeeded."
    return f"Requests that failed: {', '.join(some)}. Latencies and rates leave them out."


def _confidence(repeats: Sequence[int], more: str) -> str:
    if max(repeats) < 2:
        return f"One run per policy: nothing tells a difference from chance, and there are no intervals. {more} would."
    least, most = min(repeats), max(repeats)
    count = f"{most}" if least == most else f"{least} to {most}"
    return (
        f"{count} repeats: policies are told apart where the 95 % interval of their difference, paired by load, leaves "
        "out 0, over the repeats that all of them have. Intervals are not corrected for the number of comparisons."
    )


def _best(values: pd.DataFrame, metric: Metric) -> str:
    # The best policy of a metric, how far the next one is, and whom it is not told apart from.
    if len(values.columns) < 2 or values.empty:
        return ""
    means = values.mean()
    ranked = list(means.sort_values(ascending=metric.better == "lower", kind="stable").index)
    best, others = ranked[0], ranked[1:]
    # Means are as exact as what is between the first two.
    places = decimals([*means, means[others[0]] - means[best]])
    if means[best] == means[ranked[-1]]:
        return f"{metric.best}: the same for all, {means[best]:,.{places}f} {metric.unit}."
    more = {policy: mean_interval(values[policy] - values[best]) for policy in others}
    own, following = with_interval(mean_interval(values[best]), places), others[0]
    sentence = (
        f"{metric.best}: {best}, {own} {metric.unit}; next {following}, {means[following]:,.{places}f} "
        f"({signed(more[following], places)})."
    )
    if len(values) < 2:
        return sentence
    unclear = [policy for policy in others if not more[policy].excludes(0)]
    if not unclear:
        return f"{sentence} Told apart from every other policy."
    return f"{sentence} Not told apart from {', '.join(unclear)}."
