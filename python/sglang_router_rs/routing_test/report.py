"""A comparison as one HTML file that needs nothing else: no script, no download, light and dark, wide and narrow.

Numbers come from ``comparison`` and ``side_by_side``, sentences from ``findings``, pictures from ``plots``; here they
are put on a page. Every text from outside is escaped. Text and grid of the pictures take the colours of the page.
"""

from __future__ import annotations

import importlib.resources
import io
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from . import comparison, plots, side_by_side
from .comparison import NODE_COLUMNS
from .findings import REPEATS, findings
from .metrics import METRICS, Run, failed
from .results import save_text

TITLE = "Routing policies on the same load"
# Kinds of errors that are listed; further ones are counted.
ERRORS = 30
# Characters of an error that are shown.
ERROR_LENGTH = 300
# Of the parts of a picture that are drawn as pixels.
DPI = 160


@dataclass(frozen=True)
class Plot:
    """A picture of the page, and how to read it."""

    title: str
    draw: Callable[[Sequence[Run]], Figure]
    caption: str


PLOTS = (
    Plot(
        "Latencies",
        plots.latency_cdfs,
        "At each latency, the share of all requests that had at most this one, over all repeats: further left and "
        "steeper is better. A curve ends below 100 % by the requests that failed, or have no such latency.",
    ),
    Plot(
        "TTFT over time",
        plots.ttft_over_time,
        "Each dot is a request, at the time when it was sent; the line is the rolling median over a 25th of "
        "them, at least 9. A line that rises to the right is a load that the workers cannot keep up with. At most "
        f"{plots.CLOUD_POINTS:,} dots per policy are drawn, evenly chosen. "
        "Crosses at the upper edge are requests that failed. First repeat.",
    ),
    Plot(
        "Requests per worker over time",
        plots.requests_over_time,
        "Left the requests per second that were sent to each worker, on top of each other; right the share of each. "
        "Equal bands are an even spread. Requests that no worker was picked for are not in it. First repeat.",
    ),
    Plot(
        "Prefix hits",
        plots.prefix_hits,
        "Prompt tokens that were in the worker's cache, as a share of all prompt tokens; empty where a request told no "
        "count. Over time: first repeat. In total: mean of the repeats and its 95 % interval. Per worker: all repeats.",
    ),
    Plot(
        "Timeline per worker",
        plots.timeline,
        "What each worker had at hand: with few requests a bar for each, from sending to its end; with many the number "
        "in flight by colour. Lanes of different colour at the same time are workers that waited while others were "
        f"busy. Crosses are requests that failed (at most {plots.CROSSES:,} per policy). First repeat.",
    ),
)


@dataclass(frozen=True)
class Words:
    """What a page says besides what was measured."""

    # Lines below the title.
    header: Sequence[str] = ()
    # By title, what a reader must know before believing the numbers, such as which runs were left out.
    alerts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # As ``findings.findings`` takes it.
    more: str = REPEATS


def write(
    runs: Sequence[Run],
    settings: Mapping[str, str],
    machine: Mapping[str, str],
    path: Path,
    words: Words,
) -> Path:
    """Write the page, whole or not at all; returns where it is.

    Args:
        runs: what is compared, whole runs only; the first one's policy is what others are compared with.
        settings: what was run, as names and values.
        machine: where, as ``about.machine`` tells.
        path: the file; overwritten if it is there.
        words: what it says besides.

    Raises:
        ValueError: as ``comparison.measured``.
        OSError: the file cannot be written.
    """
    labels = side_by_side.labels(run.policy for run in runs)
    runs = [replace(run, policy=labels[run.policy]) for run in runs]
    parts = [
        f"<h1>{escape(TITLE)}: {escape(', '.join(labels.values()))}</h1>",
        *(f"<p>{escape(line)}</p>" for line in words.header),
        _what_was_run(settings, machine),
        *(_alert(title, lines) for title, lines in words.alerts.items()),
        _section("What it shows", _list(findings(runs, words.more))),
        _section("Metrics", _metrics(runs)),
        _tracking(runs),
        *(_section(plot.title, _figure(plot, runs)) for plot in PLOTS),
        _section("Per worker", _per_node(runs)),
        _section("Failures", _failures(runs)),
    ]
    page = string.Template(importlib.resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    return save_text(path, page.substitute(title=escape(TITLE), body="\n".join(filter(None, parts))))


# --- parts of the page ------------------------------------------------------------------------------------------------


def _what_was_run(settings: Mapping[str, str], machine: Mapping[str, str]) -> str:
    at_a_glance = ", ".join(machine[name] for name in ("date", "CPU", "kernel") if name in machine)
    words = _table(["", ""], [*settings.items(), *machine.items()], kind="words")
    return f"<details><summary>What was run: {escape(at_a_glance)}</summary>{words}</details>"


def _alert(title: str, lines: Sequence[str]) -> str:
    return f'<section class="alert"><h2>{escape(title)}</h2>{_list(lines)}</section>' if lines else ""


def _metrics(runs: Sequence[Run]) -> str:
    table = comparison.table(runs)
    variants = list(table.index)
    lines = side_by_side.lines(table)
    heads = ["", *(side_by_side.variant_label(variant, variants) for variant in variants)]
    rows = [[_labelled(line), *line.cells] for line in lines]
    parts = [_table(heads, rows, best=[(False, *line.best) for line in lines])]
    repeats = int(table.xs("repeats", axis=1, level=1).to_numpy().max())
    note = "The best of each line is marked, whether or not others are told apart from it." if len(table) > 1 else ""
    if repeats > 1:
        note += f" ± is half the 95 % interval of the mean over {repeats} repeats (Student's t)."
    parts.append(f'<p class="faint">{note}</p>')
    changes = side_by_side.changes(table)
    if changes:
        first = variants[0][0]
        others = [variant for variant in variants if variant[0] != first]
        heads = ["", *(side_by_side.variant_label(variant, variants) for variant in others)]
        note = f"Change from {escape(first)}, in percent of its mean, paired by load"
        note += ", with their 95 % interval:" if repeats > 1 else ":"
        parts += [f"<p>{note}</p>", _table(heads, [[line.label, *line.cells] for line in changes])]
    meanings = [(metric.label, metric.unit, metric.meaning) for metric in METRICS]
    words = _table(["", "unit", "meaning"], meanings, kind="words")
    parts.append(f"<details><summary>What the metrics are</summary>{words}</details>")
    return "".join(parts)


def _tracking(runs: Sequence[Run]) -> str:
    cost = comparison.tracking_cost(runs)
    lines = side_by_side.tracking_lines(cost)
    if not lines:
        return ""
    rows = [[_labelled(line), *line.cells] for line in lines]
    note = (
        "On - off, paired by load; in brackets the 95 % interval over the repeats, without which nothing tells a "
        "difference from chance. Where it holds 0, no cost was found."
    )
    content = _table(["", *map(str, cost.index.unique("policy"))], rows) + f'<p class="faint">{note}</p>'
    return _section("What tracking costs", content)


def _labelled(line: side_by_side.Line) -> str:
    return f"{line.label} ({line.unit})" if line.unit else line.label


def _figure(plot: Plot, runs: Sequence[Run]) -> str:
    picture = svg(plot.draw(runs), plot.title)
    return f'<figure><div class="scroll">{picture}</div><figcaption>{escape(plot.caption)}</figcaption></figure>'


def svg(figure: Figure, label: str) -> str:
    """A figure as an element of a page, without a background, in the page's colours."""
    written = io.StringIO()
    # The salt makes the same figure the same text.
    with rc_context({"svg.hashsalt": label, "svg.fonttype": "path"}):
        figure.savefig(written, format="svg", transparent=True, dpi=DPI, metadata={"Date": None})
    element = written.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = element.replace(plots.INK, "var(--ink)").replace(plots.GRID, "var(--grid)")
    return element.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _per_node(runs: Sequence[Run]) -> str:
    table = comparison.per_node(runs)
    told = [name for name in NODE_COLUMNS if table[name].notna().any()]
    rows = [[_number(row[name]) for name in told] for _, row in table.iterrows()]
    return _table([NODE_COLUMNS[name] for name in told], rows) + '<p class="faint">Sums and means over all repeats.</p>'


def _number(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.{side_by_side.decimals([value])}f}"


def _failures(runs: Sequence[Run]) -> str:
    broken = pd.concat([failed(run.rows)[["http_status", "error"]].assign(policy=run.policy) for run in runs])
    if broken.empty:
        return "<p>None: every request of these runs succeeded.</p>"
    counts = broken.groupby(["policy", "http_status", "error"], dropna=False, sort=False).size()
    kinds = counts.sort_values(ascending=False, kind="stable").reset_index(name="count")
    rows = [
        [policy, "" if pd.isna(status) else f"{status:g}", f"{count:,}", "" if pd.isna(error) else _cut(str(error))]
        for policy, status, error, count in kinds.head(ERRORS).itertuples(index=False)
    ]
    left = kinds["count"][ERRORS:]
    note = f"<p>And {left.sum():,} failures of {len(left):,} further kinds.</p>" if len(left) else ""
    return _table(["policy", "status", "requests", "error"], rows, kind="words") + note


def _cut(error: str) -> str:
    return error if len(error) <= ERROR_LENGTH else f"{error[: ERROR_LENGTH - 1]}…"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    kind: str = "numbers",
    best: Sequence[Sequence[bool]] | None = None,
) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = []
    for place, row in enumerate(rows):
        marks = best[place] if best else [False] * len(row)
        cells = zip(row, marks, strict=True)
        body.append(
            "".join(
                f'<td class="best">{escape(cell)}</td>' if mark else f"<td>{escape(cell)}</td>" for cell, mark in cells
            )
        )
    shown_head = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f'<div class="scroll"><table class="{kind}">{shown_head}<tbody>{lines}</tbody></table></div>'
