"""What the trials under load share: programs that do not outlive them, what is read of a router, and the verdict.

A trial starts a router and simulated workers, each in a process of its own, sends them requests, and says what had to
hold in a table. Its exit status is 0 if all of it held, 1 if not, 2 if the trial could not be made.

Here too is how sglang-router, which ours replaces, is installed and started. Not here: the load, and what must hold of
it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

# How long what is left in flight may take to end after the last client has.
SETTLE_SECS = 10.0
# How long programs may take to start and to end.
START_SECS = 30.0
LINES_SHOWN = 10
THEIR_PACKAGE = "sglang-router==0.3.2"
THEIR_VENV = Path("target/venv-sglang-router")


class Failure(Exception):
    """The trial could not be made."""


# --- programs -------------------------------------------------------------------------------------------------------


class Processes:
    """The programs of this trial; none outlives the with-block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a program that writes to ``name.log``, out of reach of the terminal's Ctrl-C."""
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started = [*(it for it in self.started if it.poll() is None), process]
        return process

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for process in self.started:
            process.kill()
        for process in self.started:
            process.wait()


def free_ports(count: int) -> list[int]:
    """Free ports in a row, below those the system gives to connections: a worker comes back to its port."""
    for _ in range(1000):
        first = random.randrange(10_000, 32_000 - count)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise Failure(f"no {count} free ports in a row between 10000 and 32000")


async def until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a program listens."""
    deadline = time.monotonic() + START_SECS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.02)
    command = " ".join(map(str, process.args)) if isinstance(process.args, list) else process.args
    raise Failure(f"nothing listens on port {port}, exit status {process.poll()}: {command!r}")


async def ended(process: subprocess.Popen[bytes]) -> bool:
    """Wait for a program's end; false when that takes too long."""
    deadline = time.monotonic() + START_SECS
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def stopped(router: subprocess.Popen[bytes]) -> list[str]:
    """What is wrong with how the router ends on SIGTERM."""
    if router.poll() is not None:
        return [f"it ended by itself with exit status {router.returncode}"]
    router.terminate()
    if not await ended(router):
        return [f"it has not ended {START_SECS:.0f} s after SIGTERM"]
    return [f"its exit status is {router.returncode}"] if router.returncode != 0 else []


# --- the router that ours replaces ------------------------------------------------------------------------------------


async def their_python() -> Path:
    """The interpreter that has sglang-router; installs it if it is not there."""
    python = THEIR_VENV / "bin" / "python"
    if not (THEIR_VENV / ".installed").exists():
        print(f"installing {THEIR_PACKAGE} into {THEIR_VENV}", file=sys.stderr)
        make = [sys.executable, "-m", "venv", str(THEIR_VENV)]
        for command in (make, [str(python), "-m", "pip", "install", "-q", THEIR_PACKAGE]):
            process = await asyncio.create_subprocess_exec(*command)
            if await process.wait() != 0:
                raise Failure(f"{' '.join(command)} failed")
        (THEIR_VENV / ".installed").touch()
    return python


async def their_command(port: int, policy: str, worker_urls: Sequence[str]) -> list[str]:
    """The command line of sglang-router; installs it if it is not there."""
    command = [str(await their_python()), "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--policy", policy, "--prometheus-port", str(free_ports(1)[0])]
    return [*command, "--log-level", "warn", "--worker-startup-check-interval", "1", "--worker-urls", *worker_urls]


# --- what router and workers say of themselves ------------------------------------------------------------------------


def resident_kib(pid: int) -> float | None:
    """The resident memory of a process in KiB; None once the process is gone."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return float(found[1]) if found else None
    return None


async def in_flight(url: str, session: aiohttp.ClientSession) -> list[str]:
    """What the router counts as in flight now."""
    async with session.get(f"{url}/metrics") as response:
        metrics = await response.text()
    async with session.get(f"{url}/v1/traces/stats") as response:
        open_traces = (await response.json())["in_flight"]
    running = re.findall(r'^sgl_router_running_requests\{worker="([^"]*)"\} (\S+)$', metrics, re.MULTILINE)
    counted = [f"{count} in flight at {worker}" for worker, count in running if float(count) != 0]
    if open_traces:
        counted.append(f"{open_traces} in the statistics of traces")
    if not running:
        counted.append("/metrics has no sgl_router_running_requests")
    return counted


async def all_traces(url: str, session: aiohttp.ClientSession) -> dict[str, dict[str, Any]]:
    """Every trace the router holds, by id."""
    traces = {}
    async with session.get(f"{url}/v1/traces", params={"format": "jsonl"}) as response:
        response.raise_for_status()
        async for line in response.content:
            trace = json.loads(line)
            traces[trace["request_id"]] = trace
    return traces


async def at_rest(look: Callable[[], Awaitable[list[str]]]) -> list[str]:
    """What a look still finds when everything has had the time to end."""
    deadline = time.monotonic() + SETTLE_SECS
    while True:
        found = await look()
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


def request_log(path: Path) -> Iterator[dict[str, Any]]:
    """What simulated workers wrote of the requests that had an id."""
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["request_id"] is not None:
            yield line


# --- the verdict ----------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """Something that must hold, and what speaks against it."""

    name: str
    against: list[str]
    note: str = ""
    is_judged: bool = True


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN if there are no values."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)] if ranked else math.nan


def spread(values: Sequence[float]) -> str:
    """The middle and the end of a distribution of milliseconds."""
    return f"p50 {percentile(values, 50):.2f} ms, p99 {percentile(values, 99):.2f}, most {percentile(values, 100):.2f}"


def show(rules: list[Rule]) -> bool:
    """Print the table; whether everything held."""
    print(f"\n{'must hold':<66} {'held':<6} note")
    for rule in rules:
        held = f"NO, {len(rule.against)}" if rule.against else "yes" if rule.is_judged else "-"
        print(f"{rule.name:<66} {held:<6} {rule.note}".rstrip())
    for rule in rules:
        if rule.against:
            print(f"\n{rule.name}: NO")
            # One of each kind, the most frequent first; what differs only in its numbers is of one kind.
            kinds: defaultdict[str, list[str]] = defaultdict(list)
            for line in rule.against:
                kinds[re.sub(r"\d+", "0", line)].append(line)
            for lines in sorted(kinds.values(), key=len, reverse=True)[:LINES_SHOWN]:
                print(f"  {len(lines)} like {lines[0]}")
    return not any(rule.against for rule in rules)


# --- the command ----------------------------------------------------------------------------------------------------

Run = Callable[[argparse.Namespace, Processes], Awaitable[list[Rule]]]


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1000000")
    return value


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows defaults, and the text above as it is."""


def parser(text: str | None) -> argparse.ArgumentParser:
    """A command line with the options of every trial; the text is the script's own."""
    first, _, rest = (text or "").partition("\n\n")
    made = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=Help)
    made.add_argument(
        "--program", default=str(Path(sys.executable).with_name("sglang-router-rs")), help="the program under test"
    )
    made.add_argument(
        "--directory", type=Path, help="where logs go, and stay; without it they are kept when something did not hold"
    )
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the options of every trial checked."""
    settings = made.parse_args()
    if not Path(settings.program).is_file():
        made.error(f"--program: there is no {settings.program}; make install builds it")
    if settings.directory and settings.directory.exists() and any(settings.directory.iterdir()):
        made.error(f"--directory: {settings.directory} is not empty")
    return settings


async def cancel_others() -> None:
    """End all other tasks, so that none uses what is closed next."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def interruptible(run: Run, settings: argparse.Namespace, processes: Processes) -> list[Rule]:
    """The run, which SIGTERM ends like Ctrl-C."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(settings, processes)


def carry_out(name: str, settings: argparse.Namespace, run: Run) -> int:
    """Make one trial; returns the exit status."""
    for option, value in vars(settings).items():
        print(f"--{option.replace('_', '-'):<16} {value}")
    directory = settings.directory or Path(tempfile.mkdtemp(prefix=f"{name}-"))
    directory.mkdir(parents=True, exist_ok=True)
    print(f"\nlogs in {directory}", flush=True)
    status = 2
    try:
        with Processes(directory) as processes:
            rules = asyncio.run(interruptible(run, settings, processes))
        status = 0 if show(rules) else 1
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception:
        traceback.print_exc()
    if status in (0, 130) and settings.directory is None:
        shutil.rmtree(directory)
    else:
        print(f"\nlogs are in {directory}")
    return status
