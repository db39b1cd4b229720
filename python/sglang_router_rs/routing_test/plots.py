"""Pictures of a comparison: each function takes the runs and returns a figure that shows one idea.

A policy has the same colour in all of them, by its place among the runs. All show what ``comparison.shown`` selects,
and those over time only its first repeat. Figures are plain objects without pyplot's state. What a plot cannot show, it
says in its place; failed requests are drawn as crosses, counted in titles, or missing from the top of a curve. Every
figure has a bound of what it draws: a curve has at most ``CURVE_POINTS``, a policy ``CLOUD_POINTS`` and ``CROSSES``, a
time axis ``BINS``, a timeline of bars ``BARS`` per policy.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .comparison import mean_interval, shown
from .metrics import Numbers, Run, at, failed, known, nodes, numbers, or_nan
from .results import hit_rate, succeeded
from .side_by_side import shortened

# Told apart by most colour-blind people (after Okabe and Ito), and legible on white and on black.
PALETTE = ("#0c7bdc", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c6bb1", "#8a8a8a")
STYLES = ("-", "--", ":", "-.")
FAILED = "#f0342b"
PREFILL, DECODE, WHOLE = "#d9a400", "#4b6a9b", "#9a9a9a"
# Of text and frames; a page may replace them by its own.
INK, GRID = "#222222", "#d9d9d8"
# Of workers and of counts: its steps differ in lightness too.
SCALE = colormaps["viridis"]
LOST: dict[str, Any] = {"color": FAILED, "alpha": 0.14, "linewidth": 0}
CROSS: dict[str, Any] = {"color": FAILED, "marker": "x", "markersize": 4, "linestyle": "none"}

CURVE_POINTS = 500
CLOUD_POINTS = 2000
CROSSES = 500
BARS = 200
# Bars of one worker under each other; with more they are too thin to see.
ROWS_OF_BARS = 24
BINS = 120

WIDTH_INCHES = 9.5
# Characters in a line of words.
LINE_LENGTH = 130
# Height of a lane of bars, of the distance between two.
LANE = 0.86


def heading(lines: Sequence[str]) -> Figure:
    """Lines of words, such as what was run."""
    shown_lines = [part for line in lines for part in textwrap.wrap(line, LINE_LENGTH)]
    figure = _figure(0.2 + 0.17 * len(shown_lines))
    words = "\n".join(shown_lines)
    figure.text(0.01, 0.5, words, va="center", fontsize=8, color=INK, linespacing=1.3, parse_math=False)
    return figure


def latency_cdfs(runs: Sequence[Run]) -> Figure:
    """Which share of all requests had a TTFT, an E2E latency, of at most so much; one curve per policy."""
    figure = _figure(3.9)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, label in zip(panels, ("ttft", "total_latency"), ("TTFT", "E2E latency"), strict=True):
        samples = {
            policy: np.concatenate([known(run.rows, column) for run in its]) for policy, its in shown(runs).items()
        }
        _frame(axes, title=label, x="s")
        if not any(map(len, samples.values())):
            axes.set_xticks([])
            _instead(axes, f"no {label} in these runs")
            continue
        for (policy, its), style in zip(shown(runs).items(), _styles(runs), strict=True):
            total = sum(len(run.rows) for run in its)
            values = np.sort(samples[policy])
            share = np.arange(1, len(values) + 1) / total * 100
            some = _thinned(len(values), CURVE_POINTS)
            axes.plot(values[some], share[some], label=policy, linewidth=1.6, drawstyle="steps-post", **style)
        if _wide(np.concatenate(list(samples.values()))):
            axes.set_xscale("log")
        axes.set_ylim(0, 102)
    panels[0].set_ylabel("requests [%]", fontsize=9)
    _policy_legend(figure, runs)
    return figure


def ttft_over_time(runs: Sequence[Run]) -> Figure:
    """TTFT of each request by when it was sent, with the rolling median; one panel per policy, on the same axes."""
    firsts = _firsts(runs)
    everything = np.concatenate([known(run.rows, "ttft") for run in firsts.values()])
    if not len(everything):
        return _only_words("no TTFT in these runs")
    figure, panels = _small_multiples(runs, 1.75)
    for (policy, run), axes, style in zip(firsts.items(), panels, _styles(runs), strict=True):
        _frame(axes, title=_title(policy, run))
        rows = succeeded(run.rows).sort_values("to_server_time")
        rows = rows[rows["ttft"].notna()]
        if not len(rows):
            _instead(axes, "no TTFT in this run")
            _crosses(axes, run)
            continue
        sent, ttft = numbers(rows, "to_server_time"), numbers(rows, "ttft")
        some = _thinned(len(rows), CLOUD_POINTS)
        alpha = 0.3 if len(some) > 500 else 0.8
        color = style["color"]
        axes.scatter(sent[some], ttft[some], s=5, alpha=alpha, color=color, linewidths=0, rasterized=True)
        _crosses(axes, run)
        window = max(len(rows) // 25, 9)
        median = pd.Series(ttft).rolling(window, center=True, min_periods=1).median().to_numpy()
        some = _thinned(len(rows), CURVE_POINTS)
        # The outline keeps the line apart from its own cloud.
        axes.plot(sent[some], median[some], color=INK, linewidth=2.6)
        axes.plot(sent[some], median[some], color=color, linewidth=1.4, label=policy)
    if _wide(everything):
        panels[0].set_yscale("log")
    _outer_labels(panels, "sent [s]", "TTFT [s]")
    _shade_losses(panels, runs)
    _legend(figure, [*_cross_key(runs), *_lost_key(runs)])
    return figure


def requests_over_time(runs: Sequence[Run]) -> Figure:
    """Requests per second at each worker, stacked, and the share of each; a row per policy, on the same time axis."""
    firsts = _firsts(runs)
    if not _reached(firsts):
        return _only_words("no request reached a worker")
    names = nodes(runs)
    figure = _figure(0.9 + 1.35 * len(firsts))
    grid = figure.subplots(len(firsts), 2, sharex=True, sharey="col", squeeze=False)
    edges = _edges([numbers(run.rows, "to_server_time") for run in firsts.values()], most=60)
    colors = _node_colors(len(names))
    for (policy, run), (rate, share) in zip(firsts.items(), grid, strict=True):
        counts = np.array([_histogram(numbers(at(run.rows, url), "to_server_time"), edges) for url in names])
        _frame(rate, title=_title(policy, run), y="requests/s")
        _frame(share, y="share [%]")
        if not counts.sum():
            _instead(rate, "no request reached a worker")
            _instead(share, "no request reached a worker")
            continue
        rate.stackplot(edges, _closed(counts / np.diff(edges)), colors=colors, step="post")
        with np.errstate(invalid="ignore"):
            part = np.nan_to_num(100 * counts / counts.sum(axis=0))
        share.stackplot(edges, _closed(part), colors=colors, step="post")
        share.set_ylim(0, 100)
    for axes in grid[-1]:
        axes.set_xlabel("sent [s]", fontsize=9)
    _shade_losses(grid.flatten(), runs)
    handles = [Patch(color=color, label=_short(name)) for color, name in zip(colors, names.values(), strict=True)]
    _legend(figure, [*handles, *_lost_key(runs)])
    return figure


def prefix_hits(runs: Sequence[Run]) -> Figure:
    """Prompt tokens found in the workers' caches: over time, in total, and per worker."""
    policies = shown(runs)
    names = nodes(runs)
    if not any(len(known(run.rows, "cached_tokens")) for its in policies.values() for run in its):
        return _only_words("the workers reported no cached tokens")
    rates = {policy: [_percent_hit(run.rows) for run in its] for policy, its in policies.items()}
    figure = _figure(4.2 + 0.27 * len(policies))
    over_time, total, per_node = figure.subplot_mosaic(
        [["time", "total"], ["node", "node"]], width_ratios=[2, 1]
    ).values()
    _frame(over_time, title="over time", x="sent [s]", y="hit rate [%]")
    _frame(total, title="in total", x="hit rate [%]")
    _frame(per_node, title="per worker: hit rate [%]")
    firsts = _firsts(runs)
    edges = _edges([numbers(run.rows, "to_server_time") for run in firsts.values()], most=40)
    for (policy, run), style in zip(firsts.items(), _styles(runs), strict=True):
        rate = _hit_rates(run, edges)
        told = ~np.isnan(rate)
        middle = (edges[1:] + edges[:-1]) / 2
        over_time.plot(middle[told], rate[told], label=policy, linewidth=1.4, marker="o", markersize=2.5, **style)
    over_time.set_ylim(bottom=0)
    _shade_losses([over_time], runs)

    for place, ((policy, values), style) in enumerate(zip(rates.items(), _styles(runs), strict=True)):
        estimate = mean_interval(values)
        if math.isnan(estimate.value):
            total.text(0, place, " not known", va="center", fontsize=8, color=INK)
            continue
        total.barh(place, estimate.value, color=style["color"], height=0.65, label=policy)
        if not math.isnan(estimate.low):
            total.errorbar(estimate.value, place, xerr=estimate.half_width, color=INK, capsize=3, linewidth=1.2)
    total.set_yticks(range(len(rates)), [_short(policy) for policy in rates])
    total.invert_yaxis()

    cells = np.array([[_hit_rate_at(its, url) for url in names] for its in policies.values()])
    _heat(per_node, cells, list(policies), list(names.values()))
    _policy_legend(figure, runs, _lost_key(runs))
    return figure


def timeline(runs: Sequence[Run]) -> Figure:
    """What each worker had at hand: a bar per request if that is legible, else the number in flight as a heat map."""
    firsts = _firsts(runs)
    if not _reached(firsts):
        return _only_words("no request reached a worker")
    urls = list(nodes(runs))
    if all(_as_bars(run, urls) for run in firsts.values()):
        return _bars(runs)
    return _in_flight(runs)


def _bars(runs: Sequence[Run]) -> Figure:
    firsts = _firsts(runs)
    names = nodes(runs)
    figure = _figure(0.9 + len(firsts) * (0.45 + 0.4 * len(names)))
    panels = figure.subplots(len(firsts), 1, sharex=True, squeeze=False)[:, 0]
    for (policy, run), axes in zip(firsts.items(), panels, strict=True):
        _frame(axes, title=_title(policy, run))
        for lane, url in enumerate(names):
            rows = _sent(run, url)
            if not len(rows):
                continue
            places = np.array(_places(rows))
            height = LANE / (places.max() + 1)
            y = lane - LANE / 2 + (places + 0.5) * height
            start, length = numbers(rows, "to_server_time"), numbers(rows, "server_latency")
            ttft = numbers(rows, "ttft")
            unknown = np.isnan(ttft)
            prefill = np.where(unknown, 0, ttft)
            colors = [WHOLE if whole else DECODE for whole in unknown]
            axes.barh(y, prefill, height * 0.85, start, color=PREFILL)
            axes.barh(y, length - prefill, height * 0.85, start + prefill, color=colors)
            broken = rows.index.isin(failed(rows).index)
            axes.plot((start + length)[broken], y[broken], **CROSS)
        _lanes(axes, list(names.values()))
    panels[-1].set_xlabel("sent until finished [s]", fontsize=9, color=INK)
    _shade_losses(panels, runs)
    meanings = {"until the first content": PREFILL, "after it": DECODE, "first content not known": WHOLE}
    phases = [Patch(color=color, label=label) for label, color in meanings.items()]
    _legend(figure, [*phases, *_cross_key(runs), *_lost_key(runs)])
    return figure


def _in_flight(runs: Sequence[Run]) -> Figure:
    firsts = _firsts(runs)
    names = nodes(runs)
    edges = _edges([numbers(run.rows, "finish_time") for run in firsts.values()], most=BINS)
    middle = (edges[1:] + edges[:-1]) / 2
    counts = {
        policy: np.array([_in_flight_at(_sent(run, url), middle) for url in names]) for policy, run in firsts.items()
    }
    scale = Normalize(0, max(1.0, *(float(count.max()) for count in counts.values())))
    figure, panels = _small_multiples(runs, 0.75 + 0.17 * len(names))
    for (policy, run), axes in zip(firsts.items(), panels, strict=True):
        _frame(axes, title=_title(policy, run), grid=False)
        lanes = np.arange(len(names) + 1) - 0.5
        axes.pcolormesh(edges, lanes, counts[policy], cmap=SCALE, norm=scale, rasterized=True)
        for lane, url in enumerate(names):
            rows = _sent(run, url)
            broken = numbers(failed(rows), "finish_time")
            broken = broken[_thinned(len(broken), CROSSES // len(names))]
            axes.plot(broken, np.full(len(broken), lane), **CROSS)
        _lanes(axes, list(names.values()))
    bar = figure.colorbar(ScalarMappable(scale, SCALE), ax=panels, label="requests in flight", aspect=40, pad=0.01)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)
    _outer_labels(panels, "time [s]")
    _shade_losses(panels, runs)
    _legend(figure, [*_cross_key(runs), *_lost_key(runs)])
    return figure


# --- what is drawn ----------------------------------------------------------------------------------------------------


def _firsts(runs: Sequence[Run]) -> dict[str, Run]:
    return {policy: min(its, key=lambda run: run.repeat) for policy, its in shown(runs).items()}


def _reached(firsts: dict[str, Run]) -> bool:
    return any(run.rows["worker_url"].notna().any() for run in firsts.values())


def _sent(run: Run, url: str) -> pd.DataFrame:
    # Requests that reached this worker, in order.
    return at(run.rows, url).dropna(subset=["to_server_time", "finish_time"]).sort_values("to_server_time")


def _as_bars(run: Run, urls: Sequence[str]) -> bool:
    return len(run.rows) <= BARS and all(max(_places(_sent(run, url)), default=0) < ROWS_OF_BARS for url in urls)


def _places(rows: pd.DataFrame) -> list[int]:
    # The lowest row of bars that is free when a request is sent.
    busy_until: list[float] = []
    places = []
    for start, end in zip(numbers(rows, "to_server_time"), numbers(rows, "finish_time"), strict=True):
        place = next((place for place, until in enumerate(busy_until) if until <= start), len(busy_until))
        busy_until[place : place + 1] = [end]
        places.append(place)
    return places


def _in_flight_at(rows: pd.DataFrame, times: Numbers) -> Numbers:
    sent, finished = np.sort(numbers(rows, "to_server_time")), np.sort(numbers(rows, "finish_time"))
    return np.asarray(
        np.searchsorted(sent, times, "right") - np.searchsorted(finished, times, "right"), dtype=np.float64
    )


def _hit_rates(run: Run, edges: Numbers) -> Numbers:
    # In %, per bin of the times of sending; NaN where nothing is known.
    rows = run.rows[run.rows["to_server_time"].notna()]
    bins = np.digitize(numbers(rows, "to_server_time"), edges[1:-1])
    return np.array([_percent_hit(rows[bins == place]) for place in range(len(edges) - 1)])


def _hit_rate_at(runs: Sequence[Run], url: str) -> float:
    return _percent_hit(pd.concat([at(run.rows, url) for run in runs]))


def _percent_hit(rows: pd.DataFrame) -> float:
    return or_nan(hit_rate(rows)) * 100


def _edges(times: Sequence[Numbers], most: int) -> Numbers:
    # Bins from 0 on, with some 25 requests of a run in each.
    known_times = [values[~np.isnan(values)] for values in times]
    longest = max((float(values.max()) for values in known_times if len(values)), default=0.0)
    count = min(max(max(map(len, known_times)) // 25, 8), most)
    return np.linspace(0, max(longest, 1e-3), count + 1)


def _histogram(values: Numbers, edges: Numbers) -> Numbers:
    return np.asarray(np.histogram(values[~np.isnan(values)], edges)[0], dtype=np.float64)


def _closed(counts: Numbers) -> Numbers:
    # For steps from edge to edge: the last bin is there twice, for both its ends.
    return np.concatenate([counts, counts[:, -1:]], axis=1)


def _thinned(count: int, most: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    # Evenly spread places, with the first and the last.
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(np.int64))


def _wide(values: Numbers) -> bool:
    # A linear axis would leave most of them in a corner.
    if not len(values) or values.min() <= 0:
        return False
    low, high = np.percentile(values, [1, 99])
    return bool(high / low > 20)


# --- how it is drawn --------------------------------------------------------------------------------------------------


def _figure(height_inches: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def _small_multiples(runs: Sequence[Run], height_inches: float) -> tuple[Figure, list[Axes]]:
    # A panel per policy, on shared axes.
    count = len(shown(runs))
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = _figure(0.8 + height_inches * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[max(count - columns, 0) : count]:
        axes.tick_params(labelbottom=True)
    return figure, list(grid[:count])


def _frame(axes: Axes, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color=GRID, linewidth=0.6)


def _outer_labels(panels: Sequence[Axes], x: str, y: str = "") -> None:
    # Below the last panel of each column, and left of the first column.
    columns = min(len(panels), 2)
    for axes in panels[-columns:]:
        axes.set_xlabel(x, fontsize=9, color=INK)
    for axes in panels[::columns]:
        axes.set_ylabel(y, fontsize=9, color=INK)


def _instead(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=INK)


def _only_words(words: str) -> Figure:
    figure = _figure(1)
    figure.text(0.5, 0.5, words, ha="center", va="center", fontsize=9, color=INK)
    return figure


def _title(policy: str, run: Run) -> str:
    broken = len(failed(run.rows))
    return f"{_short(policy)}: {broken:,} of {len(run.rows):,} failed" if broken else _short(policy)


def _short(name: str) -> str:
    # Dollars would be read as formulae.
    return shortened(name, 28).replace("$", r"\$")


def _lanes(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _heat(axes: Axes, cells: Numbers, rows: list[str], columns: list[str]) -> None:
    # Percentages, each written in its cell.
    axes.pcolormesh(cells, cmap=SCALE, vmin=0, vmax=100, edgecolors="none")
    for (row, column), value in np.ndenumerate(cells):
        words, color = ("", INK) if math.isnan(value) else (f"{value:.0f}", "#ffffff" if value < 55 else "#000000")
        axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", fontsize=8, color=color)
    slanted = max(map(len, columns)) * len(columns) > 120
    turn: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(np.arange(len(columns)) + 0.5, [_short(column) for column in columns], **turn)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_short(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False)


def _styles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    # By place among the policies; with more than there are colours, lines differ too.
    return [
        {"color": PALETTE[place % len(PALETTE)], "linestyle": STYLES[place // len(PALETTE) % len(STYLES)]}
        for place in range(len(shown(runs)))
    ]


def _node_colors(count: int) -> list[Any]:
    return [SCALE(place) for place in np.linspace(0.08, 0.95, count)]


def _policy_legend(figure: Figure, runs: Sequence[Run], further: Sequence[Patch] = ()) -> None:
    keys = zip(shown(runs), _styles(runs), strict=True)
    lines = [Line2D([], [], label=_short(policy), linewidth=2, **style) for policy, style in keys]
    _legend(figure, [*lines, *further])


def _crosses(axes: Axes, run: Run) -> None:
    # Failed requests at the upper edge, by when they were sent or, if they never were, should have been.
    broken = failed(run.rows)
    sent = numbers(broken, "to_server_time")
    times = np.where(np.isnan(sent), numbers(broken, "arrival_time"), sent)
    times = times[_thinned(len(times), CROSSES)]
    if len(times):
        axes.plot(times, np.full(len(times), 0.96), transform=axes.get_xaxis_transform(), **CROSS)


def _cross_key(runs: Sequence[Run]) -> list[Line2D]:
    any_failed = any(len(failed(run.rows)) for run in _firsts(runs).values())
    return [Line2D([], [], label="failed", **CROSS)] if any_failed else []


def _losses(runs: Sequence[Run]) -> set[tuple[float, float]]:
    return {loss for run in _firsts(runs).values() for loss in run.losses}


def _shade_losses(panels: Iterable[Axes], runs: Sequence[Run]) -> None:
    # Last of all: axes that have what they show are not to grow.
    for axes in panels:
        low, high = axes.get_xlim()
        for begin, end in _losses(runs):
            # Behind what has colours of its own; there its edges are seen.
            axes.axvspan(min(begin, high), min(end, high), zorder=0, **LOST)
            for edge in filter(math.isfinite, (begin, end)):
                axes.axvline(edge, color=FAILED, linestyle="--", linewidth=0.8)
        axes.set_xlim(low, high)


def _lost_key(runs: Sequence[Run]) -> list[Patch]:
    return [Patch(label="a worker is lost", **LOST)] if _losses(runs) else []


def _legend(figure: Figure, keys: Sequence[Line2D | Patch]) -> None:
    if not keys:
        return
    longest = max(len(str(key.get_label())) for key in keys)
    columns = min(max(110 // (longest + 6), 1), 8, len(keys))
    # A label that begins with an underscore would be left out, so texts are set afterwards.
    legend = figure.legend(
        handles=list(keys),
        labels=["-"] * len(keys),
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
    )
    for text, key in zip(legend.get_texts(), keys, strict=True):
        text.set(text=str(key.get_label()), color=INK)
