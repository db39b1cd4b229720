"""Signals while ``start()`` blocks, each in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from running import DEADLINE_SECS, Program, Sim, generate, module, until

STREAMS = 100

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


FRAMES = [b"data: {}\n\n", b"data: [DONE]\n\n"]


class Streaming(BaseHTTPRequestHandler):
    """A worker that sends the first frame of a stream at once, and the last one when it is told to."""

    protocol_version = "HTTP/1.1"
    released: threading.Event

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.send(FRAMES[0])
        self.released.wait(DEADLINE_SECS)
        self.send(FRAMES[1])
        self.send(b"")

    def send(self, chunk: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def streaming() -> Iterator[tuple[str, threading.Event]]:
    """The URL of such a worker, and what tells it to send the last frames."""
    released = threading.Event()

    class Server(ThreadingHTTPServer):
        request_queue_size = STREAMS

    with Server(("127.0.0.1", 0), type("Handler", (Streaming,), {"released": released})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", released
        finally:
            released.set()
            server.shutdown()
            thread.join()


def started(url: str) -> Program:
    return serving(START, [url])


def launched(url: str) -> Program:
    return module("launch", "--port=0", "--worker-urls", url)


@pytest.mark.parametrize(("start", "tells"), [(started, r"serving on (\S+)"), (launched, r" on (http://\S+),")])
def test_sigterm_among_a_hundred_streams_cuts_none(
    start: Callable[[str], Program], tells: str, streaming: tuple[str, threading.Event]
) -> None:
    worker, released = streaming
    with start(worker) as program, contextlib.ExitStack() as opened:
        router = urlsplit(program.find(tells)[1])
        address = (router.hostname or "", router.port or 0)
        # The check of a load balancer that is on its way when the signal comes: its last line is still to come.
        check = opened.enter_context(socket.create_connection(address, DEADLINE_SECS))
        check.sendall(b"GET /readiness HTTP/1.1\r\nhost: router\r\n")

        answers = []
        for _ in range(STREAMS):
            client = opened.enter_context(
                contextlib.closing(http.client.HTTPConnection(*address, timeout=DEADLINE_SECS))
            )
            client.request("POST", "/generate", b'{"text": "x", "stream": true}')
            answers.append(client.getresponse())
            assert answers[-1].read(len(FRAMES[0])) == FRAMES[0]

        program.send(signal.SIGTERM)
        program.find(f"draining {STREAMS + 1} connections")
        check.sendall(b"\r\n")
        ready = http.client.HTTPResponse(check)
        ready.begin()
        assert (ready.status, json.loads(ready.read())["reason"]) == (503, "draining")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, DEADLINE_SECS)
        assert program.process.poll() is None

        released.set()
        for answer in answers:
            # Raises if the stream is cut.
            assert answer.read() == FRAMES[1]
        assert program.end() == 0, program.output


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
