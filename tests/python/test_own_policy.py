"""Policies of one's own: functions, objects and files; what they see and hear; what happens when they fail."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import DEADLINE_SECS, ROOT, Program, Sim, ask, generate, in_threads, module, until, until_healthy
from sglang_router_rs import RequestView, Router, WorkerView, own_policy

QUIET: dict[str, Any] = {"port": 0, "log_level": "off"}
TRACED = {**QUIET, "enable_request_tracking": True}
POLICIES = ROOT / "examples/policies"
EXAMPLES = [
    f"{POLICIES}/{name}"
    for name in (
        "least_in_flight.py:choose",
        "marginal_utility.py:MarginalUtility",
        "tuned_by_feedback.py:TunedByFeedback",
    )
]


def last(_request: RequestView, workers: Sequence[WorkerView]) -> int:
    return len(workers) - 1


def test_a_function_chooses(sim: Sim) -> None:
    with Router(sim.urls, last, **TRACED) as router:
        until_healthy(router.url, 2)
        for number in range(4):
            assert generate(router.url, f"r{number}").status == 200
        traces = router.traces()
        assert {trace["worker_url"] for trace in traces} == {sim.urls[1]}
        assert {(trace["routing_policy"], trace["reason"]) for trace in traces} == {("last", "own_choice")}
        assert all(trace["decision_us"] > 0 for trace in traces)
        metrics = ask(f"{router.url}/metrics").body.decode()
        assert re.search(r'policy="last",reason="own_choice"', metrics)


def test_it_sees_what_the_routers_own_rules_see(sim: Sim) -> None:
    seen: list[tuple[Any, ...]] = []

    def look(request: RequestView, workers: Sequence[WorkerView]) -> int:
        seen.append((request, workers))
        return 0

    with Router(sim.urls, look, worker_weights={sim.urls[0]: 2.5}, **TRACED) as router:
        until_healthy(router.url, 2)
        text = "a prompt of some length " * 100
        headers = {"x-request-id": "first", "x-smg-routing-key": "key"}
        body = {"text": text, "model": "m", "sampling_params": {"max_new_tokens": 1}}
        assert ask(f"{router.url}/generate", body, headers).status == 200
        assert ask(f"{router.url}/generate", body, {**headers, "x-request-id": "second"}).status == 200
        assert router.trace("first")["input_tokens"] == seen[0][0].tokens
    (request, (worker, other)), (second, (again, _)) = seen
    assert (request.request_id, request.route, request.model) == ("first", "/generate", "m")
    assert (request.stream, request.routing_key) == (False, "key")
    assert (request.prompt_bytes, request.tokens) == (2400, 600)
    assert second.at_secs > request.at_secs >= 0
    assert [worker.url, other.url] == sim.urls
    assert (worker.weight, other.weight) == (2.5, 1)
    assert worker.node_id != other.node_id
    assert (worker.in_flight, worker.pending_tokens, worker.matched_tokens) == (0, 0, 0)
    assert (worker.last_ttft_ms, worker.last_e2e_ms, worker.speed) == (None, None, None)
    assert again.matched_tokens > 500
    assert again.last_e2e_ms > 0
    for view, shape in ((request, RequestView), (again, WorkerView)):
        names = [name for name, kind in vars(shape).items() if isinstance(kind, property)]
        fields = ", ".join(f"{name}={getattr(view, name)!r}" for name in names)
        assert sorted(repr(view)[len(shape.__name__) + 1 : -1].split(", ")) == sorted(fields.split(", "))
        assert repr(view).startswith(f"{shape.__name__}(")
    assert "last_ttft_ms=None" in repr(again)


class Learning:
    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []

    def choose(self, _request: RequestView, _workers: Sequence[WorkerView]) -> int:
        return 0

    def finished(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        raise ValueError("and goes on")


def test_finished_hears_of_each_request_once(sim: Sim) -> None:
    policy = Learning()
    with Router(sim.urls, policy, **TRACED) as router:
        assert router.wait_ready()
        in_threads(4, [lambda at=number: generate(router.url, f"r{at}") for number in range(40)])
        ask(f"{router.url}/generate", {"text": "x"}, {"x-sglang-target-worker": "nobody", "x-request-id": "failed"})
        traces = {trace["request_id"]: trace for trace in router.traces()}
    assert len(policy.records) == 41
    assert {record["request_id"]: record for record in policy.records} == traces
    assert traces["failed"]["status"] == "failed"


def test_what_finished_raises_is_logged_once_a_minute_and_at_the_end(sim: Sim, tmp_path: Path) -> None:
    with Router(sim.urls, Learning(), **{**TRACED, "log_level": "warn", "log_dir": tmp_path}) as router:
        assert router.wait_ready()
        for _ in range(20):
            generate(router.url)
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    assert re.findall(r"policy Learning: finished\(\) raised (\d+) times", log) == ["1", "19"]
    assert log.count("ValueError: and goes on") == 2


def test_finished_needs_the_traces_it_takes() -> None:
    with pytest.raises(ValueError, match=r"finished.*enable_request_tracking, which is off"):
        Router([], Learning(), **QUIET)


def answers(value: object) -> Any:
    def choose(_request: RequestView, _workers: Sequence[WorkerView]) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value

    return choose


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "choose() returned None, which is not the place of a worker: an int from 0 to 1"),
        (0.0, "returned 0.0"),
        (True, "returned True"),
        (-1, "returned -1"),
        (2, "returned 2"),
        ("a\nb", r"returned 'a\nb', which"),
        (10**30, "returned 1000"),
        ("x" * 9999, "returned"),
        (KeyError("lost"), "KeyError: 'lost'"),
        (RuntimeError("a long story " * 999 + "the end"), "the end"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_what_fails_fails_that_request_alone(sim: Sim, value: object, found: str, tmp_path: Path) -> None:
    good = [False]

    def choose(request: RequestView, workers: Sequence[WorkerView]) -> Any:
        return 0 if good[0] else answers(value)(request, workers)

    options = {**TRACED, "log_level": "info", "log_dir": tmp_path}
    with Router(sim.urls, choose, **options) as router:
        assert router.wait_ready()
        answer = generate(router.url, "bad")
        assert (answer.status, answer.headers["x-router-error-code"]) == (500, "policy_failed")
        assert "Traceback" not in answer.body.decode()
        trace = router.trace("bad")
        assert trace["status"] == "failed"
        assert found in trace["error_message"]
        assert len(trace["error_message"].encode()) <= 512
        good[0] = True
        assert generate(router.url).status == 200
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    assert found in log
    # The end of a long one.
    assert ("Traceback" in log) == (isinstance(value, BaseException) and len(str(value)) < 5000)


def test_a_worker_is_no_place_of_one(sim: Sim) -> None:
    with Router(sim.urls, lambda request, workers: workers[0], **TRACED) as router:
        assert router.wait_ready()
        assert generate(router.url, "a").status == 500
        error = router.trace("a")["error_message"]
        assert "choose() returned WorkerView(url='http" in error
        assert '"' not in error


def test_a_numpy_index_will_do(sim: Sim) -> None:
    numpy = pytest.importorskip("numpy")
    with Router(sim.urls, answers(numpy.argmin([2, 1])), **TRACED) as router:
        until_healthy(router.url, 2)
        assert generate(router.url, "a").status == 200
        assert router.trace("a")["worker_url"] == sim.urls[1]


def test_one_that_blocks_holds_up_nothing_else(sim: Sim) -> None:
    is_asked, may_go = threading.Event(), threading.Event()

    def choose(_request: RequestView, _workers: Sequence[WorkerView]) -> int:
        is_asked.set()
        assert may_go.wait(DEADLINE_SECS)
        return 0

    with Router(sim.urls, choose, worker_threads=1, **TRACED) as router:
        assert router.wait_ready()
        asking = [threading.Thread(target=generate, args=(router.url, f"r{number}")) for number in range(80)]
        for thread in asking:
            thread.start()
        assert is_asked.wait(DEADLINE_SECS)
        assert ask(f"{router.url}/health").status == 200
        assert ask(f"{router.url}/v1/traces").status == 200
        may_go.set()
        for thread in asking:
            thread.join()
        until(lambda: len(router.traces(status="completed")) == 80)


class Hanging:
    """Answers nothing until it may go, but to those whose id is ``good``."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.may_go = threading.Event()

    def choose(self, request: RequestView, _workers: Sequence[WorkerView]) -> int:
        if request.request_id != "good":
            self.asked.append(request.request_id)
            self.may_go.wait(DEADLINE_SECS)
        return 0

    def __enter__(self) -> Hanging:
        return self

    def __exit__(self, *_: object) -> None:
        self.may_go.set()


def test_one_that_does_not_answer_is_not_waited_for_beyond_the_requests_time(sim: Sim, tmp_path: Path) -> None:
    options = {**TRACED, "log_level": "warn", "log_dir": tmp_path, "request_timeout_secs": 2}
    with Hanging() as policy, Router(sim.urls, policy, max_concurrent_requests=64, queue_size=0, **options) as router:
        assert router.wait_ready()
        codes: list[str | None] = []

        def ask_in_vain(number: int) -> None:
            codes.append(generate(router.url, f"r{number}").headers["x-router-error-code"])

        in_threads(64, [lambda at=number: ask_in_vain(at) for number in range(64)])
        assert codes == ["policy_failed"] * 64
        assert len(policy.asked) == 64
        assert router.trace_stats()["in_flight"] == 0
        # There is room for it, but the policy is busy with those.
        late = generate(router.url, "good").json()["error"]["message"]
        assert re.match(r"the policy Hanging has not answered for [12]\.\d s, .*64 calls of it have not ended", late)
        policy.may_go.set()
        until(lambda: generate(router.url, "good").status == 200)
        assert len(router.traces(status="failed", limit=1000)) >= 65
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    assert log.count("request failed: the policy Hanging has not answered for ") >= 65


def test_a_request_ends_while_its_policy_is_asked(sim: Sim) -> None:
    with Hanging() as policy, Router(sim.urls, policy, **TRACED) as router:
        assert router.wait_ready()
        host, port = "127.0.0.1", router.port
        with socket.create_connection((host, port)) as leaving:
            head = f"POST /generate HTTP/1.1\r\nhost: {host}\r\nx-request-id: left\r\ncontent-length: 2\r\n\r\n"
            leaving.sendall(f"{head}{{}}".encode())
            until(lambda: len(policy.asked) == 1)
        until(lambda: router.trace("left")["status"] == "failed")
        assert "client disconnected" in router.trace("left")["error_message"]
        aborted: list[Any] = []
        asking = threading.Thread(target=lambda: aborted.append(generate(router.url, "aborted")))
        asking.start()
        until(lambda: len(policy.asked) == 2)
        assert ask(f"{router.url}/abort_request", {"rid": "aborted"}).status == 200
        asking.join()
        assert aborted[0].headers["x-router-error-code"] == "aborted"
        assert router.trace_stats()["in_flight"] == 0
        assert generate(router.url, "good").status == 200


def router_threads() -> list[Path]:
    names = Path("/proc/self/task").glob("*/comm")
    return [path for path in names if path.read_text().startswith("sglang-router")]


def test_an_answer_after_the_routers_end_is_dropped(sim: Sim, capfd: pytest.CaptureFixture[str]) -> None:
    with Hanging() as policy, Router(sim.urls, policy, **QUIET) as router:
        assert router.wait_ready()

        def ask_in_vain() -> None:
            with contextlib.suppress(OSError):
                generate(router.url)

        asking = threading.Thread(target=ask_in_vain)
        asking.start()
        until(lambda: len(policy.asked) == 1)
        router.stop(0)
        assert not router.is_running
        asking.join()
        policy.may_go.set()
        with contextlib.suppress(FileNotFoundError):
            until(lambda: not router_threads())
    assert capfd.readouterr().err == ""


def test_one_that_takes_long_is_told_once_a_minute_and_at_the_end(sim: Sim, tmp_path: Path) -> None:
    def slow(_request: RequestView, _workers: Sequence[WorkerView]) -> int:
        time.sleep(0.11)
        return 0

    with Router(sim.urls, slow, port=0, log_level="warn", log_dir=tmp_path) as router:
        assert router.wait_ready()
        for _ in range(4):
            generate(router.url)
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    assert re.findall(r"policy slow: choose\(\) took over 100 ms (\d+) times", log) == ["1", "3"]


class Lagging:
    def __init__(self) -> None:
        self.may_go = threading.Event()

    def choose(self, _request: RequestView, _workers: Sequence[WorkerView]) -> int:
        return 0

    def finished(self, _record: Mapping[str, Any]) -> None:
        self.may_go.wait(DEADLINE_SECS)


def test_what_finished_has_not_heard_at_the_end_is_told(sim: Sim, tmp_path: Path) -> None:
    policy = Lagging()
    with Router(sim.urls, policy, **{**TRACED, "log_level": "warn", "log_dir": tmp_path}) as router:
        assert router.wait_ready()
        for _ in range(8):
            generate(router.url)
    policy.may_go.set()
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    assert log.count("policy Lagging: finished() takes long and has heard of 0 of 8 requests") == 1


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(503)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_each_attempt_is_routed_at_its_own_time(sim: Sim, refusing: str) -> None:
    seen: list[tuple[float, str]] = []

    def choose(request: RequestView, workers: Sequence[WorkerView]) -> int:
        seen.append((request.at_secs, workers[0].url))
        return 0

    with Router([refusing, sim.urls[0]], choose, **TRACED) as router:
        until_healthy(router.url, 2)
        assert generate(router.url).status == 200
    (first, refused_by), (second, answered_by) = seen
    assert (refused_by, answered_by) == (refusing, sim.urls[0])
    assert second > first


@pytest.fixture
def slow() -> Iterator[Sim]:
    with Sim("--speed", "0.001", ports="0") as worker:
        yield worker


def test_it_sees_who_is_there_for_the_same_prefix(slow: Sim) -> None:
    seen: list[int] = []

    def choose(_request: RequestView, workers: Sequence[WorkerView]) -> int:
        seen.append(workers[0].same_prefix)
        return 0

    def ask_in_vain() -> None:
        with contextlib.suppress(OSError):
            generate(router.url, text="a prompt of some length " * 100)

    asking = [threading.Thread(target=ask_in_vain) for _ in range(3)]
    with Router(slow.urls, choose, **TRACED) as router:
        assert router.wait_ready()
        for number, thread in enumerate(asking):
            thread.start()
            until(lambda count=number + 1: len(router.traces(status="routed")) == count)
        router.stop(0)
    for thread in asking:
        thread.join()
    assert seen == [0, 1, 2]


def test_routers_may_share_a_policy_or_have_their_own(sim: Sim) -> None:
    mine, other = Router(sim.urls, last, **TRACED), Router(sim.urls, answers(0), **TRACED)
    with mine, Router(sim.urls, last, **TRACED) as shared, other:
        for router, expected in ((mine, 1), (shared, 1), (other, 0)):
            until_healthy(router.url, 2)
            assert generate(router.url, "a").status == 200
            assert router.trace("a")["worker_url"] == sim.urls[expected]


def test_a_program_that_does_not_stop_its_router_ends(sim: Sim) -> None:
    script = f"""
import threading, urllib.request
from sglang_router_rs import Router
class Policy:
    def choose(self, request, workers): return 0
    def finished(self, record): print("heard", flush=True)
router = Router({sim.urls!r}, Policy(), port=0, enable_request_tracking=True, log_level="off").__enter__()
router.wait_ready()
def load():
    while True:
        urllib.request.urlopen(urllib.request.Request(router.url + "/generate", b'{{"text": "a"}}')).read()
for _ in range(4):
    threading.Thread(target=load, daemon=True).start()
import time; time.sleep(0.3)
"""
    for _ in range(3):
        with Program("-c", script) as program:
            assert program.end() == 0, program.output
            assert "heard" in program.output


MINE = """
def choose(request, workers):
    return len(workers) - 1

class Chosen:
    def choose(self, request, workers):
        return 0

def odd(request):
    return 0

class Fails:
    def __init__(self):
        1 / 0

    def choose(self, request, workers):
        return 0

async def later(request, workers):
    return 0

def one_by_one(request, workers):
    yield 0

class HearsLater:
    def choose(self, request, workers):
        return 0

    async def finished(self, record):
        pass

class Awaited:
    async def __call__(self, request, workers):
        return 0

awaited = Awaited()

not_callable = 3
chosen = Chosen()
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize(("name", "place"), [("choose", 1), ("Chosen", 0), ("chosen", 0)])
def test_a_file_has_policies(sim: Sim, mine: Path, name: str, place: int) -> None:
    with Router(sim.urls, f"{mine}:{name}", **TRACED) as router:
        assert router.wait_ready()
        assert generate(router.url, "a").status == 200
        trace = router.trace("a")
        assert (trace["worker_url"], trace["routing_policy"]) == (sim.urls[place], f"mine.py:{name}")


def test_a_configuration_names_a_file(sim: Sim, mine: Path, tmp_path: Path) -> None:
    config = tmp_path / "router.json"
    config.write_text(json.dumps({"policy": f"{mine}:choose"}))
    with Router(sim.urls, config=config, **TRACED) as router:
        assert router.wait_ready()
        assert generate(router.url, "a").status == 200
        assert router.trace("a")["routing_policy"] == "mine.py:choose"


def test_the_command_line_takes_a_file(sim: Sim, mine: Path) -> None:
    flags = ["--port=0", "--policy", f"{mine}:choose", "--enable-request-tracking", "--worker-urls", *sim.urls[:1]]
    with module("launch", *flags, "--worker-urls", sim.urls[1]) as program:
        url = program.router_url()
        assert "policy mine.py:choose" in program.output
        until(lambda: ask(f"{url}/readiness").status == 200)
        assert generate(url, "a").status == 200
        assert ask(f"{url}/v1/traces/a").json()["worker_url"] == sim.urls[1]
        assert 'policy="mine.py:choose"' in ask(f"{url}/metrics").body.decode()
        program.send(signal.SIGTERM)
        assert program.end() == 0, program.output


def test_a_function_beats_the_file_of_a_configuration(sim: Sim, mine: Path, tmp_path: Path) -> None:
    config = tmp_path / "router.json"
    config.write_text(json.dumps({"policy": f"{mine}:Chosen"}))
    with Router(sim.urls, last, config=config, **TRACED) as router:
        until_healthy(router.url, 2)
        assert generate(router.url, "a").status == 200
        trace = router.trace("a")
        assert (trace["worker_url"], trace["routing_policy"]) == (sim.urls[1], "last")


LEAVES = """
class Exits:
    def __init__(self):
        raise SystemExit(4)

class Interrupted:
    def __init__(self):
        raise KeyboardInterrupt

choose = "least_ttft"
"""

BAD = [
    ("nowhere.py:choose", "there is no file"),
    (
        "mine.py:chose",
        "has no chose; it has Awaited, Chosen, Fails, HearsLater, awaited, choose, later, odd, one_by_one",
    ),
    ("mine.py:odd", "too many positional arguments"),
    ("mine.py:not_callable", "3 is neither callable"),
    ("mine.py:no-name", "must be FILE.py:NAME"),
    ("mine.py:Fails", "ZeroDivisionError"),
    ("mine.py:later", "choose(request, workers) is async"),
    ("mine.py:awaited", "choose(request, workers) is async"),
    ("mine.py:one_by_one", "choose(request, workers) has a yield"),
    ("mine.py:HearsLater", "finished(record) is async"),
    ("broken.py:choose", "cannot be imported"),
    ("broken.py:choose", "ZeroDivisionError"),
    ("exits.py:choose", "SystemExit"),
    ("interrupted.py:choose", "KeyboardInterrupt"),
    ("leaves.py:Exits", "SystemExit: 4"),
    ("leaves.py:Interrupted", "KeyboardInterrupt"),
    ("leaves.py:choose", "'least_ttft' is neither callable"),
    ("folder.py:choose", "folder.py is a folder, not a file"),
    ("mine.py/folder/mine.py:choose", "cannot be read: Not a directory"),
    ("mi\0ne.py:choose", "there is no file"),
    ("syntax.py:choose", "SyntaxError"),
]


@pytest.fixture
def bad_files(mine: Path) -> Path:
    folder = mine.parent
    (folder / "broken.py").write_text("1 / 0")
    (folder / "exits.py").write_text("raise SystemExit(0)")
    (folder / "interrupted.py").write_text("raise KeyboardInterrupt")
    (folder / "leaves.py").write_text(LEAVES)
    (folder / "folder.py").mkdir()
    (folder / "syntax.py").write_text("def choose(")
    return folder


@pytest.mark.parametrize(("text", "found"), BAD)
def test_a_file_that_is_no_policy_is_refused(bad_files: Path, text: str, found: str) -> None:
    with pytest.raises(ValueError, match=re.escape(found)) as refused:
        Router([], f"{bad_files / text}", **QUIET)
    assert text in str(refused.value)


@pytest.mark.parametrize("command", [["launch", "--port=0"], ["replay", "--synthetic=chat", "--num-requests=9"]])
@pytest.mark.parametrize(("text", "found"), [BAD[0], BAD[2], BAD[4], BAD[7], BAD[16], BAD[17]])
def test_the_command_line_refuses_it_too(bad_files: Path, command: list[str], text: str, found: str) -> None:
    with module(*command, "--policy", f"{bad_files / text}") as program:
        assert program.end() == 2, program.output
        assert found in program.output


@pytest.mark.parametrize("text", ["mine.py", "mine:choose"])
def test_what_looks_like_a_file_is_told_how_one_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"FILE\.py:NAME"):
        Router([], text, **QUIET)
    with module("launch", "--port=0", "--policy", text) as program:
        assert program.end() == 2, program.output
        assert "random" in program.output
        assert "FILE.py:NAME" in program.output


@pytest.mark.parametrize("policy", [5, object(), lambda request: 0, type("A", (), {"choose": 1})()])
def test_an_object_that_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="policy"):
        Router([], policy, **QUIET)


def test_names_are_fit_for_metrics() -> None:
    assert own_policy.own(lambda request, workers: 0)[2] == "lambda"
    assert own_policy.own(Learning())[2] == "Learning"
    assert own_policy.own(last, "ä" * 99)[2] == "ä" * 32


def test_a_name_of_the_routers_own_is_told_apart(sim: Sim) -> None:
    def random(_request: RequestView, _workers: Sequence[WorkerView]) -> int:
        return 0

    with Router(sim.urls, random, **TRACED) as router:
        assert router.wait_ready()
        assert generate(router.url, "a").status == 200
        assert router.trace("a")["routing_policy"] == "own_random"


LOAD = ["--synthetic=chat", "--num-requests=300", "--workers=4"]


def replayed(*flags: str) -> str:
    with module("replay", *LOAD, *flags) as program:
        assert program.end() == 0, program.output
        return program.output


def test_examples_replay_and_the_same_again_is_the_same() -> None:
    policies = ",".join(["shortest_queue", *EXAMPLES])
    table = replayed(f"--policy={policies}")
    # Files are called by their names.
    called = [policy.rpartition("/")[2] for policy in policies.split(",")]
    assert [line.split()[0] for line in table.splitlines()[-4:]] == called
    assert all(line.split()[-1] == "0" for line in table.splitlines()[-4:])
    assert replayed(f"--policy={policies}") == table


def test_a_policy_that_fails_in_a_replay_is_shown_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def choose(request, workers):\n    return 1 // (int(request.request_id) % 2)\n")
    output = replayed(f"--policy={path}:choose")
    assert output.count("ZeroDivisionError") == 1
    assert "failed on 150 requests" in output


def test_what_finished_raises_in_a_replay_is_shown_once_with_how_often(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace("def odd", "    def finished(self, record):\n        raise SystemExit(7)\n\ndef odd"))
    output = replayed(f"--policy={path}:Chosen")
    assert "mine.py:Chosen: finished() raised 300 times; the first time:\nTraceback" in output
    assert output.count("SystemExit: 7") == 1


SLOW_TWICE = """
import time

def choose(request, workers):
    if request.request_id in ("1", "2"):
        time.sleep(0.11)
    return 0
"""


def test_a_policy_that_takes_long_in_a_replay_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SLOW_TWICE)
    assert "choose() took over 100 ms 2 times, up to 0." in replayed(f"--policy={path}:choose")


@pytest.mark.parametrize("policy", EXAMPLES)
def test_an_example_serves(sim: Sim, policy: str) -> None:
    with Router(sim.urls, policy, **TRACED) as router:
        assert router.wait_ready()
        in_threads(4, [lambda: generate(router.url) for _ in range(60)])
        until(lambda: len(router.traces(status="completed")) == 60)


def loaded(text: str) -> Any:
    return own_policy.load(text)[0].__self__  # type: ignore[attr-defined]


def asking(**fields: Any) -> Any:
    return SimpleNamespace(**{"request_id": "a", "tokens": 1000, "at_secs": 0.0, **fields})


def worker(url: str, **fields: Any) -> Any:
    return SimpleNamespace(**{"url": url, "matched_tokens": 0, "pending_tokens": 0, "in_flight": 0, **fields})


def test_the_weights_learn() -> None:
    chooser = loaded(EXAMPLES[2])
    before = list(chooser.weights)
    chooser.choose(asking(), [worker("a")])
    chooser.finished({"request_id": "a", "ttft_ms": 500.0})
    assert all(new >= old for new, old in zip(chooser.weights, before, strict=True))
    assert chooser.weights != before


def test_one_more_is_worth_most_where_it_adds_least_latency() -> None:
    chooser = loaded(EXAMPLES[1])

    def best(*workers: Any) -> int:
        place: int = chooser.choose(asking(), workers)
        return place

    assert best(worker("a"), worker("b", matched_tokens=1)) == 1
    assert best(worker("a"), worker("b", matched_tokens=500, pending_tokens=600)) == 0
    # Nine others wait for 500 tokens more than at a worker that has them.
    assert best(worker("a", matched_tokens=500, pending_tokens=500, in_flight=9), worker("b", in_flight=9)) == 0
    for took_ms, url in ((100.0, "slow"), (50.0, "fast")):
        for _ in range(8):
            chooser.choose(asking(), [worker(url)])
            chooser.finished({"request_id": "a", "worker_url": url, "ttft_ms": took_ms})
    assert best(worker("slow"), worker("fast", pending_tokens=900)) == 1
    assert best(worker("slow"), worker("fast", pending_tokens=1100)) == 0


def test_workers_that_are_gone_are_forgotten() -> None:
    chooser = loaded(EXAMPLES[1])
    for at in range(100):
        chooser.choose(asking(at_secs=at * 60.0), [worker("stays"), worker(f"passes {at}")])
    assert len(chooser._windows) < 15
    assert {"stays", "passes 99"} <= set(chooser._windows)
    # What ends at one that is gone is let go.
    chooser.finished({"request_id": "a", "worker_url": "passes 0", "ttft_ms": 1.0})
    assert "passes 0" not in chooser._windows


PAGE = (ROOT / "docs/own-policy.md").read_text(encoding="utf-8")


def test_the_pages_numbers_are_what_its_command_prints() -> None:
    found = re.search(r"^python (-m [^\n]*)\n```\n\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    command = [sys.executable, *shlex.split(found[1])]
    printed = subprocess.run(command, cwd=POLICIES, capture_output=True, text=True, check=True).stdout
    assert found[2] == printed


def test_the_pages_ten_lines_pass_the_pages_test() -> None:
    blocks = re.findall(r"^```python(?: fragment)?\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    rule = next(block for block in blocks if "def choose(request, workers):\n    def wait" in block)
    check = next(block for block in blocks if "SimpleNamespace" in block)
    exec(rule.partition("with Router")[0] + check, {})
