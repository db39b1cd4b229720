"""What `bench` refuses before it sends anything, and what it keeps when something goes wrong on the way."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from aiohttp import web
from laboratory import LOAD, Bench, Handler, answers, bench, service
from running import Sim, until
from sglang_router_rs import Router
from sglang_router_rs.routing_test import results

TRACKED: dict[str, Any] = {"port": 0, "enable_request_tracking": True, "log_level": "error"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers") / "requests.jsonl"


@pytest.fixture(scope="module")
def workers(log: Path) -> Iterator[Sim]:
    with Sim("--speed", "10", "--request-log", str(log)) as started:
        yield started


@pytest.fixture(scope="module")
def tracing(workers: Sim) -> Iterator[Router]:
    with Router(workers.urls, "round_robin", max_trace_entries=50, **TRACKED) as serving:
        assert serving.wait_ready()
        yield serving


@pytest.fixture
def unasked(log: Path) -> Iterator[None]:
    """No request reaches the workers."""
    before = log.read_text() if log.exists() else ""
    yield
    assert (log.read_text() if log.exists() else "") == before


def refused(done: Bench, status: int, *parts: str) -> None:
    assert done.status == status, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    for part in ("error: ", *parts):
        assert part in done.err
    assert not os.path.isfile(done.output)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--request-rate=0", "--request-rate 0.0: must be a number from 1e-06 on, or inf"),
        ("--request-rate=-1", "--request-rate -1.0: must be"),
        ("--request-rate=nan", "--request-rate nan: must be"),
        ("--request-rate=fast", "--request-rate: invalid number value: 'fast'"),
        ("--num-requests=0", "--num-requests 0: must be a number from 1 on"),
        ("--num-requests=1.5", "--num-requests: invalid whole number value: '1.5'"),
        ("--range-ratio=1.1", "--range-ratio 1.1: must be between 0 and 1"),
        ("--timeout-secs=inf", "--timeout-secs inf: must be"),
        ("--route=/v1/embeddings", "--route /v1/embeddings: must be one of /generate"),
        ("--dataset=nonsense", "--dataset nonsense: "),
        ("--dataset=custom:/no/such/file", "--dataset custom:/no/such/file: "),
        ("--worker-url=http://localhost:1", "--worker-url http://localhost:1: goes without --router-url"),
        ("--num-requests=48", "--num-requests 48: with warm-up 58 requests, but the router remembers 50"),
        ("--request-rate=0.001", "--num-requests 1000: "),
        (
            "--input-len=399990",
            "--input-len 399990: request 1 asks for 399990 + 128 tokens, but the model takes 400000",
        ),
        ("--frobnicate=1", "--frobnicate=1"),
        ("--num-req=1", "--num-req=1"),
        ("--decisions=decisions.csv", "--decisions decisions.csv: the router keeps no candidates"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracing: Router, flag: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    # The router remembers too little for the default number: what is wrong beside it is told first.
    enough = () if "num-requests" in message else ("--num-requests=10",)
    refused(bench(tmp_path / "results.csv", f"--router-url={tracing.url}", *enough, flag), 2, message)


def test_arrivals_beyond_the_routers_memory_are_refused(tmp_path: Path, workers: Sim) -> None:
    with Router(workers.urls, trace_ttl_seconds=5, **TRACKED) as router:
        assert router.wait_ready()
        flags = (f"--router-url={router.url}", "--num-requests=100", "--request-rate=1", "--arrivals=constant")
        refused(
            bench(tmp_path / "r.csv", *flags), 2, "--num-requests 100: they arrive over 99 s", "--trace-ttl-seconds"
        )


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:30001", "is not http://HOST:PORT"),
        ("ftp://localhost", "is not http://HOST:PORT"),
        ("http://", "is not http://HOST:PORT"),
        ("http://localhost:1/v1", "is not http://HOST:PORT"),
        ("http://localhost:port", "is not http://HOST:PORT"),
        ("http://localhost:123456", "is not http://HOST:PORT"),
        ("http://[::1", "is not http://HOST:PORT"),
        ("", "is not http://HOST:PORT"),
    ],
)
def test_a_url_that_is_none_is_an_option_error(tmp_path: Path, url: str, problem: str) -> None:
    for name in ("router", "worker"):
        refused(bench(tmp_path / "r.csv", f"--{name}-url={url}", *LOAD), 2, f"--{name}-url {url}: {problem}")


def test_nobody_at_the_url(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        for kind in ("router", "worker"):
            refused(bench(tmp_path / "r.csv", f"--{kind}-url={url}", *LOAD), 1, url, f"is the {kind} running there?")


@pytest.mark.usefixtures("unasked")
def test_a_worker_given_as_the_router_is_found_out(tmp_path: Path, workers: Sim) -> None:
    url = workers.urls[0]
    refused(bench(tmp_path / "r.csv", f"--router-url={url}", *LOAD), 1, f"this is not sglang_router_rs: {url}")


@pytest.mark.usefixtures("unasked")
def test_a_router_without_tracking_says_how_to_switch_it_on(tmp_path: Path, workers: Sim) -> None:
    with Router(workers.urls, port=0, log_level="error") as router:
        assert router.wait_ready()
        refused(bench(tmp_path / "r.csv", f"--router-url={router.url}", *LOAD), 1, "--enable-request-tracking")


def test_a_router_without_a_healthy_worker_is_not_measured(tmp_path: Path) -> None:
    with Router([], **TRACKED) as router:
        until(lambda: router.is_running)
        refused(bench(tmp_path / "r.csv", f"--router-url={router.url}", *LOAD), 1, router.url, "no healthy worker")


def test_a_model_that_takes_less_is_an_option_error(tmp_path: Path) -> None:
    asked: list[str] = []

    async def count(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.json_response({})

    models = {"data": [{"id": "small", "max_model_len": 100}]}
    with service({"GET /health": answers({}), "GET /v1/models": answers(models), "POST /generate": count}) as url:
        flags = (f"--worker-url={url}", "--input-len=90", "--output-len=11")
        refused(bench(tmp_path / "r.csv", *flags), 2, "--input-len 90: request 1 asks for 90 + 11", "takes 100")
    assert not asked


@pytest.mark.usefixtures("unasked")
def test_an_output_that_cannot_be_written_is_an_option_error(tmp_path: Path, tracing: Router) -> None:
    flags = (f"--router-url={tracing.url}", *LOAD)
    (tmp_path / "file").write_text("")
    refused(bench(tmp_path, *flags), 2, f"--output {tmp_path}: is a directory")
    refused(bench(tmp_path / "file" / "results.csv", *flags), 2, "results.csv: cannot be written: ")
    refused(bench(tmp_path / ("x" * 300), *flags), 2, "cannot be written: File name too long")
    decisions = f"--decisions={tmp_path / 'file' / 'd.csv'}"
    refused(bench(tmp_path / "r.csv", *flags, decisions), 2, "--decisions", "cannot be written")


def test_a_worker_that_dies_costs_its_own_requests_only(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    flags = ("--speed", "2", "--request-log", str(log))
    with Sim(*flags, ports="0") as stays, Sim(*flags, ports="0") as dies:
        urls = stays.urls + dies.urls
        with Router(urls, "round_robin", disable_retries=True, **TRACKED) as router:
            assert router.wait_ready()

            def kill() -> None:
                until(lambda: log.exists() and log.read_text().count('"arrived"') >= 30)
                dies.process.kill()

            killing = threading.Thread(target=kill)
            killing.start()
            load = ("--num-requests=60", "--request-rate=60", "--output-len=40", "--input-len=10", "--warmup=0")
            done = bench(tmp_path / "results.csv", f"--router-url={router.url}", *load)
            killing.join()
    assert done.status == 0, done.err
    rows, counts = done.rows, done.summary["requests"]
    failed = rows[~rows.success]
    assert len(rows) == counts["total"] == 60
    assert counts["failed"] == len(failed) > 0
    assert sum(counts["errors"].values()) == len(failed)
    assert failed.error.notna().all()
    assert set(failed.worker_url.dropna()) == set(dies.urls)
    assert (failed.trace_status == "failed").all()
    whole = rows[rows.worker_url == stays.urls[0]]
    assert whole.success.all()
    assert (whole.decode_length == 40).all()
    # Also those that came after it had died.
    assert rows.success.iloc[-5:].any()


def test_requests_that_no_worker_was_picked_for_have_none_in_their_rows(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    options = {**TRACKED, "disable_retries": True, "health_check_interval_secs": 1, "health_failure_threshold": 1}
    with Sim("--request-log", str(log), ports="0") as sim, Router(sim.urls, "round_robin", **options) as router:
        assert router.wait_ready()

        def stop() -> None:
            until(lambda: log.exists() and log.read_text().count('"ending":"completed"') >= 5)
            sim.process.kill()

        stopping = threading.Thread(target=stop)
        stopping.start()
        load = ("--num-requests=120", "--request-rate=40", "--output-len=2", "--input-len=10", "--warmup=0")
        done = bench(tmp_path / "results.csv", f"--router-url={router.url}", *load)
        stopping.join()
    assert done.status == 0, done.err
    rows = done.rows
    unrouted = rows[rows.http_status == 503]
    assert len(rows) == 120
    assert done.summary["requests"]["unrouted"] == rows.worker_url.isna().sum() == len(unrouted) > 0
    assert unrouted[["worker_url", "node_id", "gpu_id", "reason"]].isna().all().all()
    assert (unrouted.attempts == 0).all()
    assert (unrouted.trace_status == "failed").all()
    assert unrouted.error.str.startswith("HTTP 503: ").all()


class Liar:
    """A service that looks like a router: its answers name a worker, and its traces are what the test makes them."""

    def __init__(self, change: Callable[[dict[str, Any]], object], headers: dict[str, str] | None = None) -> None:
        self.change = change
        self.headers = {"x-sglang-worker": "http://w:1", "x-sglang-node": "gpu_0"} if headers is None else headers
        config = {"max_trace_entries": 1000, "trace_ttl_seconds": 3600, "trace_candidates": 0}
        self.routes: dict[str, Handler] = {
            "GET /readiness": answers({}),
            "GET /v1/traces/stats": answers({"config": config}),
            "POST /generate": self.generate,
            "POST /v1/traces/batch": self.batch,
        }

    async def generate(self, _request: web.Request) -> web.StreamResponse:
        meta = {"id": "worker-1", "finish_reason": {"type": "length"}, "prompt_tokens": 5, "completion_tokens": 2}
        return web.json_response({"text": "a b", "meta_info": meta}, headers=self.headers)

    async def batch(self, request: web.Request) -> web.StreamResponse:
        traces = [self.trace(name) for name in (await request.json())["request_ids"]]
        return web.json_response([trace for trace in traces if trace is not None])

    def trace(self, name: str) -> dict[str, Any] | None:
        made = {
            "request_id": name,
            "worker_url": "http://w:1",
            "node_id": "gpu_0",
            "routing_policy": "random",
            "status": "completed",
            "reason": "random",
            "matched_tokens": None,
            "queue_ms": 0.0,
            "ttft_ms": None,
            "latency_ms": 1.0,
            "error_message": None,
            "worker_request_id": "worker-1",
            "attempts": [{}],
            "candidates": None,
        }
        return None if self.change(made) == "forget" else made


def is_third(trace: dict[str, Any]) -> bool:
    return str(trace["request_id"]).endswith("-000002")


@pytest.mark.parametrize(
    ("change", "headers", "void", "problem"),
    [
        (lambda it: it.update(worker_url="http://w:2") if is_third(it) else None, None, 1, "http://w:2"),
        (lambda it: "forget" if is_third(it) else None, None, 1, "the router has no trace of it"),
        (lambda it: it.update(same_id=2) if is_third(it) else None, None, 1, "2 requests with this id"),
        (lambda it: None, {}, 5, "names no worker"),
    ],
)
def test_a_worker_that_is_not_certain_voids_the_run_after_it_is_saved(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], headers: dict[str, str] | None, void: int, problem: str
) -> None:
    with service(Liar(change, headers).routes) as url:
        done = bench(tmp_path / "r.csv", f"--router-url={url}", "--num-requests=5", "--warmup=0", "--request-rate=inf")
    assert done.status == 1
    assert len(done.rows) == 5
    assert f"THE WORKER OF {void} REQUESTS IS NOT CERTAIN" in done.err
    told = done.summary["disagreements"]
    assert len({one["req_id"] for one in told}) == void
    assert any(problem in one["problem"] for one in told)
    for one in told:
        assert f"{one['req_id']}: {one['problem']}" in done.err
        assert one["req_id"] in set(done.rows.req_id)


def test_a_service_whose_witnesses_agree_is_believed(tmp_path: Path) -> None:
    with service(Liar(lambda _trace: None).routes) as url:
        done = bench(tmp_path / "r.csv", f"--router-url={url}", "--num-requests=5", "--warmup=1", "--request-rate=inf")
    assert (done.status, done.summary["disagreements"]) == (0, [])


def test_what_was_measured_is_kept_if_the_router_is_gone_before_its_traces_are_read(tmp_path: Path) -> None:
    async def gone(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    with service({**Liar(lambda _trace: None).routes, "POST /v1/traces/batch": gone}) as url:
        done = bench(tmp_path / "r.csv", f"--router-url={url}", "--num-requests=5", "--warmup=0", "--request-rate=inf")
    assert done.status == 1
    assert len(done.rows) == 5
    assert done.rows.success.all()
    assert "THE WORKER OF 5 REQUESTS IS NOT CERTAIN" in done.err
    assert "traces cannot be read" in done.err


def test_a_router_given_as_a_worker_is_found_out(tmp_path: Path) -> None:
    with service({**Liar(lambda _trace: None).routes, "GET /health": answers({})}) as url:
        done = bench(tmp_path / "r.csv", f"--worker-url={url}", "--num-requests=5", "--warmup=0", "--request-rate=inf")
    assert done.status == 1
    assert "http://w:1" in done.err


def test_a_warm_up_that_fails_altogether_ends_the_run(tmp_path: Path) -> None:
    refusing = {**Liar(lambda _trace: None).routes, "POST /generate": answers({"error": {"message": "busy"}}, 503)}
    with service(refusing) as url:
        refused(bench(tmp_path / "r.csv", f"--router-url={url}", *LOAD), 1, "all 3 requests of the warm-up", "busy")


def test_a_run_in_which_everything_fails_is_saved(tmp_path: Path) -> None:
    refusing = {**Liar(lambda _trace: None).routes, "POST /generate": answers({"error": {"message": "busy"}}, 503)}
    with service(refusing) as url:
        done = bench(tmp_path / "r.csv", f"--router-url={url}", *LOAD, "--warmup=0")
    assert done.status == 1
    assert done.summary["requests"]["errors"] == {"HTTP 503: busy": 20}
    assert (done.rows.error == "HTTP 503: busy").all()


@pytest.mark.parametrize(
    "meta",
    [
        {"prompt_tokens": "five"},
        {"prompt_tokens": 5.5},
        {"prompt_tokens": 1e30},
        {"prompt_tokens": 10**30},
        {"prompt_tokens": True},
        {"cached_tokens": [1]},
        {"completion_tokens": {"n": 1}},
        {"completion_tokens": -1},
        {"queue_time": 10**400},
        {"finish_reason": {"type": "abort", "message": "half \ud800 a\npair"}},
    ],
)
def test_nonsense_of_one_answer_fails_its_row_only(tmp_path: Path, meta: dict[str, Any]) -> None:
    liar = Liar(lambda _trace: None)
    calls = iter(range(100))

    async def generate(request: web.Request) -> web.StreamResponse:
        if next(calls) != 1:
            return await liar.generate(request)
        told = {"finish_reason": {"type": "length"}, "completion_tokens": 2, **meta}
        return web.json_response({"text": "a", "meta_info": told}, headers=liar.headers)

    with service({**liar.routes, "POST /generate": generate}) as url:
        done = bench(tmp_path / "r.csv", f"--router-url={url}", "--num-requests=3", "--warmup=0", "--request-rate=inf")
    assert (done.status, len(done.rows)) == (0, 3), done.err
    assert done.rows.success.sum() == 2
    assert done.summary["requests"]["failed"] == 1


@contextlib.contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Within the block no file of this process grows beyond so many bytes; pytest's own may before and after."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_no_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    results.save_json({"earlier": 1}, path)
    before = path.read_bytes()
    with full_disk(4096), pytest.raises(OSError, match=f"cannot write {path}: File too large"):
        results.save_json({"later": "x" * 100_000}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["kept.json"]


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, tracing: Router) -> None:
    output = tmp_path / "r.csv"
    output.write_text("earlier\n")
    with full_disk(1024):
        done = bench(output, f"--router-url={tracing.url}", *LOAD)
    assert done.status == 1
    # A loaded machine may have been warned of before.
    told = done.err.splitlines()[-1]
    assert told.startswith(f"error: cannot write {output}: File too large; nor elsewhere (cannot write /")
    assert told.endswith("File too large): the results are lost")
    assert output.read_text() == "earlier\n"
    assert os.listdir(tmp_path) == ["r.csv"]


def test_results_that_find_no_room_are_kept_among_temporary_files(
    tmp_path: Path, tracing: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = results.save_csv

    def save_csv(table: pd.DataFrame, path: Path) -> Path:
        if path.parent == tmp_path:
            raise OSError(f"cannot write {path}: No space left on device")
        return write(table, path)

    monkeypatch.setattr(results, "save_csv", save_csv)
    done = bench(tmp_path / "r.csv", f"--router-url={tracing.url}", *LOAD)
    assert done.status == 1
    refuge = Path(done.err.rpartition("the results are in ")[2].strip())
    assert len(pd.read_csv(refuge / "r.csv")) > 0
    shutil.rmtree(refuge)
