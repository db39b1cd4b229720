"""`bench`: one row per request, and the worker in it is the one that the request came to."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import pytest
from laboratory import LOAD, Bench, arrived, bench
from running import Program, Sim, ask, module, until
from sglang_router_rs import Router
from sglang_router_rs.routing_test.bench import BenchConfig
from sglang_router_rs.routing_test.columns import NAMES
from sglang_router_rs.routing_test.config import ROUTES

STAMPS = ["sglang_e2e_latency", "sglang_queue_time"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers") / "requests.jsonl"


@pytest.fixture(scope="module")
def workers(log: Path) -> Iterator[Sim]:
    """Three workers that write down what they are sent."""
    with Sim("--speed", "10", "--request-log", str(log), ports="0,0,0") as started:
        yield started


@pytest.fixture(scope="module")
def tracing(workers: Sim) -> Iterator[Router]:
    options = {"port": 0, "enable_request_tracking": True, "log_level": "error"}
    with Router(workers.urls, "round_robin", **options) as serving:
        assert serving.wait_ready()
        yield serving


def ports(rows: pd.DataFrame) -> dict[str, int]:
    return {row.req_id: urlsplit(row.worker_url).port or 0 for row in rows.itertuples()}


def is_whole(done: Bench, log: Path, count: int) -> None:
    """Every request has one row, which names the worker that it came to."""
    assert done.status == 0, done.err
    rows = done.rows
    assert len(rows) == rows.req_id.nunique() == done.summary["requests"]["succeeded"] == count
    sent = {name: port for name, port in arrived(log).items() if not name.startswith("warmup-")}
    assert ports(rows).items() <= sent.items()
    assert rows.success.all()
    assert rows.error.isna().all()
    assert (rows.http_status == 200).all()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_every_row_names_the_worker_that_served_it(
    tmp_path: Path, tracing: Router, log: Path, route: str, stream: bool
) -> None:
    before = set(arrived(log)) if log.exists() else set()
    flags = (f"--router-url={tracing.url}", f"--route={route}", f"--{'' if stream else 'no-'}stream")
    done = bench(tmp_path / "results.csv", *flags, *LOAD)
    is_whole(done, log, 20)
    rows = done.rows

    new = arrived(log).keys() - before
    assert {name for name in new if not name.startswith("warmup-")} == set(rows.req_id)
    assert len(new) == 23

    names = {worker["url"]: worker["node_id"] for worker in ask(f"{tracing.url}/workers").json()["workers"]}
    assert rows.gpu_id.tolist() == rows.node_id.tolist() == [names[url] for url in rows.worker_url]
    assert set(rows.gpu_id) == set(names.values())
    assert list(rows.columns) == [*NAMES, *(STAMPS if route == "/generate" else [])]

    assert (rows.decode_length == 4).all()
    assert (rows.completion_tokens == 4).all()
    assert (rows.input_length == 20).all()
    assert (rows.prompt_tokens >= 20).all()
    assert (rows.routing_policy == "round_robin").all()
    assert (rows.trace_status == "completed").all()
    assert (rows.attempts == 1).all()
    streamed_only = ["ttft", "router_ttft_ms"]
    assert (rows[streamed_only].notna() if stream else rows[[*streamed_only, "itl_mean", "itl_p99"]].isna()).all().all()


def test_the_times_of_a_row_are_those_of_one_clock(tmp_path: Path, tracing: Router) -> None:
    flags = (f"--router-url={tracing.url}", "--num-requests=20", "--request-rate=200", "--output-len=8", "--warmup=0")
    rows = bench(tmp_path / "results.csv", *flags).rows
    micro = pytest.approx(0, abs=2e-6)
    assert rows.arrival_time[0] == 0
    assert rows.arrival_time.is_monotonic_increasing
    for late, early, difference in (
        ("finish_time", "to_server_time", "server_latency"),
        ("finish_time", "arrival_time", "total_latency"),
        ("to_server_time", "arrival_time", "queue_time"),
    ):
        assert (rows[late] - rows[early] - rows[difference]).abs().max() == micro
    assert (rows.queue_time >= 0).all()
    assert (rows.ttft <= rows.server_latency).all()
    # The router is within the client's view.
    assert (rows.router_latency_ms > 0).all()


def test_a_worker_by_itself_gives_the_same_columns(tmp_path: Path, workers: Sim, log: Path) -> None:
    url = workers.urls[1]
    done = bench(tmp_path / "results.csv", f"--worker-url={url}", *LOAD)
    is_whole(done, log, 20)
    rows = done.rows
    assert list(rows.columns) == [*NAMES, *STAMPS]
    assert (rows.worker_url == url).all()
    router_says = ["node_id", "gpu_id", "routing_policy", "trace_status", "reason", "attempts", "router_latency_ms"]
    assert rows[router_says].isna().all().all()


def test_two_runs_have_no_id_in_common(tmp_path: Path, tracing: Router) -> None:
    runs = [bench(tmp_path / name, f"--router-url={tracing.url}", *LOAD).rows for name in ("a.csv", "b.csv")]
    assert not set(runs[0].req_id) & set(runs[1].req_id)
    assert runs[0].arrival_time.tolist() == runs[1].arrival_time.tolist()


def test_a_flushed_cache_has_nothing_of_the_run_before(tmp_path: Path, tracing: Router) -> None:
    flags = (f"--router-url={tracing.url}", "--num-requests=10", "--warmup=0", "--input-len=600", "--request-rate=inf")
    bench(tmp_path / "a.csv", *flags)
    kept = [bench(tmp_path / f"{number}.csv", *flags).rows.cached_tokens.sum() for number in range(3)]
    assert kept[-1] > 0
    flushed = bench(tmp_path / "c.csv", *flags, "--flush-cache").rows
    assert flushed.cached_tokens.sum() == 0


def test_an_interrupted_run_keeps_what_is_done(tmp_path: Path) -> None:
    log, output = tmp_path / "requests.jsonl", tmp_path / "results.csv"
    options = {"port": 0, "enable_request_tracking": True, "log_level": "error"}
    with Sim("--request-log", str(log)) as sim, Router(sim.urls, "round_robin", **options) as router:
        assert router.wait_ready()
        load = ("--num-requests=1000", "--request-rate=20", "--output-len=20", "--warmup=2", f"--output={output}")
        with module("bench", f"--router-url={router.url}", *load) as program:
            until(lambda: log.exists() and log.read_text().count('"ending":"completed"') >= 10)
            program.send(signal.SIGINT)
            assert program.end() == 130
    done = Bench(130, program.output, program.output, output)
    assert "warning: interrupted" in done.err
    rows, counts = done.rows, done.summary["requests"]
    assert 10 <= len(rows) < 1000
    assert (counts["planned"], counts["total"], counts["succeeded"]) == (1000, len(rows), rows.success.sum())
    assert counts["succeeded"] > 0
    assert done.summary["interrupted"] is True
    assert (rows.error[~rows.success] == "interrupted before its end").all()
    assert rows.to_server_time.notna().all()
    assert ports(rows[rows.success]).items() <= arrived(log).items()


def test_help_shows_every_option() -> None:
    with module("bench", "--help", environment={"COLUMNS": "120"}) as program:
        assert program.end() == 0
    for field in dataclasses.fields(BenchConfig):
        assert f"--{field.name.replace('_', '-')}" in program.output


def test_without_the_extra_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery as machinery\n"
        "find = machinery.PathFinder.find_spec\n"
        "blocked = lambda name, *rest: None if name == 'pandas' else find(name, *rest)\n"
        "machinery.PathFinder.find_spec = blocked\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    for command in ("bench", "compare"):
        with module(command, "--help", environment={"PYTHONPATH": path}) as program:
            assert program.end() == 1
        message = "error: the routing laboratory needs pandas: pip install 'sglang_router_rs[bench]'\n"
        assert program.output == message
    with Program("-c", "import sglang_router_rs", environment={"PYTHONPATH": path}) as program:
        assert program.end() == 0, program.output
