"""``replay``: a trace in virtual time, the same every time, in a table, as JSON, as rows and in pictures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from running import module
from sglang_router_rs.routing_test import metrics, replay

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
        assert own["error"].notna().sum() == summary["failed"] > 0
        good = own[own["error"].isna()]
        assert good["ttft_secs"].mean() == pytest.approx(summary["ttft_mean_secs"])
        assert good["ttft_secs"].quantile(0.95) == pytest.approx(summary["ttft_p95_secs"])
        assert good["e2e_secs"].quantile(0.99) == pytest.approx(summary["e2e_p99_secs"])
        assert good["cached_tokens"].sum() / good["prompt_tokens"].sum() == pytest.approx(summary["hit_rate"])
        work = (good["prompt_tokens"] - good["cached_tokens"]).groupby(good["worker"]).sum()
        assert work.max() / (work.sum() / 8) == pytest.approx(summary["imbalance"])


def test_table_and_report_have_the_same_numbers(tmp_path: Path) -> None:
    csv, notes = tmp_path / "rows.csv", tmp_path / "notes.json"
    flags = ["--lose=2@20-40,3@30", "--speeds=1,0.5", f"--csv={csv}", f"--notes={notes}", "--json"]
    told = json.loads(replayed(*LOAD, *flags))
    made = replay.runs(csv, replay.Notes.read(notes))
    assert [run.policy for run in made] == ["round_robin", "cache_aware"]
    assert made[0].losses == ((20, 40), (30, math.inf))
    assert metrics.nodes(made) == {name: name for name in (f"worker {number}" for number in range(8))}
    columns = {
        "failed": ("failed", 1),
        "hit_rate": ("hit_rate", 100),
        "ttft_mean_secs": ("ttft_mean", 1000),
        "ttft_p50_secs": ("ttft_p50", 1000),
        "ttft_p95_secs": ("ttft_p95", 1000),
        "ttft_p99_secs": ("ttft_p99", 1000),
        "e2e_mean_secs": ("e2e_mean", 1000),
        "e2e_p99_secs": ("e2e_p99", 1000),
        "imbalance": ("prefill_imbalance", 1),
    }
    for run, summary in zip(made, told["policies"], strict=True):
        assert summary["failed"] > 0
        expected = {name: metrics.METRIC[name].measure(run) for name, _ in columns.values()}
        assert {name: summary[key] * factor for key, (name, factor) in columns.items()} == pytest.approx(expected)


def test_what_was_replayed_is_told(tmp_path: Path) -> None:
    page, flags = tmp_path / "plots.html", ["--lose=2@20-40", "--rate-scale=1.15", "--kv-tokens", "100000"]
    line = "--kv-tokens 100000 --lose 2@20-40 --rate-scale 1.15"
    table = replayed(*LOAD, *flags, "--plot", str(page))
    assert table.splitlines()[1] == line
    assert "counted in whole blocks of 512 tokens" in table.splitlines()[2]
    assert f"<p>{line}</p>" in page.read_text()
    assert "Other --seed values would." in page.read_text()
    assert "--repeats" not in page.read_text()
    settings = json.loads(replayed(*LOAD, *flags, "--json"))["settings"]
    assert settings == {"kv_tokens": 100000, "lose": ["2@20-40"], "rate_scale": 1.15}


def test_a_rule_of_ones_own_is_called_by_its_file(tmp_path: Path) -> None:
    file, page = tmp_path / "mine.py", tmp_path / "plots.html"
    file.write_text("def choose(request, workers):\n    return 0\n")
    flags = ["--synthetic=chat", "--num-requests=50", f"--policy=random,{file}:choose"]
    assert replayed(*flags, f"--plot={page}").splitlines()[-1].startswith("mine.py:choose ")
    assert "<td>mine.py:choose</td>" in page.read_text()
    told = json.loads(replayed(*flags, "--json"))
    assert told["policies"][1]["policy"] == f"{file}:choose"


def test_a_replay_in_which_nothing_succeeds_has_failed(tmp_path: Path) -> None:
    page = tmp_path / "plots.html"
    flags = ["--workers=2", "--lose=0@0,1@0", f"--plot={page}"]
    output = replayed(*LOAD, *flags, status=1)
    assert "no request succeeded; the first one: no worker was left" in output
    assert "round_robin 300 of 300" in page.read_text()
    # One that answers before all is lost is enough.
    replayed(*LOAD, "--workers=2", "--lose=0@0,1@60")


def test_a_file_that_cannot_be_written_is_told_before_the_replay(tmp_path: Path) -> None:
    file, csv = tmp_path / "mine.py", tmp_path / "no" / "rows.csv"
    file.write_text("def choose(request, workers):\n    raise SystemError('was asked')\n")
    flags = ["--synthetic=chat", "--num-requests=5", f"--policy={file}:choose"]
    output = replayed(*flags, f"--csv={csv}", status=1)
    assert f"--csv: cannot write {csv}" in output
    assert "was asked" not in output
    assert "no request succeeded; the first one: SystemError: was asked\n" in replayed(*flags, status=1)


def test_sessions_without_keys_are_told(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"timestamp": 5, "input_length": 4, "output_length": 1, "hash_ids": [0]}))
    output = replayed(str(trace), "--policy=manual,consistent_hashing,prefix_hash")
    assert output.count("warning:") == 1
    assert "warning: 1 of 1 requests have no routing_key in the trace; manual and consistent_hashing" in output


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
