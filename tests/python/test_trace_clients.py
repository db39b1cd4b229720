"""Both trace clients against a live router, and against what is no router."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from running import Sim, ask, generate, in_threads, until
from sglang_router_rs import AsyncRouterTraceClient, NotThisRouter, Router, RouterTraceClient, TracingDisabled

MANY = 1100

Call = Callable[..., Any]


def blocking(url: str, method: str, *arguments: Any, **filters: Any) -> Any:
    return getattr(RouterTraceClient(url), method)(*arguments, **filters)


def asynchronous(url: str, method: str, *arguments: Any, **filters: Any) -> Any:
    async def call() -> Any:
        async with AsyncRouterTraceClient(url) as client:
            return await getattr(client, method)(*arguments, **filters)

    return asyncio.run(call())


@pytest.fixture(params=[blocking, asynchronous])
def call(request: pytest.FixtureRequest) -> Call:
    """One call of either client."""
    client: Call = request.param
    return client


@pytest.fixture(scope="module")
def busy(sim: Sim) -> Iterator[Router]:
    """A router that has served more requests than one page holds: r0 first, each to one worker in turn."""
    options = {"port": 0, "enable_request_tracking": True, "log_level": "error"}
    with Router(sim.urls, "round_robin", **options) as router:
        assert router.wait_ready()

        def send(index: int) -> None:
            assert ask(f"{router.url}/tokenize", {"prompt": "a"}, {"x-request-id": f"r{index}"}).status == 200

        in_threads(4, [lambda index=index: send(index) for index in range(MANY - 1)])
        send(MANY - 1)
        until(lambda: router.trace_stats()["requests_per_status"]["completed"] == MANY)
        yield router


def test_one_trace(busy: Router, call: Call) -> None:
    trace = call(busy.url, "get_request_trace", "r7")
    assert trace == busy.trace("r7")
    assert trace["request_id"] == "r7"
    assert trace["status"] == "completed"
    assert call(busy.url + "/", "get_request_trace", "r7") == trace


def test_a_trace_that_is_not_there_is_none(busy: Router, call: Call) -> None:
    for request_id in ("other", "", "stats", "r7/", "é", "\0", "x" * 300):
        assert call(busy.url, "get_request_trace", request_id) is None, request_id


def test_a_batch_of_any_size_is_in_the_order_asked_for(busy: Router, call: Call) -> None:
    ids = [f"r{index}" if index % 10 == 0 else f"no-{index}" for index in reversed(range(10_500))]
    traces = call(busy.url, "batch_get_traces", ids)
    assert [trace["request_id"] for trace in traces] == [f"r{index}" for index in reversed(range(0, MANY, 10))]
    assert call(busy.url, "batch_get_traces", []) == []


def test_a_listing_pages_by_itself(busy: Router, call: Call) -> None:
    for limit, count in ((None, MANY), (5000, MANY), (1050, 1050), (1000, 1000), (1, 1)):
        traces = call(busy.url, "list_recent_traces", limit)
        assert len(traces) == len({trace["request_id"] for trace in traces}) == count
    assert len(call(busy.url, "list_recent_traces")) == 100
    assert call(busy.url, "list_recent_traces", 1)[0]["request_id"] == f"r{MANY - 1}"


def test_a_listing_filters(busy: Router, call: Call, sim: Sim) -> None:
    def ids(**filters: Any) -> set[str]:
        return {trace["request_id"] for trace in call(busy.url, "list_recent_traces", None, **filters)}

    everything = {f"r{index}" for index in range(MANY)}
    assert ids(status="completed", route="/tokenize", policy="round_robin") == everything
    assert ids(status="failed") == ids(route="/generate") == ids(model="other") == set()
    by_worker = [ids(worker_url=url) for url in sim.urls]
    assert len(by_worker[0]) == len(by_worker[1]) == MANY // 2
    assert by_worker[0] | by_worker[1] == everything
    last = busy.trace(f"r{MANY - 1}")
    assert last is not None
    assert ids(request_id="r3") == {"r3"}
    assert last["request_id"] in ids(node_id=last["node_id"])
    assert ids(since=last["timestamp"]) == {last["request_id"]}
    assert ids(until=0) == set()
    assert ids(status=None) == everything


@pytest.mark.parametrize(
    "filters",
    [{"limit": 0}, {"limit": -1}, {"nodeid": "gpu_0"}, {"status": "done"}, {"since": "yesterday"}, {"cursor": "x"}],
)
def test_a_wrong_filter_is_named(busy: Router, call: Call, filters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(filters))):
        call(busy.url, "list_recent_traces", **filters)


def test_a_load_has_the_requests_that_pass_the_filters(sim: Sim, call: Call) -> None:
    options = {"port": 0, "enable_request_tracking": True, "trace_prompt_blocks": True, "log_level": "error"}
    with Router(sim.urls, **options) as router:
        assert router.wait_ready()
        for request_id in ("one", "two"):
            assert generate(router.url, request_id).status == 200
        assert ask(f"{router.url}/tokenize", {"prompt": "generates nothing"}).status == 200
        until(lambda: router.trace_stats()["requests_per_status"]["completed"] == 3)
        lines, left_out = call(router.url, "get_mooncake_trace")
        assert [json.loads(line)["hash_ids"] for line in lines.splitlines()] == [[0], [0]]
        assert left_out == 1
        assert call(router.url, "get_mooncake_trace", request_id="nobody") == ("", 0)
        with pytest.raises(ValueError, match="nodeid"):
            call(router.url, "get_mooncake_trace", nodeid="gpu_0")


def test_a_load_needs_its_option(busy: Router, call: Call) -> None:
    with pytest.raises(ValueError, match="trace_prompt_blocks=True"):
        call(busy.url, "get_mooncake_trace")


def test_statistics(busy: Router, call: Call) -> None:
    stats = call(busy.url, "get_trace_stats")
    assert stats["total_requests"] == stats["active_traces"] == stats["total_traces"] == MANY
    assert sum(stats["requests_per_node"].values()) == MANY
    assert stats["requests_per_route"] == {"/tokenize": MANY}
    assert stats["in_flight"] == 0


@pytest.mark.parametrize(
    "request_id",
    [
        "a/b",
        "/",
        "//x",
        "stats",
        "batch",
        "%2F",
        "a%2Fb%",
        'say "hi"'.replace(" ", "_"),
        "'",
        "?a=1&b#c",
        "..",
        ".",
        "a+b",
        "\\",
    ],
)
def test_odd_ids_are_found(router: Router, call: Call, request_id: str) -> None:
    assert generate(router.url, request_id).headers["x-request-id"] == request_id
    until(lambda: router.traces(status="completed"))
    trace = call(router.url, "get_request_trace", request_id)
    assert trace is not None
    assert trace["request_id"] == request_id
    assert call(router.url, "batch_get_traces", [request_id]) == [trace] == [router.trace(request_id)]
    assert call(router.url, "list_recent_traces", request_id=request_id) == [trace]


@pytest.mark.parametrize("request_id", ["", " ", "é".encode().decode("latin-1"), "x" * 257])
def test_an_id_that_cannot_be_one_is_replaced(router: Router, request_id: str) -> None:
    answer = ask(f"{router.url}/generate", {"text": "a"}, {"x-request-id": request_id})
    assert answer.status == 200
    assert answer.headers["x-request-id"].startswith("req_")
    assert router.trace(answer.headers["x-request-id"]) is not None


METHODS = [
    pytest.param("get_request_trace", ["a"], id="get"),
    pytest.param("batch_get_traces", [["a"]], id="batch"),
    pytest.param("list_recent_traces", [], id="list"),
    pytest.param("get_mooncake_trace", [], id="mooncake"),
    pytest.param("get_trace_stats", [], id="stats"),
]


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_tracking_that_is_off_says_how_to_switch_it_on(call: Call, method: str, arguments: list[Any]) -> None:
    with (
        Router(port=0, log_level="off") as router,
        pytest.raises(TracingDisabled, match="enable_request_tracking=True"),
    ):
        call(router.url, method, *arguments)


@contextmanager
def server(status: int, body: bytes, keys: list[str | None] | None = None) -> Iterator[str]:
    """A server that answers everything the same, and keeps the keys it was shown."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if keys is not None:
                keys.append(self.headers["authorization"])
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        serving = threading.Thread(target=listening.serve_forever, args=(0.01,))
        serving.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            serving.join()


@pytest.mark.parametrize(("method", "arguments"), METHODS)
@pytest.mark.parametrize(
    ("status", "body"), [(404, b"<h1>not found"), (405, b""), (200, b"<h1>welcome"), (200, b'"welcome"')]
)
def test_another_server_is_not_this_router(
    call: Call, method: str, arguments: list[Any], status: int, body: bytes
) -> None:
    with server(status, body) as url, pytest.raises(NotThisRouter, match="this is not sglang_router_rs: http"):
        call(url, method, *arguments)


@pytest.mark.parametrize(("method", "arguments"), METHODS)
def test_a_worker_is_not_this_router(call: Call, sim: Sim, method: str, arguments: list[Any]) -> None:
    with pytest.raises(NotThisRouter):
        call(sim.urls[0], method, *arguments)


def test_an_error_of_a_proxy_between_is_told(call: Call) -> None:
    with server(502, b"bad gateway") as url, pytest.raises(RuntimeError, match="502: bad gateway"):
        call(url, "get_trace_stats")


def test_nobody_listening_is_an_os_error(call: Call) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="onnect"):
            call(f"http://127.0.0.1:{bound.getsockname()[1]}", "get_trace_stats")


def test_a_connection_closed_without_an_answer_is_an_os_error(call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_all() -> None:
            # Either client may try twice.
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1000)

        closing = threading.Thread(target=close_all)
        closing.start()
        try:
            with pytest.raises(OSError, match=r".+"):
                call(f"http://127.0.0.1:{listener.getsockname()[1]}", "get_trace_stats")
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            closing.join()


def test_headers_go_with_every_request() -> None:
    keys: list[str | None] = []
    headers = {"authorization": "Bearer key"}
    with server(200, b"[]", keys) as url:
        client = RouterTraceClient(url, headers=headers)
        assert client.list_recent_traces() == client.batch_get_traces(["a"]) == []

        async def listed() -> list[Any]:
            async with AsyncRouterTraceClient(url, headers=headers) as client:
                return await client.list_recent_traces() + await client.batch_get_traces(["a"])

        assert asyncio.run(listed()) == []
    assert keys == ["Bearer key"] * 4
