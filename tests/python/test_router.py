"""The life of a ``Router``: with-block, threads, several in one process, forks."""

from __future__ import annotations

import socket
import threading

import pytest
from running import Program, Sim, ask, generate, until
from sglang_router_rs import Router, TracingDisabled

QUIET = {"port": 0, "log_level": "off"}


def test_a_with_block_serves_in_the_background(sim: Sim) -> None:
    router = Router(sim.urls, **QUIET)
    assert not router.is_running
    with router as serving:
        assert serving is router
        assert router.is_running
        assert router.wait_ready()
        assert router.url == f"http://127.0.0.1:{router.port}"
        assert generate(router.url).status == 200
    assert not router.is_running


def test_an_error_in_a_with_block_passes_through_and_ends_the_router(sim: Sim) -> None:
    router = Router(sim.urls, **QUIET)
    with pytest.raises(ZeroDivisionError), router:
        raise ZeroDivisionError
    assert not router.is_running


def test_port_0_takes_a_free_port(router: Router) -> None:
    assert 0 < router.port < 65536
    assert ask(f"{router.url}/health").status == 200


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1"),
        ("localhost", "http://127.0.0.1"),
        ("::1", "http://[::1]"),
        ("[::1]", "http://[::1]"),
    ],
)
def test_the_url_is_where_a_client_here_reaches_it(host: str, url: str) -> None:
    try:
        router = Router(host=host, **QUIET)
        router.__enter__()
    except OSError as error:
        pytest.skip(f"no such address here: {error}")
    try:
        assert router.url == f"{url}:{router.port}" or host == "localhost"
        assert ask(f"{router.url}/health").status == 200
    finally:
        router.stop()


def test_wait_ready_is_false_without_a_worker() -> None:
    with Router(**QUIET) as router:
        assert router.wait_ready(timeout=0.01) is False


def test_wait_ready_is_false_once_the_router_has_ended() -> None:
    with Router(**QUIET) as router:
        router.stop()
        assert router.wait_ready() is False


def test_what_is_only_there_while_serving_says_so() -> None:
    router = Router(port=0)
    for act in (lambda: router.url, lambda: router.port, router.wait_ready, lambda: router.trace("a"), router.traces):
        with pytest.raises(RuntimeError, match="has not been started"):
            act()
    router.stop()


def test_a_router_that_serves_cannot_be_started_again(router: Router) -> None:
    with pytest.raises(RuntimeError, match="serving already"):
        router.start()
    assert router.is_running


def test_a_stopped_router_starts_again(sim: Sim) -> None:
    router = Router(sim.urls, **QUIET)
    for _ in range(3):
        with router:
            assert router.wait_ready()
            assert generate(router.url).status == 200
        assert not router.is_running


def test_stop_from_another_thread_ends_start(sim: Sim) -> None:
    router = Router(sim.urls, **QUIET)
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(router.start()))
    thread.start()
    until(lambda: router.is_running)
    assert router.wait_ready()
    assert generate(router.url).status == 200
    router.stop()
    router.stop()
    thread.join(30)
    assert ended == [None]


def test_stop_frees_the_port(sim: Sim) -> None:
    with Router(sim.urls, **QUIET) as router:
        port = router.port
    with Router(sim.urls, port=port, log_level="off") as again:
        assert again.port == port


def test_stop_cuts_what_outlasts_its_grace(hanging: Sim) -> None:
    options = {"disable_health_check": True, "enable_request_tracking": True}
    with Router(hanging.urls, **QUIET, **options) as router:
        cut: list[BaseException] = []

        def request() -> None:
            try:
                generate(router.url)
            except OSError as error:
                cut.append(error)

        client = threading.Thread(target=request)
        client.start()
        until(lambda: router.traces(status="routed"))
        router.stop(grace_secs=0)
        client.join(30)
        assert len(cut) == 1


@pytest.mark.parametrize("grace_secs", [-1, float("nan"), float("inf")])
def test_a_grace_is_a_number_of_seconds(router: Router, grace_secs: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        router.stop(grace_secs)
    assert router.is_running


def test_routers_in_one_process_know_nothing_of_each_other(sim: Sim) -> None:
    first = Router(sim.urls[:1], enable_request_tracking=True, **QUIET)
    second = Router(sim.urls[1:], "random", **QUIET)
    with first, second:
        assert first.wait_ready()
        assert second.wait_ready()
        assert first.port != second.port
        assert generate(first.url, "a").headers["x-sglang-worker"] == sim.urls[0]
        assert generate(second.url, "b").headers["x-sglang-worker"] == sim.urls[1]
        assert first.trace("a") is not None
        assert first.trace("b") is None
        with pytest.raises(TracingDisabled):
            second.trace("b")
        first.stop()
        assert generate(second.url).status == 200


def test_a_taken_port_is_an_os_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        router = Router(port=port, log_level="off")
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1"):
            router.start()
        with pytest.raises(OSError, match=str(port)), router:
            pass
        assert not router.is_running


def test_a_host_that_is_not_here_is_an_os_error_that_names_it() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        Router(host="192.0.2.1", **QUIET).start()


def test_it_reads_its_traces_without_http(router: Router) -> None:
    answers = [generate(router.url, f"id-{index}") for index in range(4)]
    until(lambda: len(router.traces(status="completed")) == 4)
    trace = router.trace("id-2")
    assert trace is not None
    assert trace["worker_url"] == answers[2].headers["x-sglang-worker"]
    assert trace == ask(f"{router.url}/v1/traces/id-2").json()
    assert [trace["request_id"] for trace in router.traces(limit=3)] == ["id-3", "id-2", "id-1"]
    assert len(router.traces(worker_url=trace["worker_url"])) == 2
    with pytest.raises(ValueError, match="limit=0"):
        router.traces(limit=0)
    assert router.trace("other") is None
    assert router.trace_stats()["total_requests"] == 4
    with pytest.raises(ValueError, match="node_id"):
        router.traces(nodeid="gpu_0")


def test_in_a_forked_child_it_refuses_and_the_parent_serves_on(sim: Sim) -> None:
    script = """
import os, sys, urllib.request
from sglang_router_rs import Router
router = Router(sys.argv[1:], port=0, enable_request_tracking=True, log_level="off")
with router:
    child = os.fork()
    if child == 0:
        acts = [router.start, router.stop, router.wait_ready, router.traces, router.trace_stats, router.__enter__,
                lambda: router.trace("a"), lambda: router.url, lambda: router.port, lambda: router.is_running]
        for act in acts:
            try:
                act()
            except RuntimeError as error:
                assert "make a new Router" in str(error)
            else:
                os._exit(1)
        with Router(sys.argv[1:], port=0, log_level="off") as own:
            assert own.wait_ready()
        # The parent's router is dropped here, with threads that this process does not have.
        sys.exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert urllib.request.urlopen(router.url + "/health").status == 200
    print("child ended with", status)
"""
    with Program("-W", "ignore::DeprecationWarning", "-c", script, *sim.urls) as program:
        assert program.end() == 0, program.output
        assert "child ended with 7" in program.output
