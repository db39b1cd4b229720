"""Runs side by side: the table against numbers worked out by hand, what plots show, a page that needs nothing else."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from sglang_router_rs.routing_test import about, comparison, metrics, plots, report, results, side_by_side
from sglang_router_rs.routing_test.columns import NAMES
from sglang_router_rs.routing_test.findings import SEEDS, findings
from sglang_router_rs.routing_test.metrics import Run

URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2")
DRAWN = (
    plots.latency_cdfs,
    plots.ttft_over_time,
    plots.requests_over_time,
    plots.prefix_hits,
    plots.timeline,
)


def request(**values: Any) -> dict[str, Any]:
    """A row: a request that succeeded, unless told otherwise."""
    row: dict[str, Any] = dict.fromkeys(NAMES)
    row |= {"arrival_time": 0.0, "to_server_time": 0.0, "finish_time": 1.0, "server_latency": 1.0, "total_latency": 1.0}
    row |= {"ttft": 0.1, "itl_mean": 0.01, "success": True, "http_status": 200}
    row |= {
        "prompt_tokens": 100,
        "cached_tokens": 0,
        "completion_tokens": 10,
        "worker_url": URLS[0],
        "node_id": "gpu_0",
    }
    return row | values


def run(policy: str = "random", rows: list[dict[str, Any]] | None = None, **values: Any) -> Run:
    made = results.Results([request()] if rows is None else rows)
    given = {"tracking": True, "repeat": 0, "router_cpu_secs": None, "router_rss_bytes": None}
    given["workers"] = tuple(made.table["worker_url"].dropna().unique())
    return Run(policy=policy, rows=made.table, summary=made.summary(), **(given | values))


def many(policy: str, count: int, nodes: int = 2, **values: Any) -> list[dict[str, Any]]:
    """Rows of a plausible run."""
    draw = np.random.default_rng(len(policy))
    sent = np.sort(draw.uniform(0, 10, count))
    return [
        request(
            arrival_time=at,
            to_server_time=at,
            finish_time=at + took,
            server_latency=took,
            total_latency=took,
            ttft=took / 5,
            cached_tokens=int(draw.integers(0, 100)),
            worker_url=f"http://127.0.0.1:{node}",
            node_id=f"gpu_{node}",
        )
        | values
        for at, took, node in zip(sent, draw.uniform(0.1, 0.5, count), draw.integers(0, nodes, count), strict=True)
    ]


FAILED = {
    "success": False,
    "error": "it broke",
    "http_status": None,
    "ttft": None,
    "itl_mean": None,
    "prompt_tokens": None,
    "cached_tokens": None,
    "completion_tokens": None,
}


def at_latency(secs: float, policy: str = "random", **values: Any) -> Run:
    return run(policy, [request(total_latency=secs)], **values)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


# --- the table --------------------------------------------------------------------------------------------------------


def test_metrics_of_a_run_are_those_worked_out_by_hand() -> None:
    rows = [
        request(ttft=0.1, total_latency=1.0, itl_mean=0.01, cached_tokens=50),
        request(ttft=0.2, total_latency=2.0, itl_mean=0.03, finish_time=2.0),
        request(ttft=0.6, total_latency=6.0, itl_mean=0.02, worker_url=URLS[1], node_id="gpu_1"),
        # Its latencies do not count; that the worker got it does.
        request(**FAILED | {"total_latency": 100.0}),
    ]
    table = comparison.table([run(rows=rows, router_cpu_secs=0.001, router_rss_bytes=3 * 2**20)])
    expected = {
        "requests": 4,
        "failed": 1,
        "ttft_mean": 300,
        "ttft_p50": 200,
        "ttft_p95": 560,
        "ttft_p99": 592,
        "itl_mean": 20,
        "e2e_mean": 3000,
        "e2e_p50": 2000,
        "e2e_p95": 5600,
        "e2e_p99": 5920,
        "completed_per_sec": 1.5,
        "prompt_tokens_per_sec": 150,
        "completion_tokens_per_sec": 15,
        "hit_rate": 50 / 3,
        "request_imbalance": 1.5,
        "prefill_imbalance": 150 / 125,
        "router_cpu": 250,
        "router_memory": 3,
    }
    means = table.xs("mean", axis=1, level=1).loc[("random", True)].to_dict()
    assert means == pytest.approx(expected)


def test_idle_workers_count() -> None:
    workers = tuple(f"http://w:{port}" for port in range(4))
    runs = [run(rows=[request(worker_url=workers[2])] * 3, workers=workers, node_ids={workers[0]: "gpu_9"})]
    line = comparison.table(runs).loc[("random", True)].xs("mean", level=1)
    assert (line["request_imbalance"], line["prefill_imbalance"]) == (4, 4)
    nodes = comparison.per_node(runs).set_index("node")
    assert dict(nodes["requests"]) == {"gpu_0": 3, "gpu_9": 0, workers[1]: 0, workers[3]: 0}
    assert dict(nodes["prompt_tokens"]) == {"gpu_0": 300, "gpu_9": 0, workers[1]: 0, workers[3]: 0}
    for draw in (plots.requests_over_time, plots.prefix_hits, plots.timeline):
        assert {"gpu_9", workers[1]} <= set(texts(draw(runs)))


def test_intervals_are_students() -> None:
    estimate = comparison.mean_interval([10, 12, 14])
    # t(0.975, 2) = 4.302653, s = 2
    half = 4.302653 * 2 / math.sqrt(3)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((12, 12 - half, 12 + half))


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12))
def test_intervals_hold_their_mean(values: list[float]) -> None:
    estimate = comparison.mean_interval(values)
    assert estimate.low <= estimate.value <= estimate.high


def test_one_repeat_has_no_interval() -> None:
    table = comparison.table([at_latency(1), at_latency(2, "other")])
    for statistic in ("ci_low", "ci_high", "difference_low", "difference_high"):
        assert table.xs(statistic, axis=1, level=1).loc[("other", True)].isna().all()
    assert table.loc[("other", True), ("e2e_mean", "difference")] == 1000
    assert "±" not in side_by_side.text(table)


def test_differences_are_paired_by_load() -> None:
    # What differs between the draws is a hundred times what differs between the policies.
    runs = [at_latency(secs, repeat=repeat) for repeat, secs in enumerate((1, 10, 100))]
    runs += [at_latency(secs, "other", repeat=repeat) for repeat, secs in enumerate((2, 12, 103))]
    line = comparison.table(runs).loc[("other", True)]["e2e_mean"]
    # t(0.975, 2) = 4.302653, s = 1 of 1, 2, 3 s
    half = 4302.653 / math.sqrt(3)
    found = [line[name] for name in ("difference", "difference_low", "difference_high", "first_mean")]
    assert found == pytest.approx([2000, 2000 - half, 2000 + half, 37000])
    assert line["pairs"] == 3
    percent = f"{100 * 2000 / 37000:+.1f} % [{100 * (2000 - half) / 37000:+.1f}, {100 * (2000 + half) / 37000:+.1f}]"
    assert percent in side_by_side.text(comparison.table(runs))


def test_a_repeat_without_its_pair_is_left_out_of_differences() -> None:
    runs = [at_latency(1, repeat=0), at_latency(4, repeat=1), at_latency(2, "other", repeat=0)]
    line = comparison.table(runs).loc[("other", True)]["e2e_mean"]
    assert (line["difference"], line["first_mean"], line["pairs"]) == (1000, 1000, 1)


def test_of_zero_there_are_no_percents() -> None:
    table = comparison.table([run(), run("other", [request(cached_tokens=50)])])
    assert table.loc[("other", True), ("hit_rate", "difference")] == 50
    assert "prefix hit rate" not in [line.label for line in side_by_side.changes(table)]


def test_tracking_costs_the_difference_of_its_pairs() -> None:
    runs = [run(tracking=False, repeat=k, router_cpu_secs=secs) for k, secs in enumerate((10e-6, 20e-6))]
    runs += [run(tracking=True, repeat=k, router_cpu_secs=secs) for k, secs in enumerate((11e-6, 23e-6))]
    cost = comparison.tracking_cost([*runs, run("untracked", tracking=False)])
    assert set(cost.index.unique("policy")) == {"random"}
    cpu = cost.loc[("random", "router_cpu")]
    # t(0.975, 1) = 12.7062, s = √2
    assert [cpu["difference"], cpu["ci_high"]] == pytest.approx([2, 14.7062], rel=1e-5)
    assert (cpu["off"], cpu["on"]) == pytest.approx((15, 17))
    assert "+2.0 [-10.7, +14.7]" in side_by_side.tracking_text(cost)


def test_without_pairs_tracking_costs_nothing_known() -> None:
    cost = comparison.tracking_cost([run()])
    assert cost.empty
    assert side_by_side.tracking_text(cost) == ""


@pytest.mark.parametrize(
    ("column", "unknown"),
    [
        ("completion_tokens", {"completion_tokens_per_sec"}),
        ("cached_tokens", {"hit_rate", "prefill_imbalance"}),
        ("prompt_tokens", {"hit_rate", "prefill_imbalance", "prompt_tokens_per_sec"}),
    ],
)
def test_a_missing_count_makes_every_sum_unknown(column: str, unknown: set[str]) -> None:
    at_other = {"worker_url": URLS[1], "node_id": "gpu_1"}
    runs = [run(rows=[request(), request(**at_other | {column: None}), request(**FAILED)])]
    means = comparison.table(runs).loc[("random", True)].xs("mean", level=1)
    assert set(means.index[means.isna()]) == unknown | {"router_cpu", "router_memory"}
    nodes = comparison.per_node(runs).set_index("node")
    empty = {"completion_tokens", "hit_rate", "prompt_tokens"} & (unknown | {column})
    assert set(nodes.columns[nodes.loc["gpu_1"].isna()]) == empty
    assert nodes.loc["gpu_0"].notna().all()


def test_untracked_runs_know_their_workers_by_the_names_of_tracked_ones() -> None:
    runs = [run(), run(tracking=False, rows=[request(node_id=None), request(worker_url=URLS[1], node_id=None)])]
    assert metrics.nodes(runs) == {URLS[0]: "gpu_0", URLS[1]: URLS[1]}


def test_workers_of_the_same_name_stay_two() -> None:
    names = metrics.nodes([run(rows=[request(), request(worker_url=URLS[1])])])
    assert list(names.values()) == [f"gpu_0 ({url})" for url in URLS]


def test_workers_are_in_the_order_of_their_numbers() -> None:
    rows = [request(worker_url=f"http://w:{port}", node_id=f"gpu_{port}") for port in (10, 9, 100)]
    assert list(metrics.nodes([run(rows=rows)]).values()) == ["gpu_9", "gpu_10", "gpu_100"]


def test_requests_without_a_worker_have_a_line_of_their_own() -> None:
    table = comparison.per_node([run(rows=[request(), request(**FAILED | {"worker_url": None, "node_id": None})])])
    assert list(table["node"]) == ["gpu_0", comparison.NO_WORKER]
    assert list(table["share"]) == [50, 50]
    assert list(table["failed"]) == [0, 1]


def test_runs_that_cannot_be_compared_are_errors() -> None:
    with pytest.raises(ValueError, match="policy random, tracking True, repeat 0"):
        comparison.table([run(), run()])
    with pytest.raises(ValueError, match="no runs"):
        comparison.table([])
    with pytest.raises(ValueError, match=r"policy random.* not whole \(interrupted\)"):
        comparison.table([run(flaw="interrupted")])


# --- which runs count -------------------------------------------------------------------------------------------------


def test_whole_runs_are_compared_in_the_order_of_the_plan() -> None:
    planned = [("a", True, 0), ("a", True, 1), ("b", True, 0), ("b", True, 1)]
    a, b = run("a", repeat=1), run("b")
    assert comparison.whole([run("a", flaw="interrupted"), b, a], planned) == [a, b]
    assert comparison.left_out([run(*it[:1], tracking=it[1], repeat=it[2]) for it in planned], planned) == []


def test_what_is_left_out_is_told_with_its_reason() -> None:
    planned = [(policy, tracking, repeat) for policy in "abc" for tracking in (True, False) for repeat in (0, 1)]
    runs = [run("a"), run("a", repeat=1, flaw="no worker is certain"), run("b", tracking=False, flaw="interrupted")]
    assert comparison.left_out(runs, planned) == [
        "3 of 12 runs were made.",
        "2 of 3 runs left out of means, intervals and sentences: a, tracking on, repeat 2: no worker is certain; "
        "b, tracking off, repeat 1: interrupted.",
        "No whole run, and so not compared: a, tracking off; b, tracking on; b, tracking off; c, tracking on; "
        "c, tracking off.",
    ]


# --- the table as text, CSV, JSON -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policies", [1, 2, 6, 9])
def test_text_fits_the_terminal(policies: int) -> None:
    runs = [
        at_latency(1 + k + repeat / 7, f"a_policy_with_a_long_name_{k}", repeat=repeat, tracking=tracking)
        for k in range(policies)
        for repeat in range(3)
        for tracking in (True, False)
    ]
    text = side_by_side.text(comparison.table(runs))
    assert max(map(len, text.splitlines())) <= side_by_side.WIDTH
    assert text.count("E2E p99 (ms)") >= 1


def test_a_file_is_called_by_as_little_as_tells_it_apart() -> None:
    far = "/a/long/way/to/mine.py:choose"
    assert side_by_side.labels(["random", far]) == {"random": "random", far: "mine.py:choose"}
    assert list(side_by_side.labels([far, "x/to/mine.py:choose", "mine.py:choose"]).values()) == [
        "way/to/mine.py:choose",
        "x/to/mine.py:choose",
        "mine.py:choose",
    ]
    assert side_by_side.shortened("a_long_way/to/mine.py:choose", 16) == "…/mine.py:choose"
    assert side_by_side.shortened("shortest_queue", 10) == "shortest_…"


def test_tables_and_plots_call_a_file_by_its_name(tmp_path: Path) -> None:
    far = "/a/very/long/way/to/a/file/of/ones/own/mine.py:choose"
    runs = [run("random", many("random", 40)), run(far, many("mine", 40))]
    assert "mine.py:choose" in side_by_side.text(comparison.table(runs)).splitlines()[0]
    html = page(tmp_path, runs)
    assert "<td>mine.py:choose</td>" in html
    assert far not in html


def test_text_marks_the_best_of_each_line() -> None:
    text = side_by_side.text(comparison.table([at_latency(1), at_latency(2, "other")]))
    line = next(line for line in text.splitlines() if line.startswith("E2E mean"))
    assert line.split()[-2:] == ["1,000*", "2,000"]
    assert "+100.0 %" in text
    # Nobody is better where all are the same, and a metric that nobody knows has no line.
    assert "*" not in next(line for line in text.splitlines() if line.startswith("TTFT mean"))
    assert "router CPU" not in text


def test_text_shows_intervals_with_the_places_of_their_means() -> None:
    runs = [at_latency(secs, repeat=repeat) for repeat, secs in enumerate((0.010, 0.012, 0.014))]
    assert "12.0 ±5.0" in side_by_side.text(comparison.table(runs))


def test_csv_is_tidy_and_empty_where_nothing_is_known() -> None:
    made = comparison.tidy(comparison.table([at_latency(1.5, tracking=False)])).to_csv(index=False)
    rows = list(csv.DictReader(io.StringIO(made)))
    assert list(rows[0]) == ["policy", "tracking", "metric", "unit", "mean", "ci_low", "ci_high", "repeats"]
    found = {row["metric"]: row for row in rows}
    assert found["e2e_mean"] == {
        "policy": "random",
        "tracking": "False",
        "metric": "e2e_mean",
        "unit": "ms",
        "mean": "1500.0",
        "ci_low": "",
        "ci_high": "",
        "repeats": "1",
    }
    assert (found["router_cpu"]["mean"], found["router_cpu"]["repeats"]) == ("", "0")


def test_json_has_null_where_nothing_is_known(tmp_path: Path) -> None:
    runs = [at_latency(1), at_latency(3, "other")]
    made = comparison.as_dict(comparison.table(runs), comparison.tracking_cost(runs))
    text = results.save_json(made, tmp_path / "made.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["baseline"] == "random"
    of = {(row["policy"], row["metric"]): row for row in content["differences"]}
    assert of["other", "e2e_mean"]["difference"] == pytest.approx(2000)
    assert of["other", "e2e_mean"]["difference_low"] is None


# --- findings ---------------------------------------------------------------------------------------------------------


def said(runs: list[Run], start: str) -> str:
    return next(sentence for sentence in findings(runs) if sentence.startswith(start))


def test_a_clear_difference_is_claimed() -> None:
    runs = [at_latency(secs, repeat=repeat) for repeat, secs in enumerate((2.0, 4.1, 8.0))]
    runs += [at_latency(secs, "fast", repeat=repeat) for repeat, secs in enumerate((1.0, 3.0, 7.1))]
    sentence = said(runs, "Lowest mean E2E")
    assert "fast" in sentence
    assert sentence.endswith("Told apart from every other policy.")


def test_a_difference_within_chance_is_not() -> None:
    runs = [at_latency(secs, repeat=repeat) for repeat, secs in enumerate((1.0, 2.0, 3.0))]
    runs += [at_latency(secs, "other", repeat=repeat) for repeat, secs in enumerate((1.2, 1.7, 2.9))]
    assert said(runs, "Lowest mean E2E").endswith("Not told apart from random.")


def test_a_value_of_zero_is_told_apart_by_its_difference() -> None:
    runs = [run(repeat=repeat) for repeat in range(3)]
    runs += [run("hits", [request(cached_tokens=50 + repeat)], repeat=repeat) for repeat in range(3)]
    assert said(runs, "Highest prefix").endswith("Told apart from every other policy.")


def test_means_and_difference_of_a_sentence_agree() -> None:
    # The mean of the ratios would prefer the other one.
    runs = [at_latency(secs, "a", repeat=repeat) for repeat, secs in enumerate((1.0, 9.0))]
    runs += [at_latency(secs, "b", repeat=repeat) for repeat, secs in enumerate((2.0, 7.0))]
    sentence = said(runs, "Lowest mean E2E")
    assert sentence.startswith("Lowest mean E2E: b, 4,500 ±")
    assert "; next a, 5,000 (+500 [" in sentence


def test_sentences_are_over_the_repeats_that_all_have() -> None:
    # The third draw, which only one policy got, is the light one.
    runs = [at_latency(secs, "a", repeat=repeat) for repeat, secs in enumerate((5.0, 5.0, 0.1))]
    runs += [at_latency(secs, "b", repeat=repeat) for repeat, secs in enumerate((4.0, 4.0))]
    assert said(runs, "Lowest mean E2E").startswith("Lowest mean E2E: b, 4,000 ms; next a, 5,000 (+1,000")
    assert said(runs, "2 to 3 repeats")


def test_a_policy_whose_metric_is_not_known_is_not_spoken_of() -> None:
    runs = [run("a"), run("b", [request(ttft=0.2)]), run("c", [request(ttft=None)])]
    assert "c" not in said(runs, "Lowest mean TTFT").split(": ")[1]


def test_one_run_each_claims_nothing() -> None:
    found = " ".join(findings([at_latency(1), at_latency(2, "other")]))
    assert "nothing tells a difference from chance" in found
    assert "old apart" not in found


def test_how_to_get_more_runs_is_told() -> None:
    runs = [at_latency(1), at_latency(2, "other")]
    assert any("More repeats (--repeats) would." in sentence for sentence in findings(runs))
    assert any("Other --seed values would." in sentence for sentence in findings(runs, SEEDS))


def test_equal_policies_have_no_winner() -> None:
    assert said([run(), run("other")], "Lowest mean TTFT") == "Lowest mean TTFT: the same for all, 100 ms."


def test_failures_are_told_first() -> None:
    assert findings([run(rows=[request(), request(**FAILED)])])[0].startswith("Requests that failed: random 1 of 2.")
    assert findings([run()])[0] == "All 1 requests succeeded."


# --- plots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("count", [40, 400])
def test_every_plot_names_every_policy(draw: Any, count: int) -> None:
    policies = ["random", "round_robin", "cache_aware"]
    figure = draw([run(policy, many(policy, count)) for policy in policies])
    assert set(policies) <= set(texts(figure))


@pytest.mark.parametrize("draw", [plots.requests_over_time, plots.prefix_hits, plots.timeline])
def test_plots_of_workers_name_every_worker(draw: Any) -> None:
    found = texts(draw([run(rows=many("random", 600, nodes=16))]))
    assert {f"gpu_{node}" for node in range(16)} <= set(found)


def test_a_policy_has_the_same_colour_everywhere() -> None:
    runs = [run(policy, many(policy, 100)) for policy in ("random", "cache_aware")]
    curve = [line for line in plots.latency_cdfs(runs).axes[1].lines if line.get_label() == "cache_aware"]
    median = [line for line in plots.ttft_over_time(runs).axes[1].lines if line.get_label() == "cache_aware"]
    assert curve[0].get_color() == median[0].get_color() == plots.PALETTE[1]


def test_a_curve_ends_below_all_by_what_failed() -> None:
    rows = [*many("random", 30), *many("random", 10, **FAILED)]
    curve = plots.latency_cdfs([run(rows=rows)]).axes[1].lines[0]
    assert float(np.max(curve.get_ydata())) == 75


@pytest.mark.parametrize("draw", [plots.ttft_over_time, plots.requests_over_time, plots.timeline])
@pytest.mark.parametrize("count", [30, 400])
def test_failed_requests_are_told(draw: Any, count: int) -> None:
    figure = draw([run(rows=[*many("random", count), *many("random", 7, **FAILED)])])
    assert f"random: 7 of {count + 7} failed" in texts(figure)


@pytest.mark.parametrize("draw", [plots.latency_cdfs, plots.ttft_over_time])
def test_plots_without_ttft_say_so(draw: Any) -> None:
    figure = draw([run(rows=many("random", 50, ttft=None))])
    assert "no TTFT in these runs" in texts(figure)


def test_plots_without_cached_tokens_say_so() -> None:
    assert "the workers reported no cached tokens" in texts(
        plots.prefix_hits([run(rows=[request(cached_tokens=None)])])
    )


def test_a_hit_rate_of_which_a_part_is_unknown_is_not_drawn() -> None:
    figure = plots.prefix_hits([run(rows=[request(cached_tokens=50), request(cached_tokens=None)])])
    assert " not known" in texts(figure)


@pytest.mark.parametrize("draw", [plots.requests_over_time, plots.timeline])
def test_plots_without_workers_say_so(draw: Any) -> None:
    figure = draw([run(rows=[request(**FAILED | {"worker_url": None, "node_id": None})])])
    assert "no request reached a worker" in texts(figure)


@pytest.mark.parametrize("draw", DRAWN[1:])
def test_lost_workers_are_shown(draw: Any) -> None:
    rows = many("random", 40)
    without, figure = draw([run(rows=rows)]), draw([run(rows=rows, losses=((2.0, 4.0), (6.0, math.inf)))])
    assert "a worker is lost" in texts(figure)
    assert "a worker is lost" not in texts(without)
    # The axes are as they were.
    assert [axes.get_xlim() for axes in figure.axes] == [axes.get_xlim() for axes in without.axes]


def test_what_is_drawn_is_bounded() -> None:
    runs = [run(rows=[*many("random", 9000), *many("random", 3000, **FAILED)])]
    for draw in DRAWN:
        for axes in draw(runs).axes:
            assert all(len(line.get_xdata()) <= plots.CLOUD_POINTS for line in axes.lines)  # type: ignore[arg-type]
            assert len(axes.patches) <= plots.BARS
            clouds = [cloud for cloud in axes.collections if isinstance(cloud, PathCollection)]
            assert all(len(cloud.get_offsets()) <= plots.CLOUD_POINTS for cloud in clouds)  # type: ignore[arg-type]


def test_requests_in_flight_share_no_row_of_bars() -> None:
    rows = run(rows=[request(to_server_time=at, finish_time=at + 1) for at in (0.0, 0.5, 1.0, 1.2, 1.4)]).rows
    assert plots._places(rows) == [0, 1, 0, 2, 3]


# --- the page ---------------------------------------------------------------------------------------------------------


def page(path: Path, runs: list[Run], settings: dict[str, str] | None = None, **alerts: list[str]) -> str:
    report.write(runs, settings or {}, about.machine(), path / "report.html", report.Words(alerts=alerts))
    return (path / "report.html").read_text("utf-8")


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    runs = [run(policy, many(policy, 300), repeat=k) for policy in ("random", "cache_aware") for k in range(2)]
    html = page(tmp_path, runs)
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", html) + re.findall(r"url\(([^)]*)\)", html)
    assert len(loaded) > 10
    assert [target for target in loaded if not target.startswith(("#", "data:"))] == []
    for word in ("<script", "@import", "<iframe", "<object", "<!DOCTYPE svg"):
        assert word not in html


def test_the_page_shows_table_words_plots_and_settings(tmp_path: Path) -> None:
    runs = [run("random", many("random", 50)), run("other", [*many("other", 50), *many("other", 3, **FAILED)])]
    html = page(tmp_path, runs, {"request_rate": "50/s"}, Warnings=["the generator was late"])
    assert html.count("<svg ") == len(report.PLOTS)
    for words in (
        "request_rate",
        "50/s",
        "the generator was late",
        "it broke",
        "E2E p99 (ms)",
        "gpu_1",
        "command line",
    ):
        assert words in html
    for plot in report.PLOTS:
        assert plot.title in html


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    evil = '--><script>alert("x")</script>&amp;'
    rows = [request(node_id=evil, worker_url=f"http://{evil}"), request(**FAILED | {"error": evil})]
    html = page(tmp_path, [run(evil, rows)], {evil: evil}, **{evil: [evil]})
    assert "<script" not in html
    assert "--&gt;&lt;script&gt;" in html
    assert "&amp;amp;" in html


@pytest.mark.parametrize("name", ["$x", r"$\frac{$", "_hidden", "$$", "a\nb"])
def test_names_are_not_read_as_formulae(tmp_path: Path, name: str) -> None:
    assert "<svg " in page(tmp_path, [run(name, [request(node_id=name)]), run("other")])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        many("random", 40, **FAILED),
        many("random", 40, **FAILED | {"worker_url": None, "node_id": None, "to_server_time": None}),
        [*many("random", 40), *many("random", 5, **FAILED | {"worker_url": None, "node_id": None})],
        [
            request(
                **dict.fromkeys(("ttft", "itl_mean", "prompt_tokens", "cached_tokens", "completion_tokens", "node_id"))
            )
        ],
        [request()] * 40,
        [],
    ],
    ids=["all failed", "never sent", "some without a worker", "little known", "all at once", "no requests"],
)
def test_the_page_stands_whatever_is_missing(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    html = page(tmp_path, [run(rows=rows), run("other", rows)])
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)


def test_kinds_of_errors_are_bounded(tmp_path: Path) -> None:
    rows = [request(**FAILED | {"error": f"kind {k} {'x' * 1000}"}) for k in range(report.ERRORS + 5)]
    html = page(tmp_path, [run(rows=rows)])
    assert "And 5 failures of 5 further kinds." in html
    assert "x" * (report.ERROR_LENGTH + 1) not in html


def test_secrets_of_the_command_line_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "compare",
        "--api-key",
        "s3cret",
        "--admin-api-key=s3cret",
        "--tokenizer",
        "path",
        "--auth-token",
        "s3cret",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert about.machine()["command line"] == (
        "compare --api-key '***' '--admin-api-key=***' --tokenizer path --auth-token '***'"
    )


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"report.html: No space"):
        page(tmp_path, [run()])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"
