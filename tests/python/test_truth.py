"""The verdicts of tools/truth.py: what it finds when the laboratory does not tell the truth."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import truth


def log_of(path: Path, *lines: tuple[str, float, str, int]) -> Path:
    names = ("event", "at", "request_id", "port")
    path.write_text("".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """a and b together for a second, then b alone for two."""
    return log_of(
        tmp_path / "requests.jsonl",
        ("arrived", 0.0, "warmup-1", 1001),
        ("arrived", 1.0, "a", 1001),
        ("arrived", 1.0, "b", 1002),
        ("ended", 2.0, "a", 1001),
        ("ended", 4.0, "b", 1002),
    )


def test_requests_at_the_workers_are_counted_from_their_log(log: Path) -> None:
    events = truth.events(log)
    assert truth.most_at_once(events) == 2
    assert truth.mean_in_flight(events) == pytest.approx((2 * 1 + 1 * 2) / 3)


def row(req_id: str, gpu: str | None, port: int) -> dict[str, Any]:
    return {"req_id": req_id, "gpu_id": gpu, "worker_url": f"http://127.0.0.1:{port}"}


@pytest.mark.parametrize(
    ("wrong", "rows"),
    [
        ([], [row("a", "gpu_0", 1001), row("b", "gpu_1", 1002)]),
        (["a"], [row("a", None, 1001)]),
        (["a"], [row("a", "gpu_1", 1001)]),
        (["b"], [row("b", "gpu_0", 1001)]),
        (["c"], [row("c", "gpu_0", 1001)]),
    ],
)
def test_a_row_of_another_worker_is_found(log: Path, wrong: list[str], rows: list[dict[str, Any]]) -> None:
    found = truth.whose(SimpleNamespace(rows=rows), log, [1001, 1002])
    assert [line.partition(":")[0] for line in found] == wrong


def test_a_measure_that_is_away_is_found() -> None:
    assert truth.away("ttft", 0.104, 0.1, 0.05) == []
    assert truth.away("ttft", 0.106, 0.1, 0.05) == ["ttft is 0.106, not 0.1"]
    assert truth.away("ttft", 0.094, 0.1, 0.05) != []


def against(rules: list[Any]) -> list[str]:
    return [rule.name.strip() for rule in rules if rule.against]


def run_of(rows: list[dict[str, Any]], **more: Any) -> Any:
    """Results of which the rules look at these."""
    arrivals = {
        "achieved_span_secs": 10.0,
        "scheduled_span_secs": 10.0,
        "lateness_secs": {"p99": 0.001, "max": 0.01},
        **more,
    }
    summary = {"requests": {"errors": {}}, "arrivals": arrivals, "config": {"worker_base_port": 1001}}
    return SimpleNamespace(rows=rows, planned=len(rows), summary=lambda: summary)


RIGHT = [row("a", "gpu_0", 1001), row("b", "gpu_1", 1002)]


@pytest.mark.parametrize(
    ("rows", "more", "found"),
    [
        (RIGHT, {}, ""),
        ([RIGHT[0], row("b", "gpu_0", 1001)], {}, "each row's gpu_id"),
        (RIGHT, {"achieved_span_secs": 10.2}, "they left over their schedule"),
        (RIGHT, {"lateness_secs": {"p99": 0.03, "max": 0.03}}, "1 % left later"),
    ],
)
def test_the_steady_run_is_judged(log: Path, rows: list[dict[str, Any]], more: dict[str, Any], found: str) -> None:
    said = against(truth.steady_rules(run_of(rows, **more), log, 500))
    assert len(said) == (1 if found else 0)
    assert all(name.startswith(found) for name in said)


def test_too_few_at_once_are_found(log: Path) -> None:
    assert against(truth.at_once_rules(run_of(RIGHT), log)) == []
    assert len(against(truth.at_once_rules(run_of([*RIGHT, row("c", "gpu_0", 1001)]), log))) == 1


def test_times_that_are_not_those_that_were_set_are_found(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", ("arrived", 0.0, "a", 1001), ("ended", 2.1, "a", 1001))
    right = {"ttft": 0.1, "itl_mean": 2 / 99, "server_latency": 2.1}

    def judged(**more: float) -> list[str]:
        measured = {**right, **more}
        rows = [{name: str(value) for name, value in measured.items()}]
        secs = {name: {"mean": value} for name, value in measured.items()}
        return against(truth.truth_rules({"requests": {"errors": {}}, "duration_secs": 2.1, "secs": secs}, rows, log))

    assert judged() == []
    assert any("ttft" in name for name in judged(ttft=0.12))
    assert any("itl_mean" in name for name in judged(itl_mean=0.03))
    assert any("Little" in name for name in judged(server_latency=2.5))
