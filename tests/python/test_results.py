"""Rows, what they amount to, and the files that keep them: numbers that can be checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laboratory import requests
from sglang_router_rs.routing_test import results
from sglang_router_rs.routing_test.attribution import Disagreement
from sglang_router_rs.routing_test.columns import COLUMNS, NAMES
from sglang_router_rs.routing_test.exchange import Exchange
from sglang_router_rs.routing_test.results import CUMULATIVE_COLUMNS, Results
from sglang_router_rs.routing_test.run import save, warnings


def exchange(**facts: Any) -> Exchange:
    made = Exchange("r-0", requests(1)[0])
    for name, value in {"sent_at": 1.0, "finished_at": 3.0, "http_status": 200, "error": "", **facts}.items():
        setattr(made, name, value)
    return made


def row(number: int, node: str | None = "a", finish: float = 1.0, **more: Any) -> dict[str, Any]:
    """A request that arrived at 0 and was sent at 0.25."""
    made = {
        "req_id": f"r-{number}",
        "input_length": 10,
        "decode_length": 4,
        "arrival_time": 0.0,
        "to_server_time": 0.25,
        "finish_time": finish,
        "server_latency": finish - 0.25,
        "total_latency": finish,
        "queue_time": 0.25,
        "success": True,
        "http_status": 200,
        "prompt_tokens": 10,
        "cached_tokens": 5,
        "completion_tokens": 4,
        "worker_url": f"http://{node}",
        "node_id": node,
        "gpu_id": node,
    }
    return {**made, **more}


FAILED = {
    "success": False,
    "error": "HTTP 503: no worker",
    "http_status": 503,
    "decode_length": None,
    "prompt_tokens": None,
    "cached_tokens": None,
    "completion_tokens": None,
    "worker_url": None,
    "gpu_id": None,
}


def saved(made: Results, path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    summary = made.summary()
    save(made, {**summary, "warnings": []}, path)
    return pd.read_csv(path), json.loads(path.with_suffix(".summary.json").read_text())


def test_a_row_is_made_of_the_clients_stamps() -> None:
    facts = {
        "first_content_at": 1.5,
        "last_content_at": 2.5,
        "completion_tokens": 5,
        "tokens_received": 5,
        "gaps": [(0.4, 1), (0.6, 3)],
        "stamps": {"queue_time": 0.125},
        "header_worker": "http://w",
    }
    made = results.row(exchange(**facts))
    assert made["server_latency"] == 2.0
    assert made["total_latency"] == 3.0
    assert made["queue_time"] == 1.0
    assert made["ttft"] == 0.5
    assert made["itl_mean"] == 0.25
    # Gaps per token: 0.4, and 0.2 three times.
    assert made["itl_p99"] == pytest.approx(np.percentile([0.4, 0.2, 0.2, 0.2], 99))
    assert (made["success"], made["error"], made["worker_url"]) == (True, None, "http://w")
    assert made["sglang_queue_time"] == 0.125


def test_what_is_not_known_is_empty() -> None:
    made = results.row(exchange(sent_at=None, http_status=None, error="ClientConnectorError: refused"))
    assert made["total_latency"] == 3.0
    unknown = ["to_server_time", "server_latency", "queue_time", "ttft", "itl_mean", "itl_p99", "http_status"]
    unknown += ["prompt_tokens", "cached_tokens", "completion_tokens", "decode_length", "worker_url"]
    assert [made[name] for name in unknown] == [None] * len(unknown)
    assert (made["success"], made["error"]) == (False, "ClientConnectorError: refused")


@pytest.mark.parametrize(
    ("tokens", "gaps", "mean", "p99"),
    [
        (1, [], None, None),
        # All in one frame: when they came one by one is not known.
        (4, [], None, None),
        # Two frames in one read.
        (2, [(0.0, 1)], 0.0, 0.0),
        (2, [(1.0, 1)], 1.0, 1.0),
        # Broke off: nobody said how many it was to be.
        (None, [(1.0, 1)], None, 1.0),
    ],
)
def test_gaps_between_tokens(tokens: int | None, gaps: list[Any], mean: float | None, p99: float | None) -> None:
    last = 1.0 + sum(gap for gap, _ in gaps)
    made = results.row(exchange(first_content_at=1.0, last_content_at=last, completion_tokens=tokens, gaps=gaps))
    assert (made["itl_mean"], made["itl_p99"]) == (mean, p99)


def test_columns_have_their_order_and_stamps_come_last() -> None:
    rows = [row(0, sglang_queue_time=0.5), row(1, sglang_e2e_latency=1.5, more=1)]
    assert list(results.frame(rows).columns) == [*NAMES, "sglang_e2e_latency", "sglang_queue_time", "more"]
    assert list(results.frame([]).columns) == list(NAMES)
    assert {column.name: column.kind for column in COLUMNS} == results.frame([]).dtypes.astype(str).to_dict()


def test_whole_numbers_stay_whole_beside_empty_cells(tmp_path: Path) -> None:
    results.save_csv(results.frame([row(0, attempts=1), row(1, **FAILED, input_length=None)]), tmp_path / "r.csv")
    text = pd.read_csv(tmp_path / "r.csv", dtype=str, keep_default_na=False)
    for name in ("input_length", "decode_length", "prompt_tokens", "cached_tokens", "completion_tokens", "attempts"):
        assert text[name].tolist() == [str(int(text[name][0])), ""]
    assert text.http_status.tolist() == ["200", "503"]
    assert text.success.tolist() == ["True", "False"]
    assert text.error.tolist() == ["", "HTTP 503: no worker"]
    assert text.finish_time.tolist() == ["1.000000", "1.000000"]


def test_a_summary_with_known_answers(tmp_path: Path) -> None:
    ends = [1.25, 2.25, 3.25, 4.25]
    rows = [row(number, "ab"[number % 2], end, ttft=0.1 * (number + 1)) for number, end in enumerate(ends)]
    rows += [row(4, None, 0.5, **FAILED), row(5, "a", 5.25, **{**FAILED, "worker_url": "http://a", "decode_length": 2})]
    lost = [Disagreement("r-5", "why")]
    _, summary = saved(Results(rows, [0.0, 0.5], lost, planned=8, about={"version": "1"}), tmp_path / "r.csv")

    assert summary["version"] == "1"
    assert summary["requests"] == {
        "total": 6,
        "succeeded": 4,
        "failed": 2,
        "planned": 8,
        "unrouted": 1,
        "errors": {"HTTP 503: no worker": 2},
    }
    assert summary["duration_secs"] == 5.0
    assert summary["tokens"] == {"prompt": 40, "cached": 20, "completion": 16}
    assert summary["hit_rate"] == 0.5
    rates = {"requests_per_sec": 0.8, "prompt_tokens_per_sec": 8.0, "completion_tokens_per_sec": 3.2}
    assert summary["rates"] == pytest.approx(rates)
    # The seconds that requests spent at the workers, per second: Little's law.
    assert summary["mean_in_flight"] == pytest.approx((1 + 2 + 3 + 4 + 0.25 + 5) / 5)
    assert summary["secs"]["server_latency"] == pytest.approx(
        {"count": 4, "mean": 2.5, "median": 2.5, "p95": 3.85, "p99": 3.97}
    )
    assert summary["secs"]["ttft"]["mean"] == pytest.approx(0.25)
    assert summary["secs"]["itl_mean"] == {"count": 0, "mean": None, "median": None, "p95": None, "p99": None}
    assert summary["arrivals"]["lateness_secs"]["max"] == 0.25
    assert summary["arrivals"]["loop_lag_secs"]["mean"] == 0.25
    assert summary["arrivals"]["scheduled_per_sec"] is None
    assert summary["disagreements"] == [{"req_id": "r-5", "problem": "why"}]

    assert set(summary["nodes"]) == {"a", "b"}
    assert summary["nodes"]["a"]["requests"] == {"total": 3, "succeeded": 2, "failed": 1}
    assert summary["nodes"]["a"]["secs"]["server_latency"]["mean"] == 2.0
    assert summary["nodes"]["b"]["secs"]["server_latency"]["mean"] == 3.0
    assert summary["nodes"]["b"]["rates"]["requests_per_sec"] == pytest.approx(0.4)


secs = st.floats(0.001, 100)


@given(st.lists(st.tuples(st.sampled_from("abc"), secs, st.none() | secs, st.booleans()), max_size=30))
def test_a_summary_is_what_its_rows_amount_to(
    tmp_path_factory: pytest.TempPathFactory, seen: list[tuple[str, float, float | None, bool]]
) -> None:
    rows = [
        row(number, node, finish + 0.25, ttft=ttft, success=good)
        for number, (node, finish, ttft, good) in enumerate(seen)
    ]
    table, summary = saved(Results(rows, planned=len(rows)), tmp_path_factory.mktemp("run") / "r.csv")
    table["success"] = table["success"].astype(bool)
    parts = {"": (table, summary)}
    parts |= {node: (part, summary["nodes"][node]) for node, part in table.groupby("node_id")}
    assert set(parts) - {""} == set(summary["nodes"])
    for part, told in parts.values():
        good = part[part.success]
        assert told["requests"]["total"] == len(part)
        assert told["requests"]["succeeded"] == len(good)
        for name in ("ttft", "server_latency", "total_latency", "queue_time"):
            known = good[name].dropna()
            assert told["secs"][name]["count"] == len(known)
            if len(known):
                assert told["secs"][name]["mean"] == pytest.approx(known.mean(), abs=2e-6)
                assert told["secs"][name]["median"] == pytest.approx(known.median(), abs=2e-6)
                assert told["secs"][name]["p95"] == pytest.approx(known.quantile(0.95), abs=2e-6)
                assert told["secs"][name]["p99"] == pytest.approx(known.quantile(0.99), abs=2e-6)
    assert sum(told["requests"]["total"] for told in summary["nodes"].values()) == len(rows)


def test_cumulative_figures_with_known_answers() -> None:
    rows = [row(0, "a", 2.0), row(1, "b", 1.0), row(2, "a", 4.0), row(3, "b", 3.0, success=False)]
    table = results.cumulative(results.frame(rows))
    assert tuple(table.columns) == CUMULATIVE_COLUMNS
    system = table[table.node_id == "system"].drop(columns="node_id")
    assert system.to_numpy(float).tolist() == [
        [1.0, 1, 10.0, 4.0, 1.0],
        [2.0, 2, 10.0, 4.0, 1.5],
        [4.0, 3, 7.5, 3.0, pytest.approx(7 / 3)],
    ]
    node = table[table.node_id == "a"].drop(columns="node_id")
    assert node.to_numpy(float).tolist() == [[2.0, 1, 5.0, 2.0, 2.0], [4.0, 2, 5.0, 2.0, 3.0]]
    assert table.time.is_monotonic_increasing


@pytest.mark.parametrize("rows", [[], [row(0, None, **FAILED)], [row(0, "a", **FAILED), row(1, None, **FAILED)]])
def test_a_run_without_a_success_is_a_result_too(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    made = Results(rows, planned=3, interrupted=True)
    table, summary = saved(made, tmp_path / "r.csv")
    assert len(table) == summary["requests"]["failed"] == len(rows)
    assert summary["requests"]["succeeded"] == 0
    assert summary["hit_rate"] is None
    assert summary["secs"]["total_latency"]["mean"] is None
    assert len(pd.read_csv(tmp_path / "r.cumulative.csv")) == 0
    assert f"interrupted: {len(rows)} of 3 requests were sent" in warnings(made, made.summary(), None)
    assert f"{len(rows)} requests in" in results.text(made.summary())


def test_a_late_generator_says_so() -> None:
    def lines(limit: int | None = None, lags: tuple[float, ...] = (), **more: Any) -> list[str]:
        made = Results([row(0, **more), row(1, **{"arrival_time": 1.0, **more})], lags)
        return warnings(made, made.summary(), limit)

    assert lines(queue_time=0.019) == []
    assert "DID NOT KEEP UP" in lines()[0]
    assert "one of 3 places" in lines(limit=3)[0]
    assert "all were to leave at once" in lines(arrival_time=0.0)[0]
    assert "own clock was 30 ms late" in lines(queue_time=0.0, lags=(0.03,))[0]


def test_ids_of_disagreements_come_first() -> None:
    lost = [Disagreement(f"r-{number}", "why") for number in range(12) for _ in range(2)]
    made = Results([row(0, queue_time=0.0)], disagreements=lost)
    lines = warnings(made, made.summary(), None)
    assert lines[:2] == ["THE WORKER OF 12 REQUESTS IS NOT CERTAIN, these results are void:", "r-0: why"]
    assert len(made.summary()["disagreements"]) == 24


def test_json_has_no_numbers_that_are_none(tmp_path: Path) -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5, None], "c": {"d": Path("x"), 1: "é"}}
    path = results.save_json(value, tmp_path / "new" / "s.json")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": None,
        "b": ["inf", 1.5, None],
        "c": {"d": "x", "1": "é"},
    }


def test_decisions_have_their_columns(tmp_path: Path) -> None:
    rows = [{"req_id": "r", "worker_url": "http://w", "chosen": True, "matched_tokens": 3, "more": 1}, {"req_id": "s"}]
    path = results.save_csv(results.decisions(rows), tmp_path / "d.csv")
    lines = path.read_text().splitlines()
    assert lines == [",".join(results.DECISION_COLUMNS), "r,,,http://w,,True,,3,,,,", "s,,,,,,,,,,,"]
    assert results.save_csv(results.decisions([]), path).read_text() == lines[0] + "\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/taken: "):
        results.save_json({}, tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        results.save_json({}, tmp_path / "file" / "s.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
