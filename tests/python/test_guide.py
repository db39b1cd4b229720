"""The guide's two scripts, as they are. The one module with fixed ports: theirs."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator

import pytest
from running import Program, Sim, ask, generate, until

ROUTER_PORT, WORKER_PORTS = 30001, (30002, 30003)
ROUTER = f"http://127.0.0.1:{ROUTER_PORT}"


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def workers() -> Iterator[Sim]:
    for port in (ROUTER_PORT, *WORKER_PORTS):
        until(lambda port=port: is_free(port), f"port {port} to be free")
    with Sim(ports="30002-30003") as sim:
        yield sim


@pytest.fixture
def guide_router(workers: Sim) -> Iterator[Program]:
    """The guide's router, from the moment its port opens."""
    with Program("examples/start_test_router.py") as router:
        until(lambda: is_open(ROUTER_PORT) or router.process.poll() is not None)
        yield router


def test_every_step_of_the_guide_succeeds(guide_router: Program) -> None:
    with Program("examples/test_request_tracking.py") as client:
        assert client.end() == 0, client.output
    text = client.output
    assert text.count("✅") == 6, text
    assert "❌" not in text
    assert "找到 3 个请求" in text
    assert "最近的请求: 5 个" in text
    assert "总请求数: 5" in text
    assert "completed: 5 个请求" in text
    assert "路由策略: cache_aware" in text
    assert "状态: completed" in text
    nodes = dict(re.findall(r"    - (gpu_\d+): (\d+) 个请求", text))
    assert set(nodes) <= {"gpu_1", "gpu_2"}
    assert sum(map(int, nodes.values())) == 5


def test_a_request_at_the_moment_the_port_opens_is_served_and_traced(guide_router: Program) -> None:
    answer = generate(ROUTER, "first")
    assert answer.status == 200
    trace = ask(f"{ROUTER}/v1/traces/first").json()
    assert trace["worker_url"] == answer.headers["x-sglang-worker"]
    assert trace["worker_url"].endswith(answer.headers["x-sim-port"])


def test_ctrl_c_reaches_the_scripts_own_except(guide_router: Program) -> None:
    guide_router.send(signal.SIGINT)
    assert guide_router.end() == 0
    assert "路由器已停止" in guide_router.output
    assert "Traceback" not in guide_router.output
    assert is_free(ROUTER_PORT)
