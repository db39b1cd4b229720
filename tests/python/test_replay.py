"""``replay``: a trace in virtual time, the same every time, in a table, as JSON, as rows and in pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from running import module
from sglang_router_rs.routing_test import metrics, replay, results

LOAD = ["--synthetic=chat", "--num-requests=300", "--policy=round_robin,cache_aware"]


def replayed(*flags: str, status: int = 0) -> str:
    with module("replay", *flags) as program:
        assert program.end() == status, program.output
        return program.output


def test_a_policy_has_a_line_and_the_same_again_is_the_same(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    table = replayed(*LOAD, f"--write={trace}")
    lines = [line.split() for line in table.splitlines()]
    assert [line[0] for line in lines[-2:]] == ["round_robin", "cache_aware"]
    assert replayed(*LOAD) == table
    again = replayed(str(trace), *LOAD[1:])
    assert again.splitlines()[1:] == table.splitlines()[1:]


def test_json_and_rows_say_the_same(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    flags = ["--lose=2@20-40", "--speeds=1,0.5", "--seed=3", f"--csv={csv}"]
    told = json.loads(replayed(*LOAD, *flags, "--json"))
    assert told["trace"]["requests"] == 300
    rows = pd.read_csv(csv)
    for summary in told["policies"]:
        own = rows[rows["policy"] == summary["policy"]]
        assert list(own["request"]) == list(range(300))
        assert own["ttft_secs"].mean() == pytest.approx(summary["ttft_mean_secs"])
        assert own["ttft_secs"].quantile(0.9) == pytest.approx(summary["ttft_p90_secs"])
        assert own["e2e_secs"][own["error"].isna()].quantile(0.99) == pytest.approx(summary["e2e_p99_secs"])
        assert own["error"].notna().sum() == summary["failed"]
        work = own.groupby("worker")["prefill_secs"].sum()
        assert work.max() / (work.sum() / 8) == pytest.approx(summary["imbalance"])


def test_rows_are_runs_of_a_comparison(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    (summary, _) = json.loads(replayed(*LOAD, "--lose=2@20", f"--csv={csv}", "--json"))["policies"]
    (made, _) = replay.runs(csv)
    assert made.policy == "round_robin"
    # Those that failed are not counted here.
    assert results.hit_rate(made.rows) == pytest.approx(summary["hit_rate"], rel=1e-3)
    assert len(made.rows) - len(results.succeeded(made.rows)) == summary["failed"] > 0
    assert metrics.nodes([made]) == {name: name for name in (f"worker {number}" for number in range(8))}


def test_plots_come_beside_the_table(tmp_path: Path) -> None:
    page, picture, csv = tmp_path / "plots.html", tmp_path / "plots.png", tmp_path / "rows.csv"
    table = replayed(*LOAD)
    assert replayed(*LOAD, "--plot", str(page)) == table
    assert re.search("<svg.*cache_aware", page.read_text(), re.DOTALL)
    assert replayed(*LOAD, f"--plot={picture}", "--csv", str(csv)) == table
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(csv)) == 600


@pytest.mark.parametrize(
    ("flags", "status", "found"),
    [
        (["/no/such"], 1, "/no/such: cannot be read"),
        ([*LOAD, "--policy=least_tft"], 2, "similar value exists: 'least_ttft'"),
        ([*LOAD, "--speeds=NaN"], 2, "from 0.001 to 1000"),
        ([*LOAD, "--workers=3", "--speeds=1,2"], 1, "--speeds: 3 workers"),
        ([*LOAD, "--csv=/no/such/rows.csv"], 1, "--csv: cannot write /no/such/rows.csv"),
        ([*LOAD, "--plot=plots.pdf"], 2, "--plot plots.pdf: must end in .html or .png"),
        ([*LOAD, "--plot"], 2, "--plot"),
        (["/no/such", "--plot=plots.png"], 1, "/no/such: cannot be read"),
    ],
)
def test_what_is_wrong_is_told(flags: list[str], status: int, found: str) -> None:
    assert found in replayed(*flags, status=status)


def test_a_broken_trace_is_told_with_its_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    good = {"timestamp": 5, "input_length": 4, "output_length": 1, "hash_ids": [0]}
    trace.write_text(f"{json.dumps(good)}\n{json.dumps({**good, 'input_length': 0})}\n")
    assert "trace.jsonl, line 2: input_length must be a whole number from 1" in replayed(str(trace), status=1)
