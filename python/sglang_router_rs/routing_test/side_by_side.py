"""A comparison as text: its metrics side by side, for the terminal and for the cells of a page.

Takes the tables of ``comparison``; what is not known is an empty cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .comparison import Estimate
from .metrics import COSTS, METRICS, Variant

# Columns of a table for the terminal.
WIDTH = 120


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
        means = [it.value for it in estimates]
        if all(map(math.isnan, means)):
            continue
        # Counts have no unit.
        whole = not metric.unit and all(mean == round(mean) for mean in means)
        places = 0 if whole else decimals(means)
        cells = tuple(with_interval(it, places) for it in estimates)
        found.append(Line(metric.label, metric.unit, cells, _best(means, metric.better)))
    return found


def changes(of: pd.DataFrame) -> list[Line]:
    """How far each policy is from the first one, such as ``-12.3 % [-14.0, -10.5]``; none with one policy."""
    others = [row for (policy, _), row in _rows(of) if policy != of.index[0][0]]
    found = []
    for metric in METRICS if others else ():
        cells = tuple(_percent(row[metric.name]) for row in others)
        if metric.best and any(cells):
            found.append(Line(metric.label, "", cells, (False,) * len(cells)))
    return found


def labels(policies: Iterable[str]) -> dict[str, str]:
    """What to call each policy: a file without its directories, but for as many as tell it from another one."""
    names = list(dict.fromkeys(policies))
    return {name: _label(name, [other for other in names if other != name]) for name in names}


def _label(name: str, others: Sequence[str]) -> str:
    for count in range(1, name.count("/") + 1):
        label = _last_parts(name, count)
        if all(_last_parts(other, count) != label for other in others):
            return label
    return name


def _last_parts(path: str, count: int) -> str:
    return "/".join(path.split("/")[-count:])


def shortened(name: str, most: int) -> str:
    """A name in at most so many characters; of ``FILE.py:NAME`` the end is kept."""
    if len(name) <= most:
        return name
    return f"…{name[1 - most :]}" if ".py:" in name else f"{name[: most - 1]}…"


def text(of: pd.DataFrame) -> str:
    """A table for the terminal, at most ``WIDTH`` columns wide."""
    of = _labelled(of)
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
        title = f"Change from {_head(first)}, in percent of its mean, paired by load{interval}:"
        parts += ["", title, *_blocks(compared, others)]
    return "\n".join(parts) + "\n"


def tracking_text(cost: pd.DataFrame) -> str:
    """What tracking adds, for the terminal: a column per policy; empty for an empty table."""
    found = tracking_lines(cost)
    if not found:
        return ""
    cost = _labelled(cost)
    policies = [(str(policy), True) for policy in cost.index.unique("policy")]
    return "\n".join(["Tracking on - off, paired by load:", *_blocks(found, policies)]) + "\n"


def tracking_lines(cost: pd.DataFrame) -> list[Line]:
    """What tracking adds, such as ``+2.2 [-3.1, +7.4]``; a cell per policy, empty where nothing is known."""
    found = []
    for metric in COSTS if len(cost) else ():
        rows = [row for _, row in cost.xs(metric.name, level="metric").iterrows()]
        added = [_estimate(row, "difference", "ci") for row in rows]
        sizes = [abs(end) for more in added for end in (more.value, more.low, more.high) if not math.isnan(end)]
        places = decimals([max(sizes, default=0)])
        cells = tuple(signed(more, places) for more in added)
        if any(cells):
            found.append(Line(metric.label, metric.unit, cells, (False,) * len(cells)))
    return found


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


def signed(more: Estimate, places: int, unit: str = "") -> str:
    """A difference with its sign, and its interval if there is one; empty if it is not known."""
    if math.isnan(more.value):
        return ""
    interval = "" if math.isnan(more.low) else f" [{more.low:+,.{places}f}, {more.high:+,.{places}f}]"
    return f"{more.value:+,.{places}f}{unit}{interval}"


def _percent(row: Any) -> str:
    # Of zero there are no percents.
    if not row["first_mean"]:
        return ""
    return signed(_estimate(row, "difference", "difference").times(100 / row["first_mean"]), 1, " %")


def variant_label(variant: Variant, of: Iterable[Variant]) -> str:
    """The policy, and whether it was tracked if that differs among them."""
    policy, tracking = variant
    return policy if len({tracked for _, tracked in of}) == 1 else f"{policy}, tracking {'on' if tracking else 'off'}"


def _rows(of: pd.DataFrame) -> Iterator[tuple[Variant, Any]]:
    for variant, (_, row) in zip(of.index, of.iterrows(), strict=True):
        yield variant, row


def _estimate(row: Any, value: str, interval: str) -> Estimate:
    return Estimate(row[value], row[f"{interval}_low"], row[f"{interval}_high"])


def _best(means: list[float], better: str) -> tuple[bool, ...]:
    values = [mean for mean in means if not math.isnan(mean)]
    if not better or min(values) == max(values):
        return (False,) * len(means)
    best = min(values) if better == "lower" else max(values)
    return tuple(mean == best for mean in means)


def _blocks(of: list[Line], columns: list[Variant]) -> Iterator[str]:
    # Under each other, each with as many columns as fit.
    labels = [f"{line.label} ({line.unit})" if line.unit else line.label for line in of]
    heads = [(_head(policy), f"tracking {'on' if tracking else 'off'}") for policy, tracking in columns]
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


def _labelled(of: pd.DataFrame) -> pd.DataFrame:
    return of.rename(index=labels(of.index.unique("policy")), level="policy")


def _head(name: str) -> str:
    return shortened(name, 24)
