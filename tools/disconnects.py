"""Two thousand clients at once, each of which leaves at a random moment: how soon does its worker know?

    make bench-disconnects                                       the defaults
    make bench-disconnects DISCONNECTS="--clients 500 --seed 7"  with options

All clients connect within two seconds, half of them for a stream; no answer ends before its client leaves. When the
last one has left they come again, three times in all: what a storm leaves behind would add up. Measured is the time
from a client's close to the line in the worker's own log that says its request was cut off: both are stamped with the
clock of this machine. A worker computes one prompt after the other, so that clients leave a worker's queue, its
prefill, and its answer. What must hold is in the table that is printed; the exit status is 0 if all of it held, 1 if
not, 2 if the run could not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from trial import (
    Failure,
    Processes,
    Rule,
    all_traces,
    at_rest,
    cancel_others,
    carry_out,
    free_ports,
    in_flight,
    parsed,
    parser,
    percentile,
    positive,
    request_log,
    resident_kib,
    spread,
    stopped,
    until_open,
)

# All clients have connected after this time.
CONNECT_SECS = 2.0
# What must hold, from a client's close to the worker's knowledge.
KNOWN_WITHIN_MS = 100.0
# Who stays no longer may be gone before the router has read the request, and then there is no trace of it.
READ_SECS = 0.1
# They all come several times over: memory that a storm needed serves the next one too, give or take this much.
STORMS = 3
MORE_MEMORY = 1.1
# A worker computes one prompt at a time, and then all its answers token by token.
PROMPT_TOKENS = 150
PREFILL_SECS = 1.5
STEP_SECS = 0.5
# File descriptors of this program beside the clients'.
OWN_DESCRIPTORS = 200
# In the kernel's tables of connections.
TIME_WAIT = "06"


@dataclass
class Client:
    """Someone who asks and does not wait for the end."""

    id: str
    number: int
    streamed: bool
    comes_after_secs: float
    stays_secs: float
    # More than come while it stays.
    tokens: int
    left_at: float = 0.0
    received_bytes: int = 0
    wrong: str | None = None

    def request(self, port: int) -> bytes:
        """The bytes that are sent."""
        # Prompts share no beginning, so that none is cached.
        prompt = [1000 + self.number, *range(PROMPT_TOKENS - 1)]
        sampling = {"max_new_tokens": self.tokens}
        body = json.dumps({"input_ids": prompt, "stream": self.streamed, "sampling_params": sampling})
        head = f"POST /generate HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nx-request-id: {self.id}\r\n"
        return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()

    async def visit(self, port: int) -> None:
        """Come, ask, read, and leave."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.comes_after_secs)
        with socket.socket() as connection:
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, ("127.0.0.1", port))
                await loop.sock_sendall(connection, self.request(port))
                await asyncio.wait_for(self.read(connection), self.stays_secs)
                self.wrong = f"the answer ended after {self.received_bytes} bytes"
            except asyncio.TimeoutError:
                pass
            except OSError as error:
                self.wrong = str(error)
            self.left_at = time.time()

    async def read(self, connection: socket.socket) -> None:
        """Read until the other side ends it."""
        while chunk := await asyncio.get_running_loop().sock_recv(connection, 1 << 16):
            self.received_bytes += len(chunk)


class Waking:
    """How late this program is woken: nobody is told sooner on a machine that is busy with other things."""

    late_ms = 0.0

    async def run(self) -> None:
        """Look on until cancelled."""
        while True:
            due = time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            self.late_ms = max(self.late_ms, (time.monotonic() - due) * 1e3)


def crowd(settings: argparse.Namespace, storm: int) -> list[Client]:
    """Everyone who comes in one storm; each has a number of its own among all."""
    draw = random.Random(settings.seed + storm)
    return [
        Client(
            id=f"client-{number}",
            number=number,
            streamed=draw.random() < 0.5,
            comes_after_secs=draw.uniform(0, CONNECT_SECS),
            stays_secs=draw.uniform(0, settings.seconds),
            tokens=math.ceil(2 * settings.seconds / STEP_SECS),
        )
        for number in range(storm * settings.clients, (storm + 1) * settings.clients)
    ]


# --- what is left of them -------------------------------------------------------------------------------------------


class Descriptors:
    """The open files of the router."""

    def __init__(self, router: subprocess.Popen[bytes], workers: Iterable[int]) -> None:
        self.directory = Path(f"/proc/{router.pid}/fd")
        self.workers = set(workers)

    def count(self) -> int:
        """How many there are."""
        return len(os.listdir(self.directory))

    def to_workers(self) -> int:
        """How many of them are connections to workers."""
        sockets = set()
        for name in os.listdir(self.directory):
            with contextlib.suppress(FileNotFoundError):
                sockets.add(os.readlink(self.directory / name))
        lines = (self.directory.parent / "net" / "tcp").read_text().splitlines()[1:]
        fields = [line.split() for line in lines]
        return sum(
            int(it[2].rpartition(":")[2], 16) in self.workers and it[3] != TIME_WAIT and f"socket:[{it[9]}]" in sockets
            for it in fields
        )


@dataclass
class Visit:
    """A request at a worker, by the worker's own log."""

    id: str
    port: int
    arrived_at: float
    ended_at: float | None = None
    ending: str | None = None
    place: str = ""


def visits(log: Iterable[dict[str, Any]]) -> dict[str, Visit]:
    """What came to the workers, by id, and where in the worker it was when it ended."""
    found: dict[str, Visit] = {}
    for line in log:
        if line["event"] == "arrived":
            found[line["request_id"]] = Visit(line["request_id"], line["port"], line["at"])
        else:
            visit = found[line["request_id"]]
            visit.ended_at, visit.ending = line["at"], line["ending"]
    by_worker: defaultdict[int, list[Visit]] = defaultdict(list)
    for visit in sorted(found.values(), key=lambda visit: visit.arrived_at):
        by_worker[visit.port].append(visit)
    for those in by_worker.values():
        place(those)
    return found


def place(those: list[Visit]) -> None:
    """Say where each request of one worker was at its end: prompts are computed one after the other as they came."""
    free_at = 0.0
    for visit in those:
        ended_at = visit.ended_at or float("inf")
        starts_at = max(free_at, visit.arrived_at)
        if ended_at < starts_at:
            visit.place = "queue"
        elif ended_at < starts_at + PREFILL_SECS:
            visit.place, free_at = "prefill", ended_at
        else:
            visit.place, free_at = "answer", starts_at + PREFILL_SECS


# --- the verdict ----------------------------------------------------------------------------------------------------


def judge(
    clients: list[Client], traces: dict[str, dict[str, Any]], found: dict[str, Visit], late_ms: float
) -> list[Rule]:
    """What must hold of the records."""
    delays: defaultdict[str, list[float]] = defaultdict(list)
    unknown = []
    for client in clients:
        visit = found.get(client.id)
        if visit and visit.ending == "cut_off" and visit.ended_at is not None:
            delays[visit.place].append((visit.ended_at - client.left_at) * 1e3)
        elif visit:
            unknown.append(f"{client.id}: its worker says {visit.ending}")
    every = [delay for those in delays.values() for delay in those]
    slow = percentile(every, 99)
    places = "; ".join(f"{name} {len(those)}, {spread(those)}" for name, those in sorted(delays.items()))
    streaming = sum(it.streamed and it.received_bytes > 0 for it in clients)
    endings = Counter((traces[it.id]["status"], traces[it.id]["error_message"]) for it in clients if it.id in traces)
    traceless = [it for it in clients if it.id not in traces]
    return [
        Rule(
            "no answer ended before its client left",
            [f"{it.id}: {it.wrong}" for it in clients if it.wrong],
            f"{len(clients)} clients, {streaming} of them within a stream",
        ),
        Rule("every worker was told", unknown, f"{len(every)} requests; {len(clients) - len(found)} never came to one"),
        Rule(
            f"p99 from close to the worker's knowledge is at most {KNOWN_WITHIN_MS:g} ms",
            [] if slow <= KNOWN_WITHIN_MS else [f"{slow:.2f} ms"],
            f"{spread(every)}; this program itself was woken {late_ms:.0f} ms late at most",
        ),
        Rule("... by where in the worker the request was", [], places, is_judged=False),
        Rule(
            "every trace says that the client disconnected",
            [f"{it.id}: no trace" for it in traceless if it.id in found or it.stays_secs > READ_SECS]
            + [
                f"{count} traces: {status}, {message!r}"
                for (status, message), count in endings.items()
                if status != "failed" or not (message or "").startswith("client disconnected")
            ],
            f"{len(traces)} traces; {len(traceless)} left before their request was read",
        ),
    ]


# --- the run --------------------------------------------------------------------------------------------------------


def raise_descriptor_limit(clients: int) -> None:
    """Allow as many open files as there are clients; programs started from here inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * clients + OWN_DESCRIPTORS
    if most != resource.RLIM_INFINITY and most < wanted:
        raise Failure(f"{clients} clients need {wanted} open files and the limit is {most}; raise it (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def commands(settings: argparse.Namespace, log: Path, port: int, workers: list[int]) -> tuple[list[str], list[str]]:
    """The command lines of the workers and of the router under test."""
    speeds = {
        "ports": f"{workers[0]}-{workers[-1]}",
        "prefill-rate": PROMPT_TOKENS / PREFILL_SECS,
        "step-base": STEP_SECS,
        "step-per-seq": 0,
        # Only prefill makes a request wait.
        "max-running": settings.clients,
        "request-log": log,
    }
    options = {
        "port": port,
        "policy": "shortest_queue",
        "seed": settings.seed,
        "enable-request-tracking": "true",
    }
    urls = [f"http://127.0.0.1:{it}" for it in workers]
    sim = [settings.program, "sim", *(f"--{name}={value}" for name, value in speeds.items())]
    launch = [settings.program, "launch", *(f"--{name}={value}" for name, value in options.items())]
    return sim, [*launch, "--worker-urls", *urls]


async def run(settings: argparse.Namespace, processes: Processes) -> list[Rule]:
    """Make the run and judge it."""
    raise_descriptor_limit(settings.clients)
    port, *ports = free_ports(1 + settings.workers)
    log = processes.directory / "requests.jsonl"
    sim, launch = commands(settings, log, port, ports)
    workers = processes.start("workers", sim)
    await until_open(ports[-1], workers)
    router = processes.start("router", launch)
    await until_open(port, router)
    url = f"http://127.0.0.1:{port}"
    descriptors = Descriptors(router, ports)

    async with contextlib.AsyncExitStack() as stack:
        # Its own connections must not count among those that are left.
        connector = aiohttp.TCPConnector(force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        stack.push_async_callback(cancel_others)

        async def left_over() -> list[str]:
            found = await in_flight(url, session)
            if to_workers := descriptors.to_workers():
                found.append(f"{to_workers} connections to workers")
            return found

        if busy := await at_rest(left_over):
            raise Failure(f"the router is not at rest before the first client: {', '.join(busy)}")
        open_before, mib = descriptors.count(), [(resident_kib(router.pid) or 0.0) / 1024]

        async def more_open() -> list[str]:
            count = descriptors.count()
            return [f"{count}, before {open_before}"] if count > open_before else []

        waking = Waking()
        clients: list[Client] = []
        left, opened = [], []
        for storm in range(STORMS):
            those = crowd(settings, storm)
            looking_on = asyncio.create_task(waking.run())
            await asyncio.gather(*(client.visit(port) for client in those))
            looking_on.cancel()
            left += await at_rest(left_over)
            opened += await at_rest(more_open)
            mib.append((resident_kib(router.pid) or 0.0) / 1024)
            clients += those
        traces = await all_traces(url, session)

    ending = await stopped(router)
    return [
        *judge(clients, traces, visits(request_log(log)), waking.late_ms),
        Rule("nothing is in flight after each, and no connection to a worker open", left),
        Rule("the router has no more open files than before", opened, f"{open_before} before"),
        Rule(
            "another storm needs no more memory",
            [f"{mib[-2]:.1f} MiB, then {mib[-1]:.1f} MiB"] if mib[-1] > MORE_MEMORY * mib[-2] else [],
            f"{mib[0]:.1f} MiB before, {', '.join(f'{it:.1f}' for it in mib[1:])} after each",
        ),
        Rule("the router ends on SIGTERM with exit status 0", ending),
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    add = made.add_argument
    add("--clients", type=int, default=2000, help="how many come and leave at a time")
    add("--seconds", type=positive, default=20, help="the longest that one stays")
    add("--workers", type=int, default=128, choices=range(1, 513), metavar="N", help="simulated workers, 1 to 512")
    add("--seed", type=int, default=1, help="decides who asks for a stream, and who leaves when")
    return parsed(made)


if __name__ == "__main__":
    sys.exit(carry_out("disconnects", parse(), run))
