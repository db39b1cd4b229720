"""`RoutingTest`: it starts what is to be started, leaves nothing running, and its rows can be added to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pandas as pd
import pytest
from laboratory import arrived
from running import Program, Sim, generate, until
from sglang_router_rs import Router
from sglang_router_rs.routing_test import AttributionError, OptionError, RoutingConfig, RoutingTest
from sglang_router_rs.routing_test.attribution import Row
from sglang_router_rs.routing_test.cluster import RunError, Worker, free_ports, router_command, worker_command
from sglang_router_rs.routing_test.columns import NAMES
from sglang_router_rs.routing_test.results import Results

TRACKED: dict[str, Any] = {"port": 0, "enable_request_tracking": True, "log_level": "error"}


def neighbours(count: int) -> int:
    """The first of so many free ports in a row."""

    def found() -> int | None:
        (first,) = free_ports(1)
        with contextlib.ExitStack() as held:
            for port in range(first, first + count):
                probe = held.enter_context(socket.socket())
                try:
                    probe.bind(("127.0.0.1", port))
                except (OSError, OverflowError):
                    return None
        return first

    port: int = until(found, "free ports")
    return port


def config(output: Path, **more: Any) -> RoutingConfig:
    load = {"num_requests": 20, "request_rate": 500.0, "input_len": 20, "output_len": 4, "warmup": 2}
    return RoutingConfig(**{**load, "base_port": 0, "output_dir": str(output), **more})


def run(test: RoutingTest) -> Results:
    return asyncio.run(test.run())


def is_whole(test: RoutingTest, rows: pd.DataFrame, count: int = 20) -> None:
    assert len(rows) == rows.req_id.nunique() == count
    assert rows.success.all()
    assert rows[["worker_url", "node_id", "gpu_id", "reason", "routing_policy", "attempts"]].notna().all().all()
    assert (rows.gpu_id == rows.node_id).all()
    assert list(rows.columns)[: len(NAMES)] == list(NAMES)
    assert test.config.base_port > 0


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def children() -> set[int]:
    """The processes that this one has started."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.add(int(status.parent.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers") / "requests.jsonl"


@pytest.fixture(scope="module")
def workers(log: Path) -> Iterator[Sim]:
    with Sim("--speed", "20", "--request-log", str(log)) as started:
        yield started


@pytest.fixture(scope="module")
def running(workers: Sim) -> Iterator[Router]:
    with Router(workers.urls, "round_robin", **TRACKED) as serving:
        assert serving.wait_ready()
        yield serving


def test_it_starts_workers_and_router_and_ends_them(tmp_path: Path) -> None:
    first, log = neighbours(2), tmp_path / "requests.jsonl"
    more = {"worker_base_port": first, "gpu_ids": [2, 3], "worker_args": ["--speed", "20", "--request-log", str(log)]}
    test = RoutingTest(config(tmp_path / "out", policy="round_robin", **more))
    made = run(test)
    assert not any(listens(port) for port in (first, first + 1, test.config.base_port))

    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    is_whole(test, rows)
    assert set(rows.gpu_id) == {"gpu_2", "gpu_3"}
    assert set(rows.routing_policy) == {"round_robin"}
    ports = {f"gpu_{gpu}": f"http://127.0.0.1:{port}" for gpu, port in ((2, first), (3, first + 1))}
    assert [ports[gpu] for gpu in rows.gpu_id] == rows.worker_url.tolist()
    asked = arrived(log)
    assert all(url.endswith(f":{asked[name]}") for name, url in zip(rows.req_id, rows.worker_url, strict=True))

    assert made.table.req_id.tolist() == rows.req_id.tolist()
    assert [row["req_id"] for row in made.rows] == rows.req_id.tolist()
    summary = json.loads((tmp_path / "out" / "results.summary.json").read_text())
    assert summary["requests"]["succeeded"] == made.summary()["requests"]["succeeded"] == 20
    assert summary["config"]["gpu_ids"] == [2, 3]
    kept = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    logs = {"logs/worker-gpu_2.log", "logs/worker-gpu_3.log", "logs/router.log"}
    assert kept == {"results.csv", "results.summary.json", "results.cumulative.csv", *logs}


def test_workers_that_run_already_are_used_and_left_alone(tmp_path: Path, workers: Sim) -> None:
    test = RoutingTest(config(tmp_path, worker_urls=workers.urls, router_options={"log_level": "error"}))
    is_whole(test, run(test).table)
    assert all(stats["served"] > 0 for stats in workers.stats())
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"router.log"}


def test_a_router_that_runs_already_is_used_and_left_alone(tmp_path: Path, running: Router) -> None:
    test = RoutingTest(config(tmp_path, start_router=False, base_port=running.port))
    for _ in range(2):
        is_whole(test, run(test).table)
    assert running.is_running
    assert generate(running.url).status == 200


class FromTheGuide(RoutingTest):
    """With the method and the loop that its users paste into it."""

    asked = 0

    async def fetch_request_traces(self, request_ids: Sequence[str]) -> dict[str, Any]:
        self.asked += 1
        async with aiohttp.ClientSession() as session:
            data = {"request_ids": request_ids}
            async with session.post(f"http://localhost:{self.config.base_port}/v1/traces/batch", json=data) as resp:
                if resp.status == 200:
                    traces = await resp.json()
                    return {trace["request_id"]: trace for trace in traces}
        return {}

    async def analyze_results(self, results: list[Row], request_ids: Sequence[str]) -> None:  # type: ignore[override]
        traces = await self.fetch_request_traces(request_ids)
        for req in results:
            if req["req_id"] in traces:
                trace = traces[req["req_id"]]
                req["gpu_id"] = trace["node_id"]
                req["worker_url"] = trace["worker_url"]


class OnlyTheMethod(RoutingTest):
    fetch_request_traces = FromTheGuide.fetch_request_traces
    asked = 0


class OnlyTheLoop(RoutingTest):
    analyze_results = FromTheGuide.analyze_results  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [FromTheGuide, OnlyTheMethod, OnlyTheLoop])
def test_the_guides_method_and_loop_work(tmp_path: Path, running: Router, kind: type[RoutingTest]) -> None:
    test = kind(config(tmp_path, start_router=False, base_port=running.port))
    run(test)
    is_whole(test, pd.read_csv(tmp_path / "results.csv"))
    assert getattr(test, "asked", 1) == 1


def test_an_analysis_may_add_to_the_rows(tmp_path: Path, running: Router) -> None:
    class Test(RoutingTest):
        async def analyze_results(self, results: list[Row], request_ids: Sequence[str]) -> list[Row]:
            assert [row["req_id"] for row in results] == list(request_ids)
            results = await super().analyze_results(results, request_ids)
            for row in results:
                row["half"] = row["server_latency"] / 2
            results[0]["note"] = "the first"
            return results

    run(Test(config(tmp_path, start_router=False, base_port=running.port)))
    rows = pd.read_csv(tmp_path / "results.csv")
    assert list(rows.columns[-2:]) == ["half", "note"]
    assert (rows.half - rows.server_latency / 2).abs().max() < 2e-6
    assert rows.note.dropna().to_dict() == {0: "the first"}


def test_an_analysis_that_names_another_worker_voids_the_run(tmp_path: Path, running: Router) -> None:
    class Test(RoutingTest):
        async def analyze_results(self, results: list[Row], request_ids: Sequence[str]) -> list[Row]:
            results = await super().analyze_results(results, request_ids)
            # By position, as it must not be.
            nodes = [row["gpu_id"] for row in results]
            for row, node in zip(results, nodes[1:] + nodes[:1], strict=True):
                row["gpu_id"] = node
            return results

    test = Test(config(tmp_path, start_router=False, base_port=running.port))
    with pytest.raises(AttributionError, match="IS NOT CERTAIN") as error:
        run(test)
    assert str(tmp_path / "results.csv") in str(error.value)
    is_whole(test, pd.read_csv(tmp_path / "results.csv"))
    summary = json.loads((tmp_path / "results.summary.json").read_text())
    assert summary["disagreements"][0]["req_id"] in str(error.value)


def test_rows_of_ones_own_are_filled_by_id(tmp_path: Path, running: Router, workers: Sim) -> None:
    test = RoutingTest(config(tmp_path, start_router=False, base_port=running.port))
    ids = [f"own-{number}" for number in range(4)]
    for name in ids:
        assert generate(running.url, name).status == 200
    rows: list[Row] = [{"req_id": name, "mine": name} for name in reversed(["never-sent", *ids])]
    # More than one page of them, most of them unknown.
    asked = [f"unknown-{number}" for number in range(2200)]
    asked[1500:1500] = ids
    filled = asyncio.run(test.analyze_results(rows, asked))
    assert filled is rows
    assert rows[-1] == {"req_id": "never-sent", "mine": "never-sent"}
    for row in rows[:-1]:
        known = running.trace(row["req_id"])
        assert known is not None
        told = (row["gpu_id"], row["worker_url"], row["routing_policy"], row["attempts"], row["mine"])
        assert told == (known["node_id"], known["worker_url"], "round_robin", 1, row["req_id"])
    assert {row["worker_url"] for row in rows[:-1]} == set(workers.urls)
    traces = asyncio.run(test.fetch_request_traces(asked))
    assert sorted(traces) == ids
    assert {name: trace["request_id"] for name, trace in traces.items()} == {name: name for name in ids}
    assert asyncio.run(test.analyze_results([], [])) == []


@pytest.mark.parametrize("taken", ["router", "worker"])
def test_a_port_that_is_taken_is_named(tmp_path: Path, taken: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ports = {"base_port": port, "worker_urls": ["http://127.0.0.1:1"]}
        if taken == "worker":
            ports = {"worker_base_port": port, "num_workers": 1}
        with pytest.raises(RunError, match=f"port {port}: Address already in use"):
            run(RoutingTest(config(tmp_path, **ports)))
    assert not (tmp_path / "results.csv").exists()


def test_what_does_not_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    with pytest.raises(RunError, match=r"(?s)worker-gpu_0 ended with status 2:.*--frobnicate"):
        run(RoutingTest(config(tmp_path, worker_base_port=port, num_workers=1, worker_args=["--frobnicate"])))
    # Not what the log has of an earlier one.
    (tmp_path / "logs" / "worker-gpu_0.log").write_text("error: long ago\n")
    with pytest.raises(RunError, match="ended with status 2") as error:
        run(RoutingTest(config(tmp_path, worker_base_port=port, num_workers=1, worker_args=["--frobnicate"])))
    assert str(error.value).count("error: ") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"router_options": {"no such": 1}}, "router_options"),
        ({"router_options": {"node_ids": {}}}, "the run sets it"),
        ({"router_options": {"enable_request_tracking": False}}, "an option of the run"),
        ({"router_options": {"cache_threshold": 7}}, "from 0 to 1"),
        ({"router_options": {"cache_threshold": "often"}}, "from 0 to 1"),
        ({"policy": "cacheaware"}, "must be one of"),
        ({"worker_base_port": 65535, "num_workers": 2}, "65536"),
        ({"worker_urls": ["http://h:1"], "gpu_ids": [7]}, "has no effect"),
        ({"start_router": False, "policy": "random"}, "has no effect"),
        ({"start_router": False, "worker_urls": ["http://h:1"]}, "has no effect"),
        ({"trace_speed": 2.0}, "has no effect"),
    ],
)
def test_options_that_cannot_act_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        RoutingConfig(**options)


def test_a_router_that_cannot_be_measured_is_refused(tmp_path: Path, running: Router, log: Path) -> None:
    before = log.read_text() if log.exists() else ""
    with pytest.raises(RunError, match="cannot reach http://localhost:"):
        run(RoutingTest(config(tmp_path, start_router=False, base_port=free_ports(1)[0])))
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=f"output_dir='{tmp_path}/file/results.csv': cannot be written"):
        run(RoutingTest(config(tmp_path / "file", start_router=False, base_port=running.port)))
    with pytest.raises(OptionError, match="num_requests=200000"):
        run(RoutingTest(config(tmp_path, start_router=False, base_port=running.port, num_requests=200_000)))
    assert (log.read_text() if log.exists() else "") == before
    assert not (tmp_path / "results.csv").exists()


FAKE_SERVER = """
import os, sys
arguments = sys.argv[1:]
model, rest = arguments[:2], arguments[2:]
assert model == ["--model-path", "the/model"], arguments
assert rest[-2:] == ["--mem-fraction-static", "0.8"], arguments
assert rest[4] == "--base-gpu-id", arguments
print("serving", *arguments, flush=True)
os.execv(sys.executable, [sys.executable, "-m", "sglang_router_rs", "sim", "--speed", "20", *rest[:-2]])
"""


def test_real_workers_are_started_with_their_model_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake" / "sglang").mkdir(parents=True)
    (tmp_path / "fake" / "sglang" / "__init__.py").write_text("")
    (tmp_path / "fake" / "sglang" / "launch_server.py").write_text(FAKE_SERVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"), prepend=os.pathsep)
    first = neighbours(2)
    more: dict[str, Any] = {"model_path": "the/model", "gpu_ids": [5, 1], "worker_base_port": first}
    test = RoutingTest(config(tmp_path / "out", worker_args=["--mem-fraction-static", "0.8"], **more))
    rows = run(test).table
    is_whole(test, rows)
    assert set(rows.gpu_id) == {"gpu_5", "gpu_1"}
    for port, gpu in ((first, 5), (first + 1, 1)):
        text = (tmp_path / "out" / "logs" / f"worker-gpu_{gpu}.log").read_text()
        where = f"--host 127.0.0.1 --port {port} --base-gpu-id {gpu}"
        assert f"serving --model-path the/model {where} --mem-fraction-static 0.8\n" in text


def test_commands() -> None:
    where = ["--host", "127.0.0.1", "--port", "1", "--base-gpu-id", "2"]
    assert worker_command(1, 2, None, ["--a"])[2:] == ["sglang_router_rs", "sim", *where, "--a"]
    assert worker_command(1, 2, "m", [])[2:] == ["sglang.launch_server", "--model-path", "m", *where]
    workers = [Worker("http://h:1", "gpu_2"), Worker("http://h:3")]
    options = {"enable_request_tracking": True, "policy": "random", "prometheus_port": None}
    assert router_command(9, workers, options)[3:] == [
        "launch",
        "--host=127.0.0.1",
        "--port=9",
        "--worker-urls=http://h:1",
        "--worker-urls=http://h:3",
        "--node-ids=http://h:1=gpu_2",
        "--enable-request-tracking=true",
        "--policy=random",
    ]


def test_options_of_the_environment_are_not_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Sim
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER__POLICY", "random")
    monkeypatch.setenv("SGLANG_ROUTER__CACHE_THRESHOLD", "nonsense")
    table = run(RoutingTest(config(tmp_path, worker_urls=workers.urls, policy="round_robin"))).table
    assert set(table.routing_policy) == {"round_robin"}


def test_an_interrupted_run_is_saved_and_leaves_nothing_running(tmp_path: Path) -> None:
    first = neighbours(2)
    log = tmp_path / "requests.jsonl"
    script = (
        "import asyncio\n"
        "from sglang_router_rs.routing_test import RoutingConfig, RoutingTest\n"
        f"config = RoutingConfig(base_port=0, worker_base_port={first}, num_requests=1000, request_rate=20, warmup=0,\n"
        f"    output_len=5, input_len=10, output_dir={str(tmp_path)!r}, worker_args=['--request-log', {str(log)!r}])\n"
        "asyncio.run(RoutingTest(config).run())\n"
    )
    (tmp_path / "script.py").write_text(script)
    with Program(str(tmp_path / "script.py")) as program:
        until(lambda: log.exists() and log.read_text().count('"completed"') >= 3)
        program.send(signal.SIGINT)
        assert program.end() != 0
        assert program.output.rstrip().endswith("KeyboardInterrupt")
    assert not listens(first)
    assert not listens(first + 1)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert 3 <= len(rows) < 1000
    assert rows.gpu_id[rows.success].notna().all()
