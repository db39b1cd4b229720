"""``compare``: every policy gets the same load, on empty caches, and what came of it is kept whatever happens."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from running import Program, Sim, ask, module
from sglang_router_rs.routing_test import OptionError
from sglang_router_rs.routing_test.columns import NAMES
from sglang_router_rs.routing_test.compare import CompareConfig, file_names, labels

LOAD = [
    "--request-rate=200",
    "--output-len=4",
    "--input-len=64",
    "--prefix-len=32",
    "--dataset=shared-prefix",
    "--warmup=2",
]


def compare(directory: Path, *flags: str) -> Program:
    return module("compare", *LOAD, "--output-dir", str(directory), *flags)


def compared(directory: Path, *flags: str) -> tuple[pd.DataFrame, dict[str, Any], str]:
    with compare(directory, *flags) as program:
        assert program.end() == 0, program.output
        output = program.output
    return pd.read_csv(directory / "rows.csv"), json.loads((directory / "summary.json").read_text()), output


def test_each_policy_gets_the_same_load_on_workers_it_starts(tmp_path: Path) -> None:
    rows, summary, output = compared(
        tmp_path, "--sim=2", "--policies", "round_robin,cache_aware", "--num-requests=40", "--", "--speed=50"
    )
    assert list(rows.columns)[: len(NAMES) + 3] == ["policy", "tracking", "repeat", *NAMES]
    per_policy = {name: part.reset_index() for name, part in rows.groupby("policy")}
    assert list(per_policy["round_robin"].node_id.value_counts()) == [20, 20]
    for column in ("arrival_time", "input_length"):
        assert per_policy["round_robin"][column].equals(per_policy["cache_aware"][column])
    assert rows.success.all()
    assert set(rows.gpu_id) == {"gpu_0", "gpu_1"}
    assert (rows.routing_policy == rows.policy).all()
    # Each began on empty caches: the first of each run at each worker found nothing.
    assert (rows.groupby(["policy", "node_id"]).cached_tokens.first() == 0).all()
    assert "round_robin" in output
    assert "written:" in output
    page = (tmp_path / "report.html").read_text()
    assert "round_robin" in page
    assert not re.search(r"""(src|href)=["']?https?:|url\(["']?https?:""", page)
    found = {(it["policy"], it["metric"]): it["mean"] for it in summary["metrics"]}
    assert found["cache_aware", "requests"] == 40
    one = json.loads((tmp_path / "runs" / "cache_aware.summary.json").read_text())
    assert one["secs"]["ttft"]["mean"] * 1e3 == pytest.approx(found["cache_aware", "ttft_mean"])
    assert one["secs"]["ttft"]["mean"] == pytest.approx(per_policy["cache_aware"].ttft.mean(), abs=1e-6)


def test_repeats_and_tracking_are_runs_of_their_own_and_workers_may_run_already(tmp_path: Path) -> None:
    with Sim("--speed", "50") as workers:
        flags = [
            "--workers",
            *workers.urls,
            "--policies=random",
            "--num-requests=10",
            "--repeats=2",
            "--tracking=on,off",
        ]
        rows, summary, output = compared(tmp_path, *flags)
        assert all(ask(f"{url}/health").status == 200 for url in workers.urls)
    runs = rows.groupby(["policy", "tracking", "repeat"])
    assert sorted(runs.groups) == [("random", tracking, repeat) for tracking in (False, True) for repeat in (0, 1)]
    # Another draw for each repeat, the same with and without tracking.
    times = {key: list(part.arrival_time) for key, part in runs}
    assert times["random", True, 0] == times["random", False, 0] != times["random", True, 1]
    # Without tracking the worker is still known, from the headers; what only a trace says is empty.
    without = rows[~rows.tracking]
    assert without.worker_url.isin(workers.urls).all()
    assert without.reason.isna().all()
    assert rows[rows.tracking].reason.notna().all()
    intervals = [it for it in summary["metrics"] if it["metric"] == "e2e_mean"]
    assert all(it["ci_low"] < it["mean"] < it["ci_high"] for it in intervals)
    assert "racking" in output


def test_a_policy_of_ones_own_is_compared_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def last(request, workers):\n    return len(workers) - 1\n")
    own = f"{tmp_path / 'mine.py'}:last"
    flags = ["--sim=2", "--policies", f"round_robin,{own}", "--num-requests=10", "--", "--speed=50"]
    rows, _, _ = compared(tmp_path / "made", *flags)
    assert (rows.routing_policy == rows.policy).all()
    assert set(rows[rows.policy == "mine.py:last"].node_id) == {"gpu_1"}
    assert set(rows[rows.policy == "round_robin"].node_id) == {"gpu_0", "gpu_1"}
    assert (tmp_path / "made" / "runs" / "mine.last.csv").exists()


def test_policies_of_the_same_name_are_runs_of_their_own(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("mine.py", "doc.py", "elsewhere/mine.py")]
    for place, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"def choose(request, workers):\n    return {place}\n")
    policies = [f"{file}:choose" for file in files]
    flags = ["--sim=3", f"--policies={','.join(policies)}", "--num-requests=5", "--", "--speed=50"]
    rows, _, _ = compared(tmp_path / "made", *flags)
    # What a policy is called in traces; what was written where two are called the same there.
    labels = [policies[0], "doc.py:choose", policies[2]]
    for place, (label, file) in enumerate(zip(labels, ("mine.choose", "doc.choose", "mine.choose_2"), strict=True)):
        assert list(rows[rows.policy == label].node_id) == [f"gpu_{place}"] * 5
        run = pd.read_csv(tmp_path / "made" / "runs" / f"{file}.csv")
        assert list(run.node_id) == [f"gpu_{place}"] * 5


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        (["random", "cache_aware"], ["random", "cache_aware"]),
        (["a/m.py:f", "m.py:f", "m.py:g"], ["m.f", "m.f_2", "m.g"]),
        (["m.py:f", "a/m.py:f", "m.py:f_2"], ["m.f", "m.f_2", "m.f_2_2"]),
        (["m.py:F", "m.py:f"], ["m.F", "m.f_2"]),
        (["../my first.py:f", "my:first.py:f"], ["my_first.f", "my_first.f_2"]),
    ],
)
def test_files_of_runs_are_different_ones(policies: list[str], expected: list[str]) -> None:
    assert list(file_names(labels(policies)).values()) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_done_is_kept_when_it_is_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    # By whichever signal, and whether or not requests of the second run have begun to leave.
    with compare(tmp_path, "--sim=1", "--policies=random,round_robin", "--num-requests=100") as program:
        program.find("run 2 of 2: round_robin")
        program.send(number)
        assert program.end() == 130, program.output
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert (rows.policy == "random").sum() == 100
    assert (rows.policy == "round_robin").sum() < 100
    # Only the run that is whole is compared.
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {it["policy"] for it in summary["metrics"]} == {"random"}
    assert summary["left_out"][-1] == "No whole run, and so not compared: round_robin."
    assert summary["left_out"][-1] in program.output
    assert summary["left_out"][-1] in (tmp_path / "report.html").read_text()


def test_a_worker_that_does_not_start_is_shown_with_its_words(tmp_path: Path) -> None:
    with compare(tmp_path, "--sim=1", "--", "--speed=0") as program:
        assert program.end() == 1
        assert "worker-gpu_0 ended with status 2" in program.output
        assert "--speed" in program.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of --workers, --sim and --gpus"),
        ({"sim": 2, "workers": ["http://a"]}, "one of --workers, --sim and --gpus"),
        ({"sim": 0}, "sim=0"),
        ({"sim": 1, "policies": ["round_robbin"]}, "round_robbin.*round_robin"),
        ({"sim": 1, "policies": []}, "policies"),
        ({"sim": 1, "policies": ["none.py:choose"]}, "there is no file none.py"),
        ({"sim": 1, "tracking": ["on", "on"]}, "tracking"),
        ({"gpus": [0]}, "model_path"),
        ({"sim": 1, "model_path": "m"}, "model_path"),
        ({"sim": 1, "router_options": ["cache_threshold"]}, "NAME=VALUE"),
        ({"sim": 1, "router_options": ["policy=random"]}, "the policy is an option of the run"),
        ({"sim": 1, "router_options": ["cache_treshold=0.5"]}, "cache_threshold"),
        ({"sim": 1, "router_options": ["cache_threshold=2"]}, "from 0 to 1"),
        ({"sim": 1, "output_dir": "/proc/nowhere"}, "cannot be written"),
    ],
)
def test_options_that_do_not_fit_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CompareConfig(**options)
