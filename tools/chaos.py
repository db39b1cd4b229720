"""Kills, hangs and refusals under load: does the router lose, double or misreport a request?

    make chaos                                  five minutes with the defaults
    make chaos CHAOS="--seconds 60 --seed 7"    with options

Starts a router and simulated workers, each in a process of its own, and sends them requests at a fixed mean rate,
whether or not earlier ones are answered. Meanwhile one worker after the other is killed and started again, hangs, or
answers 503. At the end three records are compared: what each client received, the router's traces, and the logs that
the workers wrote themselves. What must hold is in the table that is printed; the exit status is 0 if all of it held,
1 if not, 2 if the run could not be made.

The router holds traces of a third of the requests, so that in the second half everything it remembers is as large as
it gets and its memory must be flat. Traces are looked up as soon as their requests have ended.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import itertools
import json
import random
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from sglang_router_rs import AsyncRouterTraceClient
from trial import (
    SETTLE_SECS,
    Failure,
    Processes,
    Rule,
    at_rest,
    cancel_others,
    carry_out,
    ended,
    free_ports,
    in_flight,
    parsed,
    parser,
    positive,
    request_log,
    resident_kib,
    stopped,
    until_open,
)

# Tokens of an answer, in every fourth of them the most.
TOKENS = (4, 8, 16, 40)
# What is compared of a trace.
KEPT = ["status", "worker_url", "route", "stream", "http_status", "completion_tokens", "error_message", "attempts"]
# Beginnings that prompts share.
FAMILIES = 40
# Clocks of one machine are read a little before or after what they tell the time of.
SLACK_SECS = 0.5
# Later than this, the load was not the one asked for.
LATE_SECS = 5.0
# In a shorter run memory has not come to rest.
JUDGED_SECS = 120


@dataclass
class Down:
    """A time during which a worker was dead: from its kill until it listens again."""

    since: float
    until: float = float("inf")


class Worker:
    """A simulated worker, in its lives one after the other."""

    def __init__(self, port: int, settings: argparse.Namespace, processes: Processes) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = processes.directory / f"requests-{port}.jsonl"
        self.downs: list[Down] = []
        self._command = [settings.program, "sim", "--port", str(port), "--request-log", str(self.log)]
        self._processes = processes

    async def start(self) -> None:
        """Start it and wait until it listens."""
        self._process = self._processes.start(f"worker-{self.port}", self._command)
        await until_open(self.port, self._process)
        if self.downs:
            self.downs[-1].until = time.time()

    async def restart(self, pause_secs: float) -> None:
        """Kill it and start it again."""
        self.downs.append(Down(time.time()))
        self._process.kill()
        await ended(self._process)
        await asyncio.sleep(pause_secs)
        await self.start()

    def is_down(self) -> bool:
        """Whether it is dead now."""
        return bool(self.downs) and self.downs[-1].until > time.time()

    def was_down(self, since: float, until: float) -> bool:
        """Whether it was dead at some time between the two, give or take the clocks."""
        return any(down.since <= until + SLACK_SECS and down.until >= since - SLACK_SECS for down in self.downs)


# --- requests -------------------------------------------------------------------------------------------------------

# How a request ended for its client: answered in full; a begun stream that broke, with an error event or without;
# anything else.
WHOLE, REPORTED, SILENT, FAILED = "whole", "reported", "silent", "failed"


@dataclass
class Exchange:
    """A request, and what its client received."""

    id: str
    path: str
    streamed: bool
    tokens: int
    prompt: str
    sent_at: float = 0.0
    ended_at: float = 0.0
    status: int | None = None
    worker: str | None = None
    outcome: str = ""
    detail: str = ""
    # What no answer may be, whatever happens to its worker.
    wrongs: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The request's JSON."""
        if self.path == "/generate":
            shape: dict[str, Any] = {"text": self.prompt, "sampling_params": {"max_new_tokens": self.tokens}}
        else:
            shape = {"messages": [{"role": "user", "content": self.prompt}], "max_tokens": self.tokens}
        return {**shape, "rid": self.id, "stream": self.streamed}

    def ended(self, outcome: str, detail: str = "") -> None:
        """Note the end."""
        self.outcome, self.detail, self.ended_at = outcome, detail, time.time()

    def __str__(self) -> str:
        kind = "stream" if self.streamed else "whole"
        asked = f"{self.id} ({self.path}, {kind}, status {self.status}, {self.worker})"
        return f"{asked}: {self.outcome} {self.detail}".rstrip()


class Story:
    """What a stream has told so far, held against what the worker's model always says."""

    def __init__(self, exchange: Exchange, words: str) -> None:
        self.exchange, self.words = exchange, words
        self.text = ""
        self.error: str | None = None
        self.is_done = False

    def take(self, event: bytes) -> None:
        """Take in the next event of the stream."""
        data = b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if not data:
            return
        if self.is_done or self.error is not None:
            self.wrong(f"goes on after its end: {data[:80]!r}")
        elif data == b"[DONE]":
            self.is_done = True
        else:
            told = json.loads(data)
            if "error" in told:
                self.error = str(told["error"].get("message", told["error"]))
            else:
                self.add(told)

    def add(self, told: dict[str, Any]) -> None:
        """Take in a frame of /generate, which repeats all so far, or a delta."""
        before = self.text
        if self.exchange.path == "/generate":
            self.text, answered = told["text"], told["meta_info"]["id"]
        else:
            self.text, answered = before + (told["choices"][0]["delta"].get("content") or ""), told["id"]
        if answered != self.exchange.id:
            self.wrong(f"answers {answered}")
        grown = len(self.text) - len(before)
        # Tokens are four characters long and come one by one.
        if not self.words.startswith(self.text) or grown not in (0, 4):
            self.wrong(f"says {self.text[-40:]!r} after {before[-40:]!r}")

    def end(self) -> None:
        """Judge the stream at its end, which was in order as far as HTTP goes."""
        if self.error is not None:
            self.exchange.ended(REPORTED, self.error)
        elif not self.is_done:
            self.exchange.ended(SILENT, "ended without [DONE] and without an error")
        else:
            self.exchange.ended(WHOLE)
            if len(self.text) != 4 * self.exchange.tokens:
                self.wrong(f"says [DONE] after {len(self.text) // 4} of {self.exchange.tokens} tokens")

    def wrong(self, what: str) -> None:
        """Note something that no answer may be."""
        self.exchange.wrongs.append(what)


class Load:
    """The clients: each request in a task of its own, sent on time."""

    def __init__(self, settings: argparse.Namespace, url: str, session: aiohttp.ClientSession, words: str) -> None:
        self.settings, self.url, self.session, self.words = settings, url, session, words
        self.all: list[Exchange] = []
        # Ended, and not yet looked up.
        self.ended: deque[Exchange] = deque()
        self.counts: Counter[str] = Counter()
        self.most_late_secs = 0.0
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send everything and wait for the last answer."""
        draw = random.Random(self.settings.seed)
        families = [" ".join(draw.choices(self.words.split(), k=80)) for _ in range(FAMILIES)]
        due = time.monotonic()
        for number in range(round(self.settings.rate * self.settings.seconds)):
            due += draw.expovariate(self.settings.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.most_late_secs = max(self.most_late_secs, time.monotonic() - due)
            exchange = Exchange(
                id=f"chaos-{self.settings.seed}-{number}",
                path=draw.choice(["/generate", "/v1/chat/completions"]),
                streamed=draw.random() < 0.5,
                tokens=draw.choice(TOKENS),
                prompt=f"{draw.choice(families)} {number}",
            )
            self.all.append(exchange)
            task = asyncio.create_task(self.one(exchange))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        while self.tasks:
            await asyncio.gather(*self.tasks)

    async def one(self, exchange: Exchange) -> None:
        """Send one request and read its answer to the end."""
        exchange.sent_at = time.time()
        try:
            headers = {"x-request-id": exchange.id}
            async with self.session.post(self.url + exchange.path, json=exchange.body(), headers=headers) as response:
                exchange.status = response.status
                exchange.worker = response.headers.get("x-sglang-worker")
                if response.headers.get("x-request-id") != exchange.id:
                    exchange.wrongs.append(f"the answer's x-request-id is {response.headers.get('x-request-id')}")
                await self.read(exchange, response)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            has_begun = exchange.streamed and exchange.status == 200
            exchange.ended(SILENT if has_begun else FAILED, f"{type(error).__name__}: {error}")
        except (ValueError, KeyError, TypeError, LookupError) as error:
            exchange.ended(FAILED)
            exchange.wrongs.append(f"cannot be read: {type(error).__name__}: {error}")
        self.counts[exchange.outcome] += 1
        self.ended.append(exchange)

    async def read(self, exchange: Exchange, response: aiohttp.ClientResponse) -> None:
        """Read an answer whose head has come."""
        if response.status != 200:
            exchange.ended(FAILED, (await response.text())[:200])
        elif exchange.streamed:
            story, rest = Story(exchange, self.words), b""
            async for chunk in response.content.iter_any():
                *events, rest = (rest + chunk).split(b"\n\n")
                for event in events:
                    story.take(event)
            if rest.strip():
                story.wrong(f"ends within an event: {rest[:80]!r}")
            story.end()
        else:
            told = json.loads(await response.read())
            exchange.ended(WHOLE)
            if exchange.path == "/generate":
                text, answered = told["text"], told["meta_info"]["id"]
            else:
                text, answered = told["choices"][0]["message"]["content"], told["id"]
            if (text, answered) != (self.words[: 4 * exchange.tokens], exchange.id):
                exchange.wrongs.append(f"answers {answered} with {text[:80]!r}")


# --- what goes wrong ------------------------------------------------------------------------------------------------


class Disturbance:
    """Kills a worker at each beat, and between two beats lets another one hang or refuse."""

    def __init__(self, settings: argparse.Namespace, workers: list[Worker], session: aiohttp.ClientSession) -> None:
        self.settings, self.workers, self.session = settings, workers, session
        self.counts: Counter[str] = Counter()
        self.last = ""
        self.tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Go on until cancelled."""
        draw = random.Random(self.settings.seed + 1)
        half = self.settings.kill_every / 2
        faults = itertools.cycle(() if self.settings.no_faults else ("hang", "503"))
        while True:
            await asyncio.sleep(half)
            if fault := next(faults, None):
                self.strike(fault, draw)
            await asyncio.sleep(half)
            self.strike("kill", draw)

    def strike(self, kind: str, draw: random.Random) -> None:
        """Do something to one of the workers that are alive; they are never all dead."""
        alive = [worker for worker in self.workers if not worker.is_down()]
        worker, secs = draw.choice(alive), draw.uniform(0.5, 1.5)
        if kind == "hang":
            what = self.fault(worker, {"hang": True}, 2 * secs)
        elif kind == "503":
            what = self.fault(worker, {"fail_rate": 1, "fail_status": 503}, secs)
        elif len(alive) > 1:
            what = worker.restart(self.settings.restart_after)
        else:
            return
        self.counts[kind] += 1
        self.last = f"{kind} {worker.port}"
        self.tasks.append(asyncio.create_task(what))

    async def fault(self, worker: Worker, change: dict[str, Any], secs: float) -> None:
        """Make a worker misbehave for a while. One that is killed meanwhile forgets it."""
        for faults in (change, {"hang": False, "fail_rate": 0}):
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.post(f"{worker.url}/sim/faults", json=faults) as response:
                    response.raise_for_status()
            if faults is change:
                await asyncio.sleep(secs)

    async def end(self) -> None:
        """Wait until all workers are well again."""
        await asyncio.gather(*self.tasks)


# --- what is watched ------------------------------------------------------------------------------------------------


@dataclass
class Traces:
    """The router's traces, taken from it while it still holds them."""

    client: AsyncRouterTraceClient
    ended: deque[Exchange]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def run(self) -> None:
        """Look up again and again, until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            await self.look()

    async def look(self) -> None:
        """Look up all that have ended; those whose traces have not are left for the next time."""
        ids = [exchange.id for exchange in self.ended]
        for trace in await self.client.batch_get_traces(ids):
            if trace["status"] in ("completed", "failed"):
                self.found[trace["request_id"]] = {name: trace[name] for name in KEPT}
        rest = [exchange for exchange in list(self.ended)[: len(ids)] if exchange.id not in self.found]
        for _ in ids:
            self.ended.popleft()
        self.ended.extend(rest)

    async def settle(self) -> None:
        """Look up the last ones."""
        deadline = time.monotonic() + SETTLE_SECS
        await self.look()
        while self.ended and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            await self.look()


class Memory:
    """The resident memory of a process over time, also in a file: seconds, KiB."""

    def __init__(self, pid: int, path: Path) -> None:
        self.pid, self.path = pid, path
        self.samples: list[tuple[float, float]] = []

    async def run(self) -> None:
        """Take a sample each second, until cancelled or until the process is gone."""
        while (kib := resident_kib(self.pid)) is not None:
            self.samples.append((time.monotonic(), kib))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{self.samples[-1][0] - self.samples[0][0]:.1f},{kib:.0f}\n")
            await asyncio.sleep(1.0)

    def slope(self) -> float:
        """KiB per second over the second half, by least squares."""
        half = self.samples[len(self.samples) // 2 :]
        mean_t = sum(t for t, _ in half) / len(half)
        mean_kib = sum(kib for _, kib in half) / len(half)
        spread = sum((t - mean_t) ** 2 for t, _ in half)
        return sum((t - mean_t) * (kib - mean_kib) for t, kib in half) / spread if spread else 0.0


class WorkerLogs:
    """What the workers wrote down: for each (id, url) how often it arrived, and when it was answered with 200."""

    def __init__(self, workers: Iterable[Worker]) -> None:
        self.arrivals: Counter[tuple[str, str]] = Counter()
        self.answers: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
        for worker in workers:
            for line in request_log(worker.log):
                if line["event"] == "arrived":
                    self.arrivals[line["request_id"], worker.url] += 1
                elif line["ending"] == "completed" and line["status"] == 200:
                    bisect.insort(self.answers[line["request_id"]], (line["at"], worker.url))


# --- the verdict ----------------------------------------------------------------------------------------------------


@dataclass
class Records:
    """All that was written down, by whom it may."""

    exchanges: list[Exchange]
    traces: dict[str, dict[str, Any]]
    logs: WorkerLogs
    workers: dict[str, Worker]

    def rules(self) -> list[Rule]:
        """What must hold of the records."""
        broken = [it for it in self.exchanges if it.outcome in (REPORTED, SILENT)]
        traced = [(it, self.traces[it.id]) for it in self.exchanges if it.id in self.traces]
        return [
            Rule(
                "no request failed that had not begun to stream",
                [str(it) for it in self.exchanges if it.outcome == FAILED],
            ),
            Rule(
                "a begun stream that broke was reported to its client",
                [str(it) for it in broken if it.outcome == SILENT],
                f"{len(broken)} broke",
            ),
            Rule("a begun stream broke only when its worker died", [str(it) for it in broken if not self.had_died(it)]),
            Rule(
                "each id has one answer, no token twice",
                [f"{it}: {wrong}" for it in self.exchanges for wrong in it.wrongs],
            ),
            Rule("every trace is there and ended", [str(it) for it in self.exchanges if it.id not in self.traces]),
            Rule("traces say what clients saw", [told for it, trace in traced if (told := self.differs(it, trace))]),
            Rule(
                "the worker in a trace answered", [told for it, trace in traced if (told := self.unanswered(it, trace))]
            ),
            Rule(
                "every attempt in a trace arrived, or its worker was dead",
                [told for it, trace in traced for told in self.attempts(it, trace)],
                f"{sum(len(trace['attempts']) > 1 for _, trace in traced)} requests had several",
            ),
            Rule(
                "every arrival at a worker is an attempt in a trace",
                list(self.untold()),
                f"{sum(self.logs.arrivals.values())} arrivals",
            ),
            Rule("no request was answered by two workers that lived", list(self.answered_twice())),
        ]

    def had_died(self, exchange: Exchange) -> bool:
        """Whether the worker named to the client died during the request."""
        worker = self.workers.get(exchange.worker or "")
        return worker is not None and worker.was_down(exchange.sent_at, exchange.ended_at)

    @staticmethod
    def differs(exchange: Exchange, trace: dict[str, Any]) -> str | None:
        """Where a trace says other than its client."""
        is_whole = exchange.outcome == WHOLE
        expected: dict[str, Any] = {
            "status": "completed" if is_whole else "failed",
            "worker_url": exchange.worker,
            "route": exchange.path,
            "stream": exchange.streamed,
            "http_status": exchange.status,
        }
        if is_whole:
            # A worker tells the tokens of a chat stream only when it is asked to.
            is_told = not exchange.streamed or exchange.path == "/generate"
            expected["completion_tokens"] = exchange.tokens if is_told else None
            expected["error_message"] = None
        wrong = [f"{name} is {trace[name]!r}" for name, value in expected.items() if trace[name] != value]
        if not is_whole and not trace["error_message"]:
            wrong.append("error_message is empty")
        attempts = trace["attempts"]
        if attempts and attempts[-1]["worker_url"] != trace["worker_url"]:
            wrong.append(f"the last attempt went to {attempts[-1]['worker_url']}")
        return f"{exchange}: in the trace {', '.join(wrong)}" if wrong else None

    def unanswered(self, exchange: Exchange, trace: dict[str, Any]) -> str | None:
        """An answer that its worker knows nothing of."""
        if exchange.outcome != WHOLE or any(url == trace["worker_url"] for _, url in self.logs.answers[exchange.id]):
            return None
        return f"{exchange}: not answered in the log of {trace['worker_url']}"

    def attempts(self, exchange: Exchange, trace: dict[str, Any]) -> Iterator[str]:
        """Attempts that never came to their worker, though it lived."""
        for url, count in Counter(attempt["worker_url"] for attempt in trace["attempts"]).items():
            arrived = self.logs.arrivals[exchange.id, url]
            if arrived < count and not self.workers[url].was_down(exchange.sent_at, exchange.ended_at):
                yield f"{exchange}: {count} attempts at {url}, {arrived} arrived"

    def untold(self) -> Iterator[str]:
        """Arrivals that no trace tells of."""
        for (request_id, url), arrived in self.logs.arrivals.items():
            trace = self.traces.get(request_id)
            attempts = trace["attempts"] if trace else []
            count = sum(attempt["worker_url"] == url for attempt in attempts)
            if arrived > count:
                yield f"{request_id}: arrived {arrived} times at {url}, attempts in its trace: {count}"

    def answered_twice(self) -> Iterator[str]:
        """Requests answered again, though the worker that had answered lived on."""
        for request_id, answers in self.logs.answers.items():
            for (at, url), (later, other) in itertools.pairwise(answers):
                if not self.workers[url].was_down(at, later):
                    yield f"{request_id}: answered by {url}, then by {other} {later - at:.3f} s later"


# --- the run --------------------------------------------------------------------------------------------------------


def router_command(settings: argparse.Namespace, port: int, workers: list[Worker]) -> list[str]:
    """The command line of the router under test."""
    requests = settings.rate * settings.seconds
    options = {
        "host": "127.0.0.1",
        "port": port,
        "policy": settings.policy,
        "seed": settings.seed,
        "enable-request-tracking": "true",
        "max-trace-entries": max(1000, round(requests / 3)),
        "trace-ttl-seconds": 86_400,
        # Full early in the run, as the store of traces is.
        "max-tree-size": 1 << 18,
        "health-check-interval-secs": 1,
        "health-check-timeout-secs": 1,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [settings.program, "launch", *flags, *settings.router_flag, "--worker-urls", *(it.url for it in workers)]


async def report(load: Load, disturbance: Disturbance, memory: Memory) -> None:
    """Print a line every five seconds, until cancelled."""
    began = time.monotonic()
    while True:
        await asyncio.sleep(5.0)
        counts = "  ".join(f"{outcome} {load.counts[outcome]}" for outcome in (WHOLE, REPORTED, SILENT, FAILED))
        done = "  ".join(f"{kind} {count}" for kind, count in disturbance.counts.items())
        rss = memory.samples[-1][1] / 1024
        print(
            f"{time.monotonic() - began:5.0f} s  sent {len(load.all)}  open {len(load.tasks)}  {counts}  |  {done}  "
            f"|  RSS {rss:.1f} MiB  |  {disturbance.last}",
            flush=True,
        )


async def run(settings: argparse.Namespace, processes: Processes) -> list[Rule]:
    """Make the run and judge it."""
    port, *ports = free_ports(1 + settings.workers)
    workers = [Worker(it, settings, processes) for it in ports]
    await asyncio.gather(*(worker.start() for worker in workers))
    router = processes.start("router", router_command(settings, port, workers))
    await until_open(port, router)
    url = f"http://127.0.0.1:{port}"

    async with contextlib.AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=settings.patience)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        client = await stack.enter_async_context(AsyncRouterTraceClient(url))
        stack.push_async_callback(cancel_others)
        sample = {"text": "all words", "sampling_params": {"max_new_tokens": max(TOKENS)}}
        async with session.post(f"{workers[0].url}/generate", json=sample) as response:
            words = (await response.json())["text"]

        load = Load(settings, url, session, words)
        disturbance = Disturbance(settings, workers, session)
        traces = Traces(client, load.ended)
        memory = Memory(router.pid, processes.directory / "memory.csv")
        background = [asyncio.create_task(it.run()) for it in (disturbance, traces, memory)]
        background.append(asyncio.create_task(report(load, disturbance, memory)))
        sending = asyncio.create_task(load.run())
        # Nothing of this ends before the load does, unless it has failed.
        await asyncio.wait([sending, *background], return_when=asyncio.FIRST_COMPLETED)
        for task in background:
            if task.done() and router.poll() is None:
                task.result()
            task.cancel()
        if router.poll() is not None:
            raise Failure(f"the router ended during the run with exit status {router.returncode}; see its log")
        await sending
        await disturbance.end()
        await traces.settle()
        resting = await at_rest(lambda: in_flight(url, session))

    ending = await stopped(router)
    records = Records(load.all, traces.found, WorkerLogs(workers), {worker.url: worker for worker in workers})
    slope, mib = memory.slope(), memory.samples[-1][1] / 1024
    is_judged = settings.seconds >= JUDGED_SECS
    steep = [f"{slope:.1f} KiB/s over the second half"] if is_judged and slope > settings.rss_slope else []
    unjudged = "" if is_judged else f"; not judged below {JUDGED_SECS} s"
    late = [f"a request was sent {load.most_late_secs:.1f} s late"] if load.most_late_secs > LATE_SECS else []
    kills = disturbance.counts["kill"]
    return [
        Rule(
            "requests were sent on time, and workers killed",
            late if kills else ["no kill"],
            f"{len(load.all)} requests, {kills} kills",
        ),
        *records.rules(),
        Rule("nothing is in flight at the end", resting),
        Rule(
            f"the router's memory is flat (at most {settings.rss_slope:g} KiB/s)",
            steep,
            f"{mib:.1f} MiB, {slope:+.2f} KiB/s{unjudged}",
            is_judged,
        ),
        Rule("the router ends on SIGTERM with exit status 0", ending),
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    add = made.add_argument
    add("--seconds", type=positive, default=300, help="how long requests are sent")
    add("--rate", type=positive, default=200, help="requests per second, on average; half of them streamed")
    add("--workers", type=int, default=8, choices=range(4, 65), metavar="N", help="simulated workers, 4 to 64")
    add("--kill-every", type=positive, default=3.0, help="seconds from one kill to the next")
    add("--restart-after", type=positive, default=1.0, help="seconds from a kill until the worker is started again")
    add("--no-faults", action="store_true", help="only kill: no worker hangs or answers 503")
    add("--policy", default="cache_aware", help="the router's policy")
    add("--seed", type=int, default=1, help="decides the requests, and what goes wrong when")
    add("--patience", type=positive, default=60, help="seconds after which a client gives up")
    add("--rss-slope", type=positive, default=32, help="most growth of the router's memory over the second half, KiB/s")
    add(
        "--router-flag",
        action="append",
        default=[],
        metavar="=--FLAG=VALUE",
        help="a further flag of the router; repeatable",
    )
    return parsed(made)


if __name__ == "__main__":
    sys.exit(carry_out("chaos", parse(), run))
