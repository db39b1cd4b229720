"""Clients that mean harm, one kind after the other: do the others notice, and does the router's memory stay bounded?

    make bench-hostile                                        all of them
    make bench-hostile HOSTILE="--attacks idle half-a-head"   some of them

For each attack a router of its own, whose limits are set low, so that they are reached on a small machine. All the time
well-behaved clients send at a constant rate; first alone, then beside the attackers, which are a process of their own.
What must hold is in the table that is printed: what the attackers were told, how much memory the router took for
them, and that every other request was answered right. The exit status is 0 if all of it held, 1 if not, 2 if the run
could not be made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import aiohttp
from trial import (
    Failure,
    Processes,
    Rule,
    at_rest,
    cancel_others,
    carry_out,
    free_ports,
    in_flight,
    parsed,
    parser,
    percentile,
    positive,
    resident_kib,
    stopped,
    until_open,
)

MIB = 1 << 20
# The router's limits in this trial.
MAX_PAYLOAD_BYTES = 100 * MIB
MAX_BUFFERED_BYTES = 256 * MIB
REQUEST_TIMEOUT_SECS = 15
# How long the router waits for the rest of a head.
HEAD_WITHIN_SECS = 120
# The attackers' patience beyond the moment by which the router should have ended it.
PATIENCE_SECS = 10
# What the well-behaved cost meanwhile: their traces, the tree, metrics, what the allocator keeps.
OTHERS_MIB = 8
SAMPLE_SECS = 0.05
DESCRIPTORS_SPARE = 500

IDLE_SECS = 15
LARGE_BODY_BYTES = 200 * 1000 * 1000
LARGE_HEAD_BYTES, HUGE_HEAD_BYTES = 100_000, 1_000_000
CHUNK = bytes(MIB)
# About 18 MB each as /generate streams them: every frame repeats the whole text.
ANSWER_TOKENS, FRAME_TOKENS = 20_000, 64
# So little that the kernel takes hardly any of the answer for a client that does not read it.
RECEIVE_BYTES = 4096


# --- the attackers ----------------------------------------------------------------------------------------------------


class Attacker:
    """One connection, and what came of it."""

    def __init__(self, port: int, worker: str) -> None:
        self.port, self.worker = port, worker
        self.socket, self.loop = socket.socket(), asyncio.get_running_loop()
        self.socket.setblocking(False)

    async def connect(self) -> None:
        """Connect to the router."""
        await self.loop.sock_connect(self.socket, ("127.0.0.1", self.port))

    def head(self, *fields: str) -> bytes:
        """The head of a request to /generate."""
        host, worker = f"host: 127.0.0.1:{self.port}", f"x-sglang-target-worker: {self.worker}"
        return "\r\n".join(["POST /generate HTTP/1.1", host, worker, *fields, "", ""]).encode()

    async def send(self, data: bytes) -> None:
        """Send all of it, as fast as the router takes it."""
        await self.loop.sock_sendall(self.socket, data)

    async def answer(self) -> str:
        """Status and code of the answer, from its head."""
        head = b""
        try:
            while b"\r\n\r\n" not in head:
                part = await self.loop.sock_recv(self.socket, 1 << 16)
                if not part:
                    return "closed without an answer"
                head += part
        except ConnectionError:
            return "closed without an answer"
        lines = head.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        codes = [line.partition(": ")[2] for line in lines if line.lower().startswith("x-router-error-code:")]
        return " ".join([lines[0].split(" ")[1], *codes])

    async def closed(self) -> None:
        """Read until the router ends the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.loop.sock_recv(self.socket, 1 << 16):
                pass


async def send_while_listening(attacker: Attacker, sending: Awaitable[None]) -> str:
    """What the router answers to what is being sent; it need not take all of it."""
    task = asyncio.ensure_future(sending)
    said = await attacker.answer()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return said


async def announced(attacker: Attacker) -> str:
    """A large body with its length."""

    async def send() -> None:
        await attacker.send(attacker.head(f"content-length: {LARGE_BODY_BYTES}"))
        for _ in range(LARGE_BODY_BYTES // MIB):
            await attacker.send(CHUNK)

    return await send_while_listening(attacker, send())


async def chunked(attacker: Attacker) -> str:
    """A large body that does not say how long it will be."""

    async def send() -> None:
        await attacker.send(attacker.head("transfer-encoding: chunked"))
        for _ in range(LARGE_BODY_BYTES // MIB):
            await attacker.send(b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK))

    return await send_while_listening(attacker, send())


async def byte_by_byte(attacker: Attacker) -> str:
    """A body that comes one byte a second."""

    async def send() -> None:
        await attacker.send(attacker.head("content-length: 100000"))
        while True:
            await attacker.send(b" ")
            await asyncio.sleep(1)

    return await send_while_listening(attacker, send())


async def long_header(attacker: Attacker, length: int) -> str:
    """A request with one very long header, but for that in order."""
    body = json.dumps({"text": "hello", "sampling_params": {"max_new_tokens": 1}}).encode()
    fields = [f"content-length: {len(body)}", f"x-long: {'x' * length}"]
    return await send_while_listening(attacker, attacker.send(attacker.head(*fields) + body))


async def large_head(attacker: Attacker) -> str:
    """More than most clients ever send."""
    return await long_header(attacker, LARGE_HEAD_BYTES)


async def huge_head(attacker: Attacker) -> str:
    """More than is taken."""
    return await long_header(attacker, HUGE_HEAD_BYTES)


async def half_a_head(attacker: Attacker) -> str:
    """A request that stops within its head."""
    await attacker.send(attacker.head()[:40])
    return await attacker.answer()


async def idle(attacker: Attacker) -> str:
    """A connection on which nothing is asked."""
    with contextlib.suppress(asyncio.TimeoutError):
        return await asyncio.wait_for(attacker.answer(), IDLE_SECS)
    return "open"


async def unread(attacker: Attacker) -> str:
    """A long answer that is not read until the router must have given up."""
    sampling = {"max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    body = json.dumps({"text": "tell me all", "stream": True, "sampling_params": sampling}).encode()
    await attacker.send(attacker.head(f"content-length: {len(body)}") + body)
    await asyncio.sleep(REQUEST_TIMEOUT_SECS + 2)
    # What the kernel has kept, now in large steps, and then the end.
    attacker.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
    said = await attacker.answer()
    await asyncio.wait_for(attacker.closed(), PATIENCE_SECS)
    return f"{said}, then cut off"


@dataclass(frozen=True)
class Attack:
    """A kind of attack, and what must hold of it."""

    name: str
    act: Callable[[Attacker], Awaitable[str]]
    attackers: int
    # What they may be told.
    expected: frozenset[str]
    # Memory of the router in MiB, beside that for the well-behaved.
    memory_mib: float
    # By when the router has ended it.
    ends_within_secs: float
    receive_bytes: int | None = None


def attacks() -> list[Attack]:
    """All kinds, in the order in which they come."""
    per = 1 / 1024
    return [
        Attack("announced", announced, 8, frozenset({"413 payload_too_large"}), 8 * 1.0, 10),
        Attack(
            "chunked",
            chunked,
            8,
            frozenset({"413 payload_too_large", "503 overloaded"}),
            MAX_BUFFERED_BYTES / MIB,
            REQUEST_TIMEOUT_SECS,
        ),
        Attack("byte-by-byte", byte_by_byte, 200, frozenset({"504 timeout"}), 200 * 64 * per, REQUEST_TIMEOUT_SECS),
        Attack("large-head", large_head, 200, frozenset({"200"}), 200 * 512 * per, REQUEST_TIMEOUT_SECS),
        Attack("huge-head", huge_head, 200, frozenset({"431"}), 200 * 512 * per, REQUEST_TIMEOUT_SECS),
        Attack("idle", idle, 10_000, frozenset({"open"}), 10_000 * 16 * per, IDLE_SECS),
        Attack(
            "unread",
            unread,
            200,
            frozenset({"200, then cut off"}),
            200 * 1280 * per,
            REQUEST_TIMEOUT_SECS + PATIENCE_SECS,
            RECEIVE_BYTES,
        ),
        Attack(
            "half-a-head",
            half_a_head,
            200,
            frozenset({"closed without an answer"}),
            200 * 64 * per,
            HEAD_WITHIN_SECS,
        ),
    ]


async def attack_once(attack: Attack, port: int, worker: str) -> str:
    """What one attacker was told."""
    attacker = Attacker(port, worker)
    with attacker.socket:
        if attack.receive_bytes:
            attacker.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, attack.receive_bytes)
        try:
            await attacker.connect()
            return await asyncio.wait_for(attack.act(attacker), attack.ends_within_secs + PATIENCE_SECS)
        except asyncio.TimeoutError:
            return f"not ended after {attack.ends_within_secs + PATIENCE_SECS:g} s"
        except OSError as error:
            return f"{type(error).__name__}: {error}"


def carry_out_attack(name: str, port: int, worker: str) -> Counter[str]:
    """All attackers at once, in this process; what they were told."""
    attack = next(it for it in attacks() if it.name == name)

    async def together() -> Counter[str]:
        return Counter(await asyncio.gather(*(attack_once(attack, port, worker) for _ in range(attack.attackers))))

    return asyncio.run(together())


# --- the others -------------------------------------------------------------------------------------------------------


@dataclass
class Others:
    """Well-behaved clients: one request after the other at a constant rate, every second one for a stream."""

    url: str
    session: aiohttp.ClientSession
    rate: float
    took_ms: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Send until cancelled."""
        due, number = time.monotonic(), 0
        async with contextlib.AsyncExitStack() as stack:
            tasks: set[asyncio.Task[None]] = set()
            stack.push_async_callback(lambda: asyncio.gather(*tasks))
            while True:
                task = asyncio.create_task(self.one(number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number, due = number + 1, due + 1 / self.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def one(self, number: int) -> None:
        """Send one request and read its answer."""
        stream = number % 2 == 1
        body = {"text": f"request {number % 100}", "stream": stream, "sampling_params": {"max_new_tokens": 4}}
        began = time.monotonic()
        try:
            async with self.session.post(f"{self.url}/generate", json=body) as response:
                text = await response.read()
            is_whole = text.endswith(b"data: [DONE]\n\n") if stream else b'"meta_info"' in text
            if response.status != 200 or not is_whole:
                self.wrong.append(f"status {response.status}: {text[:200]!r}")
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
        self.took_ms.append((time.monotonic() - began) * 1e3)


async def peak_mib(pid: int, peak: list[float]) -> None:
    """Keep the most memory that the router has had as the last element."""
    while True:
        peak[-1] = max(peak[-1], (resident_kib(pid) or 0.0) / 1024)
        await asyncio.sleep(SAMPLE_SECS)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What was seen of one attack."""

    attack: Attack
    told: Counter[str]
    before_mib: float
    most_mib: float
    alone_ms: list[float]
    beside_ms: list[float]
    wrong: list[str]
    left: list[str]


async def suffer(
    attack: Attack, settings: argparse.Namespace, processes: Processes, workers: list[str], pool: ProcessPoolExecutor
) -> Outcome:
    """Start a router, attack it, and look at it from all sides."""
    (port,) = free_ports(1)
    options = {
        "port": port,
        "max-payload-size": MAX_PAYLOAD_BYTES,
        "max-buffered-bytes": MAX_BUFFERED_BYTES,
        "request-timeout-secs": REQUEST_TIMEOUT_SECS,
        "enable-request-tracking": "true",
        # So that the well-behaved add nothing to what is measured once it is full.
        "max-trace-entries": 500,
    }
    launch = [settings.program, "launch", *(f"--{name}={value}" for name, value in options.items())]
    router = processes.start(f"router-{attack.name}", [*launch, "--worker-urls", *workers])
    await until_open(port, router)
    url = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        others = Others(url, session, settings.rate)
        load = asyncio.create_task(others.run())
        await asyncio.sleep(settings.alone_secs)
        alone_ms, others.took_ms = others.took_ms, []

        before = (resident_kib(router.pid) or 0.0) / 1024
        most = [before]
        sampling = asyncio.create_task(peak_mib(router.pid, most))
        loop = asyncio.get_running_loop()
        told = await loop.run_in_executor(pool, carry_out_attack, attack.name, port, workers[0])
        beside_ms = others.took_ms
        for task in (load, sampling):
            task.cancel()
        await asyncio.gather(load, sampling, return_exceptions=True)
        left = await at_rest(lambda: in_flight(url, session))
        await cancel_others()
    left += await stopped(router)
    return Outcome(attack, told, before, most[-1], alone_ms, beside_ms, others.wrong, left)


def judge(outcome: Outcome) -> list[Rule]:
    """What must hold of one attack."""
    attack, grown = outcome.attack, outcome.most_mib - outcome.before_mib
    bound = attack.memory_mib + OTHERS_MIB
    told = ", ".join(f"{count} times {what}" for what, count in outcome.told.most_common())
    p99 = [percentile(those, 99) for those in (outcome.alone_ms, outcome.beside_ms)]
    requests = len(outcome.alone_ms) + len(outcome.beside_ms)
    return [
        Rule(
            f"{attack.name}: told {' or '.join(sorted(attack.expected))}",
            [f"{count} times {what}" for what, count in outcome.told.items() if what not in attack.expected],
            told,
        ),
        Rule(
            f"{attack.name}: at most {bound:.0f} MiB more memory",
            [] if grown <= bound else [f"{grown:.1f} MiB"],
            f"{grown:.1f} MiB: {outcome.before_mib:.1f}, then at most {outcome.most_mib:.1f}",
        ),
        Rule(
            f"{attack.name}: others unharmed",
            outcome.wrong,
            f"{requests} requests; p99 {p99[0]:.1f} ms alone, {p99[1]:.1f} ms beside",
        ),
        Rule(f"{attack.name}: nothing left in flight, and a clean end", outcome.left),
    ]


async def run(settings: argparse.Namespace, processes: Processes) -> list[Rule]:
    """Make the run and judge it."""
    chosen = [attack for attack in attacks() if attack.name in settings.attacks]
    allow_descriptors(max(attack.attackers for attack in chosen))
    ports = free_ports(4)
    speeds = {
        "prefill-rate": 999_999,
        "step-base": 0.0005,
        "step-per-seq": 0,
        "max-running": 4096,
        "kv-tokens": 4_000_000,
        "stream-interval": FRAME_TOKENS,
    }
    sim = [settings.program, "sim", *(f"--{name}={value}" for name, value in speeds.items())]
    # The attackers have one of their own, which gives way to all else: the others are to notice the router alone.
    attacked = processes.start("attacked", ["nice", "-n", "19", *sim, f"--port={ports[0]}"])
    others = processes.start("workers", [*sim, f"--ports={ports[1]}-{ports[-1]}"])
    await until_open(ports[0], attacked)
    await until_open(ports[-1], others)
    workers = [f"http://127.0.0.1:{port}" for port in ports]
    rules: list[Rule] = []
    # A process of its own, so that what the others see is not the attackers' work.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for attack in chosen:
            print(f"{attack.name}: {attack.attackers} attackers", flush=True)
            rules += judge(await suffer(attack, settings, processes, workers, pool))
    return rules


def allow_descriptors(connections: int) -> None:
    """Allow as many open files; programs started from here inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + DESCRIPTORS_SPARE
    if most != resource.RLIM_INFINITY and most < wanted:
        raise Failure(
            f"{connections} connections need {wanted} open files and the limit is {most}: raise it (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def parse() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    names = [attack.name for attack in attacks()]
    made.add_argument(
        "--attacks", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    made.add_argument("--rate", type=positive, default=200, help="requests per second of the well-behaved")
    made.add_argument("--alone-secs", type=positive, default=5, help="how long they are alone before each attack")
    return parsed(made)


if __name__ == "__main__":
    sys.exit(carry_out("hostile", parse(), run))
