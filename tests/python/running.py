"""What the tests start and talk to: programs, simulated workers, HTTP. Waiting is polling with a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Long enough for a loaded machine: a test that meets it has failed.
DEADLINE_SECS = 30


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + DEADLINE_SECS
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {DEADLINE_SECS} s in vain for {what or condition}")
        time.sleep(0.005)
    return value


@dataclass
class Answer:
    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(url: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
    """GET, or POST of a JSON body; also an answer that is an error."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_SECS) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def until_healthy(url: str, workers: int) -> None:
    """Wait until a router may pick any of so many workers; one that is ready may pick one of them."""
    until(lambda: ask(f"{url}/readiness").json().get("healthy_workers") == workers, f"{workers} healthy workers")


def generate(url: str, request_id: str | None = None, text: str = "hello") -> Answer:
    """One short request through the router at the URL."""
    body = {"text": text, "sampling_params": {"max_new_tokens": 1}}
    return ask(f"{url}/generate", body, {"x-request-id": request_id} if request_id else None)


class Program:
    """A Python program in a process of its own, with what it printed so far. Ends with the with-block."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_ROUTER__")}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**kept, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            # Its children end with it.
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def find(self, pattern: str) -> re.Match[str]:
        """Waits until the output matches."""

        def found() -> re.Match[str] | None:
            has_ended = self.process.poll() is not None and not self._reader.is_alive()
            match = re.search(pattern, self.output)
            assert match or not has_ended, f"ended without {pattern!r}:\n{self.output}"
            return match

        return until(found, f"{pattern!r} in:\n{self.output}")

    def router_url(self) -> str:
        """Where a router that logs its start listens."""
        return self.find(r"sglang_router_rs \S+ on (http://\S+),")[1].replace("0.0.0.0", "127.0.0.1")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for its end; its exit status."""
        status = self.process.wait(DEADLINE_SECS)
        self._reader.join(DEADLINE_SECS)
        return status

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(DEADLINE_SECS)
        assert self.process.stdout is not None
        self.process.stdout.close()


def module(*arguments: str, environment: dict[str, str] | None = None) -> Program:
    """The package's command line."""
    return Program("-m", "sglang_router_rs", *arguments, environment=environment)


class Sim(Program):
    """Simulated workers, by default two on free ports."""

    def __init__(self, *flags: str, ports: str = "0,0") -> None:
        super().__init__("-m", "sglang_router_rs", "sim", "--ports", ports, *flags)
        count = len(ports.split(",")) if "-" not in ports else 1
        try:
            until(lambda: len(self.urls) >= count or self.process.poll() is not None)
            assert self.process.poll() is None, self.output
        except BaseException:
            self.__exit__()
            raise

    @property
    def urls(self) -> list[str]:
        return re.findall(r"simulated worker on (http://\S+)\n", self.output)

    def stats(self) -> list[dict[str, Any]]:
        return [ask(f"{url}/sim/stats").json() for url in self.urls]

    def __enter__(self) -> Sim:
        return self


def in_threads(count: int, tasks: Iterable[Callable[[], object]]) -> None:
    """Runs the tasks on so many threads; raises what one of them raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()
