"""Workers and a router as processes of this run, each with a log file. None outlives the with-block.

Every process has a session of its own, so that Ctrl-C in a terminal reaches only the run, which then ends them: with
SIGTERM, and with SIGKILL for the whole session when that takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp

from ..router import option_texts
from .options import OptionError

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
# A model is loaded, and compiled for.
WORKER_START_SECS = 1800.0
ROUTER_START_SECS = 60.0
STOP_SECS = 20.0
LOOK_EVERY_SECS = 0.05
# Of the kernel's clocks of a process, the one that the scheduler keeps.
_CPUCLOCK_SCHED = 2
# Of a log, in the message about a process that ended.
LINES_SHOWN = 15


class RunError(Exception):
    """The run cannot go on; says what to do about it."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for it in sockets:
            it.bind((HOST, 0))
        return [it.getsockname()[1] for it in sockets]


def check_free(port: int) -> None:
    """See that nobody listens on a port: otherwise he would be taken for the one who is started there.

    Raises:
        RunError: names the port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"{error.strerror}, by a server or an outgoing connection"
            raise RunError(f"port {port}: {reason}; stop that, or take another port") from None


@dataclass(frozen=True)
class Worker:
    """A worker of this run."""

    url: str
    node_id: str | None = None


class Process:
    """A program that writes to a log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        # The options are those of this run alone.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SGLANG_ROUTER__")}
        with log.open("ab") as output:
            # What earlier runs wrote stays.
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def cpu_secs(self) -> float:
        """Processor time it has taken, in user and system mode together, to the nanosecond."""
        # The id of another process's clock, as clock_getcpuclockid(3) makes it on Linux: /proc counts in 10 ms only.
        return time.clock_gettime((~self._process.pid << 3) | _CPUCLOCK_SCHED)

    @property
    def resident_bytes(self) -> int:
        """Its memory."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def until_answers(self, url: str, path: str, secs: float) -> None:
        """Wait until it answers the path with 200.

        Raises:
            RunError: it ended, or took too long; shows the end of its log.
        """
        deadline = time.monotonic() + secs
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                if self._process.poll() is not None:
                    raise RunError(f"{self.name} ended with status {self._process.returncode}:\n{self._log_end()}")
                with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                    async with session.get(url + path) as response:
                        if response.ok:
                            return
                if time.monotonic() > deadline:
                    raise RunError(f"{self.name} is not ready after {secs:g} s:\n{self._log_end()}")
                await asyncio.sleep(LOOK_EVERY_SECS)

    def ask_to_end(self) -> None:
        """SIGTERM."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, for it and all of its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Wait for its end; after some time it is killed, with all of its children."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECS)
        self.kill()
        self._process.wait()

    def _log_end(self) -> str:
        text = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        lines = text.splitlines()[-LINES_SHOWN:]
        return "\n".join(f"  {line}" for line in lines) or "  (it printed nothing)"


class Cluster:
    """The processes of a run, in an ``async with``; their logs are in ``logs``."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[Process] = []

    async def start_workers(
        self, ports: Sequence[int], gpu_ids: Sequence[int], model_path: str | None, arguments: Sequence[str]
    ) -> list[Worker]:
        """Start a worker for each GPU: SGLang servers of the model, or simulated ones without it; wait for them.

        Raises:
            RunError: a worker ended or did not become ready.
        """
        started = []
        for port in ports:
            check_free(port)
        for port, gpu in zip(ports, gpu_ids, strict=True):
            command = worker_command(port, gpu, model_path, arguments)
            started.append((self.start(f"worker-gpu_{gpu}", command), Worker(f"http://{HOST}:{port}", f"gpu_{gpu}")))
        for process, worker in started:
            await process.until_answers(worker.url, "/health", WORKER_START_SECS)
        return [worker for _, worker in started]

    async def start_router(self, port: int, workers: Sequence[Worker], options: Mapping[str, object]) -> Process:
        """Start a router before these workers, and wait until it can pick one.

        Raises:
            RunError: it refused an option, or no worker is healthy.
            OptionError: an option is not one of the router's.
        """
        check_free(port)
        process = self.start("router", router_command(port, workers, options))
        await process.until_answers(f"http://{HOST}:{port}", "/readiness", ROUTER_START_SECS)
        return process

    def stop(self, process: Process) -> None:
        """End one of them."""
        process.ask_to_end()
        process.end()
        self._running.remove(process)

    def start(self, name: str, command: Sequence[str]) -> Process:
        """Start a program that ends with the cluster."""
        process = Process(name, command, self._logs / f"{name}.log")
        self._running.append(process)
        return process

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.ask_to_end()
        for process in self._running:
            process.end()
        self._running.clear()


def worker_command(port: int, gpu: int, model_path: str | None, arguments: Sequence[str]) -> list[str]:
    """The command of one worker."""
    where = ["--host", HOST, "--port", str(port), "--base-gpu-id", str(gpu)]
    if model_path is None:
        return [sys.executable, "-m", "sglang_router_rs", "sim", *where, *arguments]
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path, *where, *arguments]


def router_command(port: int, workers: Sequence[Worker], options: Mapping[str, Any]) -> list[str]:
    """The command of the router; options as keywords of ``Router``."""
    names = {worker.url: worker.node_id for worker in workers if worker.node_id is not None}
    settings: dict[str, Any] = {
        "host": HOST,
        "port": port,
        "worker_urls": [worker.url for worker in workers],
        "node_ids": names,
        **options,
    }
    flags = []
    for name, value in settings.items():
        if value is None:
            continue
        if not re.fullmatch(r"[a-z_]+", name):
            raise OptionError("router_options", name, "is not an option of the router")
        try:
            flags += [f"--{name.replace('_', '-')}={text}" for text in option_texts(name, value)]
        except TypeError as error:
            raise OptionError("router_options", {name: value}, str(error)) from None
    return [sys.executable, "-m", "sglang_router_rs", "launch", *flags]
