"""Signals while ``start()`` blocks, each in a process of its own."""

from __future__ import annotations

import signal
import threading

import pytest
from running import Program, Sim, generate, until

# Prints the URL once the router serves; signals are handled from then on at the latest.
SCRIPT = """
import os, signal, sys, threading, time
from sglang_router_rs import Router

# A shell starts what runs in its background with Ctrl-C ignored, and so the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
router = Router(sys.argv[1:], port=0, disable_health_check=True, enable_request_tracking=True)

def tell():
    while not router.is_running:
        time.sleep(0.005)
    print("serving on", router.url)

telling = threading.Thread(target=tell, daemon=True)
telling.start()
"""

START = """
try:
    router.start()
    print("returned")
except KeyboardInterrupt:
    print("interrupted")
print("running" if router.is_running else "ended")
"""


def serving(script: str, workers: list[str]) -> Program:
    return Program("-c", SCRIPT + script, *workers)


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "returned")])
def test_a_signal_ends_start(sim: Sim, number: signal.Signals, outcome: str) -> None:
    with serving(START, sim.urls) as program:
        url = program.find(r"serving on (\S+)")[1]
        assert generate(url).status == 200
        program.send(number)
        assert program.end() == 0
        assert f"{outcome}\nended\n" in program.output


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "returned")])
def test_the_first_signal_waits_for_requests_in_flight_and_the_second_does_not(
    hanging: Sim, number: signal.Signals, outcome: str
) -> None:
    with serving(START, hanging.urls) as program:
        url = program.find(r"serving on (\S+)")[1]
        cut: list[BaseException] = []

        def request() -> None:
            try:
                generate(url)
            except OSError as error:
                cut.append(error)

        client = threading.Thread(target=request)
        client.start()
        from sglang_router_rs import RouterTraceClient

        traces = RouterTraceClient(url)
        until(lambda: traces.list_recent_traces(status="routed"))
        program.send(number)
        program.find("draining")
        assert program.process.poll() is None
        assert not cut
        program.send(number)
        assert program.end() == 0
        assert f"{outcome}\nended\n" in program.output
        client.join(30)
        assert len(cut) == 1


def test_a_request_in_flight_at_a_signal_is_answered() -> None:
    # 0.2 s of prefill: slow enough to be in flight, fast enough for a test.
    with Sim("--prefill-rate", "5", "--step-base", "0.001", ports="0") as slow, serving(START, slow.urls) as program:
        url = program.find(r"serving on (\S+)")[1]
        statuses: list[int] = []
        client = threading.Thread(target=lambda: statuses.append(generate(url, text="a b c d").status))
        client.start()
        until(lambda: slow.stats()[0]["running"])
        program.send(signal.SIGTERM)
        assert program.end() == 0
        client.join(30)
        assert statuses == [200]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_earlier_handlers_are_restored(number: signal.Signals) -> None:
    own = """
import signal
def mine(number, frame):
    print("my handler got", number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, mine)
"""
    after = """
for number in (signal.SIGINT, signal.SIGTERM):
    assert signal.getsignal(number) is mine
    os.kill(os.getpid(), number)
"""
    with Program("-c", SCRIPT + own + START + after) as program:
        program.find("serving on")
        program.send(number)
        assert program.end() == 0, program.output
        assert "ended\nmy handler got 2\nmy handler got 15\n" in program.output


def test_a_thread_of_python_runs_while_start_blocks() -> None:
    script = """
def count():
    telling.join()
    for _ in range(1_000_000):
        pass
    print("counted")
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=count, daemon=True).start()
"""
    with serving(script + START, []) as program:
        assert program.end() == 0
        assert "counted\n" in program.output
        assert "returned\nended\n" in program.output


UNTOUCHED = """
touched = []
def stop_soon():
    while not router.is_running:
        time.sleep(0.005)
    router.stop()
def watch():
    signal.signal = lambda *call: touched.append(call)
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            """
watch()
serving = threading.Thread(target=router.start)
serving.start()
stop_soon()
serving.join()
""",
            id="off the main thread",
        ),
        pytest.param(
            """
watch()
with router:
    stop_soon()
""",
            id="in a with-block",
        ),
        pytest.param(
            """
import asyncio
async def main():
    set_by_asyncio = signal.signal
    watch()
    stopping = threading.Thread(target=stop_soon)
    stopping.start()
    router.start()
    stopping.join()
    signal.signal = set_by_asyncio
asyncio.run(main())
""",
            id="under a running event loop",
        ),
    ],
)
def test_handlers_are_not_touched(script: str) -> None:
    with Program("-c", SCRIPT + UNTOUCHED + script + "print('touched', touched)") as program:
        assert program.end() == 0, program.output
        assert "touched []" in program.output


def test_ctrl_c_in_a_with_block_ends_the_router(sim: Sim) -> None:
    script = """
try:
    with router:
        print("in the block")
        while True:
            time.sleep(0.01)
except KeyboardInterrupt:
    print("interrupted,", "running" if router.is_running else "ended")
"""
    with serving(script, sim.urls) as program:
        program.find("in the block")
        program.send(signal.SIGINT)
        assert program.end() == 0, program.output
        assert "interrupted, ended" in program.output
