"""The trace log: what it says is what HTTP said, with the router gone; and log lines in files."""

from __future__ import annotations

import json
import os
import signal
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import Sim, ask, in_threads, module, until
from sglang_router_rs import Router, RouterTraceClient

MANY = 2200

# Every filter, some that nothing passes; {…} is a value of the request number 7.
FILTERS: list[dict[str, Any]] = [
    {},
    {"status": "completed"},
    {"status": "failed", "route": "/generate"},
    {"status": "queued"},
    {"request_id": "{request_id}"},
    {"request_id": "nobody"},
    {"worker_request_id": "{worker_request_id}"},
    {"node_id": "{node_id}"},
    {"worker_url": "{worker_url}", "status": "completed"},
    {"route": "/tokenize"},
    {"model": "the model"},
    {"policy": "round_robin"},
    {"policy": "random"},
    {"since": "{timestamp}"},
    {"until": "{timestamp}"},
    {"since": 0, "until": None},
]


class Told:
    """What a router answered over HTTP, and the log it left."""

    def __init__(self, path: Path, client: RouterTraceClient) -> None:
        self.path = path
        self.ids = [f"r{index}" for index in range(0, MANY, 50)] + ["twice", "nobody", ""]
        self.stats = client.get_trace_stats()
        self.one = {request_id: client.get_request_trace(request_id) for request_id in self.ids}
        self.batch = client.batch_get_traces(self.ids)
        seventh = client.get_request_trace("r7") or {}
        self.filters = [
            {name: value.format(**seventh) if isinstance(value, str) else value for name, value in each.items()}
            for each in FILTERS
        ]
        self.lists = [client.list_recent_traces(None, **each) for each in self.filters]
        self.loads = [client.get_mooncake_trace(**each) for each in self.filters]


def send(router: Router, index: int, request_id: str) -> None:
    bodies = [
        ("/tokenize", {"prompt": 'é \\ " \n'}),
        ("/generate", {"text": "a", "model": "the model", "sampling_params": {"max_new_tokens": 1}}),
        ("/generate", {"model": "sends no prompt"}),
    ]
    path, body = bodies[index % 3]
    assert ask(router.url + path, body, {"x-request-id": request_id}).status == (400 if index % 3 == 2 else 200)


@pytest.fixture(scope="module")
def told(sim: Sim, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """More requests than two pages hold, in a log that was rotated."""
    path = tmp_path_factory.mktemp("log") / "traces.jsonl"
    options = {"port": 0, "enable_request_tracking": True, "trace_prompt_blocks": True, "log_level": "error"}
    with Router(sim.urls, "round_robin", trace_log=path, trace_log_max_mb=1, **options) as router:
        assert router.wait_ready()
        requests = [(index, f"r{index}") for index in range(MANY)] + [(0, "twice"), (1, "twice")]
        for index, request_id in requests:
            send(router, index, request_id)
        until(lambda: router.trace_stats()["in_flight"] == 0)
        return Told(path, RouterTraceClient(router.url))


def test_the_log_was_rotated(told: Told) -> None:
    older = Path(f"{told.path}.1")
    assert older.stat().st_size <= 1 << 20
    lines = (older.read_text() + told.path.read_text()).splitlines()
    assert [json.loads(line) for line in lines] == list(reversed(told.lists[0]))


def test_look_ups_are_as_over_http(told: Told) -> None:
    log = RouterTraceClient.from_log(told.path)
    assert {request_id: log.get_request_trace(request_id) for request_id in told.ids} == told.one
    assert told.one["twice"]["same_id"] == 2
    assert log.batch_get_traces(told.ids) == told.batch
    with pytest.raises(TypeError, match="list of request ids"):
        log.batch_get_traces("r1")


def test_listings_are_as_over_http(told: Told) -> None:
    log = RouterTraceClient.from_log(str(told.path))
    for filters, traces in zip(told.filters, told.lists, strict=True):
        assert log.list_recent_traces(None, **filters) == traces, filters
    for limit in (1, 100, 1000, 1001, 2100, 10_000):
        assert log.list_recent_traces(limit) == told.lists[0][:limit]
    assert log.list_recent_traces() == told.lists[0][:100]


def test_loads_are_as_over_http(told: Told) -> None:
    log = RouterTraceClient.from_log(told.path)
    for filters, load in zip(told.filters, told.loads, strict=True):
        assert log.get_mooncake_trace(**filters) == load, filters
    lines, left_out = told.loads[0]
    generated = sum(index % 3 == 1 for index in range(MANY)) + 1
    assert (lines.count("\n"), left_out) == (generated, MANY + 2 - generated)


def test_refusals_are_as_over_http(told: Told, router: Router) -> None:
    for filters in ({"nodeid": "x"}, {"status": "done"}, {"limit": 0}, {"since": "yesterday"}, {"cursor": "x"}):
        messages = []
        for client in (RouterTraceClient.from_log(told.path), RouterTraceClient(router.url)):
            with pytest.raises(ValueError, match=next(iter(filters))) as error:
                client.list_recent_traces(**filters)
            messages.append(str(error.value))
        assert messages[1].endswith(messages[0])


def test_statistics_are_of_what_the_log_holds(told: Told) -> None:
    unknown = dict.fromkeys(("evicted", "expired", "in_flight", "memory_bytes", "config", "version"))
    assert RouterTraceClient.from_log(told.path).get_trace_stats() == {**told.stats, **unknown}


def test_a_log_may_be_read_while_it_is_written(sim: Sim, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    options = {"port": 0, "enable_request_tracking": True, "log_level": "error"}
    with Router(sim.urls, trace_log=path, **options) as router:
        assert router.wait_ready()
        assert RouterTraceClient.from_log(path).list_recent_traces() == []
        send(router, 1, "one")
        trace = until(lambda: RouterTraceClient.from_log(path).get_request_trace("one"), "the line of a request")
        assert trace == router.trace("one")


def test_many_at_once_are_all_in_the_log(sim: Sim, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    options = {"port": 0, "enable_request_tracking": True, "max_trace_entries": 50, "log_level": "off"}
    with Router(sim.urls, trace_log=path, **options) as router:
        assert router.wait_ready()
        in_threads(8, [lambda index=index: send(router, index, f"r{index}") for index in range(400)])
        stats = until(lambda: router.trace_stats()["in_flight"] == 0 and router.trace_stats())
    log = RouterTraceClient.from_log(path)
    # More than the router itself could hold.
    assert {trace["request_id"] for trace in log.list_recent_traces(None)} == {f"r{index}" for index in range(400)}
    assert log.get_trace_stats()["requests_per_node"] == stats["requests_per_node"]


LINE: dict[str, Any] = {
    "request_id": "a", "worker_url": None, "node_id": None, "timestamp": "2026-01-01T00:00:00.000001Z",
    "routing_policy": "random", "status": "failed", "route": "/generate", "error_message": "e", "latency_ms": 1.5,
    "completion_time": "2026-01-01T00:00:00.001501Z", "attempts": [], "candidates": None, "prompt_blocks": None,
}  # fmt: skip

texts = st.text(st.characters(codec="utf-8"), max_size=40)


@given(ids=st.lists(texts, min_size=1, max_size=20), text=texts, escaped=st.booleans())
def test_odd_strings_come_back(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], text: str, escaped: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.jsonl"
    lines = [{**LINE, "request_id": each, "model": text, "error_message": text} for each in ids]
    written = "".join(json.dumps(line, ensure_ascii=escaped) + "\n" for line in lines)
    path.write_text(written, encoding="utf-8", newline="")
    log = RouterTraceClient.from_log(path)
    assert [trace["request_id"] for trace in reversed(log.list_recent_traces(None, model=text))] == ids
    for each in ids:
        trace = log.get_request_trace(each) or {}
        assert (trace["error_message"], trace.get("same_id", 1)) == (text, ids.count(each))


def test_a_malformed_line_is_named_and_a_torn_one_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    good = json.dumps(LINE)
    path.write_text(f"{good}\nno trace\n")
    with pytest.raises(ValueError, match=rf"{path}, line 2: .* at column 2"):
        RouterTraceClient.from_log(path)
    path.write_text(f"{good}\n{good[:50]}\n{good}\n{good[:70]}")
    with pytest.warns(UserWarning, match="1 lines break off"):
        log = RouterTraceClient.from_log(path)
    assert log.get_trace_stats()["total_requests"] == 2
    path.write_text(f"{good}\n{good[:70]}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RouterTraceClient.from_log(path)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RouterTraceClient.from_log(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        RouterTraceClient.from_log(tmp_path)
    for error, options in (
        (IsADirectoryError, {"trace_log": tmp_path}),
        (FileNotFoundError, {"trace_log": tmp_path / "no" / "file"}),
        (NotADirectoryError, {"trace_log": file / "log"}),
        (NotADirectoryError, {"log_dir": file / "log"}),
        (FileExistsError, {"log_dir": file}),
    ):
        router = Router(port=0, enable_request_tracking=True, log_level="off", **options)
        with pytest.raises(error, match=str(next(iter(options.values())))):
            router.start()
        assert not router.is_running


def test_a_trace_log_needs_tracking(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace_log: .*enable_request_tracking"):
        Router(trace_log=tmp_path / "log")
    with module("launch", "--port=0", "--trace-log=x") as program:
        program.find("trace_log: .*enable_request_tracking")
        assert program.end() == 1


def test_a_program_that_is_told_to_end_leaves_a_whole_log(sim: Sim, tmp_path: Path) -> None:
    path, log_dir = tmp_path / "traces.jsonl", tmp_path / "logs"
    flags = ["--port=0", "--enable-request-tracking", f"--trace-log={path}", f"--log-dir={log_dir}", "--log-json"]
    with module("launch", "--worker-urls", *sim.urls, *flags) as program:
        url = program.router_url()
        until(lambda: ask(f"{url}/readiness").status == 200)
        for index in range(20):
            assert ask(f"{url}/tokenize", {"prompt": "a"}, {"x-request-id": f"r{index}"}).status == 200
        program.send(signal.SIGTERM)
        assert program.end() == 0
    traces = RouterTraceClient.from_log(path).list_recent_traces()
    assert [trace["request_id"] for trace in traces] == [f"r{index}" for index in reversed(range(20))]
    (file,) = log_dir.iterdir()
    in_file, on_terminal = ([json.loads(line) for line in lines] for lines in (file.open(), program.lines))
    for line in [*in_file, *on_terminal]:
        datetime.fromisoformat(line.pop("timestamp").replace("Z", "+00:00"))
        assert line.keys() >= {"level", "message"}
    assert sorted(map(str, in_file)) == sorted(map(str, on_terminal))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_ends_no_request(sim: Sim) -> None:
    flags = ["--port=0", "--enable-request-tracking", "--trace-log=/dev/full"]
    with module("launch", "--worker-urls", *sim.urls, *flags) as program:
        url = program.router_url()
        until(lambda: ask(f"{url}/readiness").status == 200)
        for _ in range(3):
            assert ask(f"{url}/tokenize", {"prompt": "a"}).status == 200
        program.find(r"WARN trace_log /dev/full: \d traces were lost: No space left on device")
        assert ask(f"{url}/tokenize", {"prompt": "a"}).status == 200
