"""tools/routing.py: contenders on one trace, a line of figures each, and what the death of a worker cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import routing
from running import Program, module
from sglang_router_rs.routing_test.results import Results

CHOOSE = "ours:examples/policies/least_in_flight.py:choose"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    flags = ("--synthetic=chat", "--num-requests=30", "--policy=random", f"--write={path}")
    with module("replay", *flags) as program:
        assert program.end() == 0, program.output
    return path


def load(trace: Path) -> list[str]:
    return [f"--trace={trace}", "--num-requests=30", "--workers=2", "--speed=50"]


def contended(trace: Path, *flags: str) -> str:
    with Program("tools/routing.py", *load(trace), *flags) as program:
        assert program.end() == 0, program.output
        return program.output


def test_each_contender_has_a_line_in_the_table_and_a_curve(trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ttft.png"
    printed = contended(
        trace, f"--directory={tmp_path}", f"--plot={picture}", "--contenders", "ours:least_ttft", CHOOSE
    )
    assert "in its hands" not in printed
    table = pd.read_csv(tmp_path / "table.csv", index_col="contender")
    assert list(table.index) == ["ours:least_ttft", "ours:least_in_flight.py:choose"]
    assert all(any(line.startswith(who) for line in printed.splitlines()) for who in table.index)
    assert (table["requests"] == 30).all()
    assert (table["failed"] == 0).all()
    assert (table["decision p50 us"] > 0).all()
    assert (table["TTFT p50 s"] <= table["TTFT p99 s"]).all()
    rows = pd.read_csv(tmp_path / "ours-least_ttft.csv")
    assert rows["ttft"].mean() * 50 == pytest.approx(table["TTFT mean s"].iloc[0], rel=1e-3)
    assert set(rows["node_id"]) == {"gpu_0", "gpu_1"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_worker_is_killed_while_the_load_runs(trace: Path, tmp_path: Path) -> None:
    flags = (f"--directory={tmp_path}", "--lose=1@3", "--contenders=ours:least_ttft")
    printed = contended(trace, *flags)
    assert "worker 1 was killed at 3 s" in printed
    (row,) = pd.read_csv(tmp_path / "table.csv").to_dict("records")
    assert row["of these failed"] <= row["in its hands"]
    assert row["others failed"] == 0
    assert row["failed"] == row["of these failed"]
    rows = pd.read_csv(tmp_path / "ours-least_ttft.csv")
    # Well after it, so that a moment in which the machine did something else does not matter.
    late = rows[(rows["to_server_time"] > 9 / 50) & rows["success"]]
    assert set(late["node_id"]) == {"gpu_0"}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--lose=2@5"], "there are workers 0 to 1 only"),
        (["--lose=1"], "is not WORKER@SECONDS"),
        (["--lose=1@1e5"], "the last request arrives at second"),
        (["--plot=x.svg"], "must end in .png"),
        (["--speeds=1"], "1 speeds for 2 workers"),
        (["--contenders", "theirs:random"], "is not ours:POLICY"),
        (["--contenders", "ours:random", "ours:random"], "named twice"),
        (["--num-requests=31"], "has only 30 lines"),
    ],
)
def test_what_cannot_be_is_named(
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    problem: str,
) -> None:
    try:
        status = routing.main([*load(trace), f"--directory={tmp_path}", *flags])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert problem in capsys.readouterr().err


def rows(*of: tuple[str, float, float, bool]) -> list[dict[str, Any]]:
    names = ("req_id", "arrival_time", "ttft", "success")
    return [dict(zip(names, row, strict=True)) for row in of]


@pytest.mark.parametrize(
    ("failed", "said"),
    [
        ([], "no request failed"),
        (["c"], "1 requests failed, all in the hands of the killed worker"),
        (["b", "c"], "2 requests failed, 1 of them NOT IN THE HANDS of the killed worker"),
    ],
)
def test_a_loss_is_told_with_those_it_should_not_have_touched(failed: list[str], said: str) -> None:
    # At ten times the speed, the worker of c and d died at second 100.
    sent = [("a", 5.0, 0.1), ("b", 10.0, 0.3), ("c", 9.9, 0.2), ("d", 10.5, 0.5)]
    made = Results(rows(*((*row, row[0] not in failed) for row in sent)))
    row = routing.loss_line(routing.Outcome(made, None, {"c", "d"}), 100, 10)
    assert routing.verdict(routing.contender("ours:random"), row) == f"ours:random: {said}"
    assert row["in its hands"] == 2
    assert row["TTFT 0..10 s"] == pytest.approx(4.0 if failed != ["b", "c"] else 5.0)
    assert row["TTFT -60..0 s"] == pytest.approx(1.5 if not failed else 1.0)
    assert np.isnan(row["TTFT 20..40 s"])


def test_what_a_killed_worker_had_is_read_off_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    events = [("arrived", "a"), ("arrived", "b"), ("ended", "a"), ("arrived", "null")]
    log.write_text("".join(f'{{"event": "{event}", "request_id": "{name}"}}\n' for event, name in events))
    assert routing.unended(log) == {"b", "null"}


def test_a_worker_is_not_killed_once_it_is_left_alone() -> None:
    import asyncio

    killed: list[bool] = []

    async def run(cancel: bool) -> None:
        planned = routing.Killing(SimpleNamespace(kill=lambda: killed.append(True)), 0.0)
        planned.begin()
        if cancel:
            planned.cancel()
        await asyncio.sleep(0.01)

    asyncio.run(run(cancel=True))
    assert killed == []
    asyncio.run(run(cancel=False))
    assert killed == [True]
