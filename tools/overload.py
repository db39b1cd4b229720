"""Ten times the load the workers can bear: does the router hold its cap, refuse fast, and keep the workers busy?

    make bench-overload                                  the defaults
    make bench-overload OVERLOAD="--factor 20 --seed 7"  with options

First as many clients as the router lets in, each with its next request when its last was answered: that is the
capacity. Then requests at a multiple of it, whether or not earlier ones are answered. Half of the requests are
streamed. What must hold is in the table that is printed; the exit status is 0 if all of it held, 1 if not, 2 if the
run could not be made. Times are those of the router's traces.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
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
    spread,
    stopped,
    until_open,
)

# Tokens of every answer.
TOKENS = 16
# Seconds at the beginning of a phase that are not counted: until then workers are not busy yet.
WARM_SECS = 1.0
# What must hold: of refusals, by the router's own stamps; of what is answered, as a share of the capacity.
REFUSED_WITHIN_MS = 50.0
GOODPUT_SHARE = 0.95
# With less of it than this share, the load was not the one asked for.
LOAD_SHARE = 0.95
# Traces tell whole microseconds.
STAMP_SECS = 2e-6


@dataclass
class Exchange:
    """A request, and what its client received."""

    id: str
    streamed: bool
    status: int | None = None
    # From sending to the last byte, as the client saw it.
    took_ms: float = 0.0
    wrong: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({'stream' if self.streamed else 'whole'}, status {self.status}): {self.wrong}"


@dataclass
class Phase:
    """A time during which requests were sent, in seconds since 1970, and those requests."""

    name: str
    since: float
    until: float
    exchanges: list[Exchange]

    def answered_per_sec(self, traces: dict[str, dict[str, Any]]) -> float:
        """Requests completed per second, by the traces, without the beginning."""
        ends = [end(traces[it.id]) for it in self.exchanges if is_completed(traces.get(it.id))]
        since = self.since + WARM_SECS
        return sum(since <= at < self.until for at in ends) / (self.until - since)


class Clients:
    """Those who send."""

    def __init__(self, url: str, session: aiohttp.ClientSession, settings: argparse.Namespace) -> None:
        self.url, self.session, self.settings = url, session, settings
        self.draw = random.Random(settings.seed)

    async def in_turn(self, name: str, count: int, secs: float) -> Phase:
        """So many clients, each of which sends when it was answered."""
        exchanges: list[Exchange] = []
        began = time.time()

        async def client() -> None:
            while time.time() < began + secs:
                await self.one(self.another(name, exchanges))

        await asyncio.gather(*(client() for _ in range(count)))
        return Phase(name, began, began + secs, exchanges)

    async def at_rate(self, name: str, rate: float, secs: float) -> Phase:
        """So many requests per second on average, each when it is due."""
        exchanges: list[Exchange] = []
        tasks: set[asyncio.Task[None]] = set()
        began, due = time.time(), time.monotonic()
        until = due + secs
        while (due := due + self.draw.expovariate(rate)) < until:
            if (ahead := due - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
            task = asyncio.create_task(self.one(self.another(name, exchanges)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        ended = time.time()
        while tasks:
            await asyncio.gather(*tasks)
        return Phase(name, began, ended, exchanges)

    def another(self, name: str, exchanges: list[Exchange]) -> Exchange:
        """The next request."""
        exchanges.append(Exchange(f"{name}-{len(exchanges)}", self.draw.random() < 0.5))
        return exchanges[-1]

    async def one(self, exchange: Exchange) -> None:
        """Send one request and read its answer."""
        sampling = {"max_new_tokens": TOKENS}
        body = {"text": exchange.id, "stream": exchange.streamed, "sampling_params": sampling}
        began = time.monotonic()
        try:
            headers = {"x-request-id": exchange.id}
            async with self.session.post(f"{self.url}/generate", json=body, headers=headers) as response:
                exchange.status = response.status
                exchange.wrong = self.wrong(exchange, response, await response.read())
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            exchange.wrong = f"{type(error).__name__}: {error}"
        exchange.took_ms = (time.monotonic() - began) * 1e3

    @staticmethod
    def wrong(exchange: Exchange, response: aiohttp.ClientResponse, body: bytes) -> str | None:
        """What is wrong with an answer: only a whole one and a proper refusal are right."""
        if response.status == 429:
            code, after = (response.headers.get(name, "") for name in ("x-router-error-code", "retry-after"))
            return None if (code, after.isdigit()) == ("queue_full", True) else f"code {code!r}, Retry-After {after!r}"
        if response.status != 200:
            return body[:200].decode(errors="replace")
        is_whole = body.endswith(b"data: [DONE]\n\n") if exchange.streamed else "meta_info" in json.loads(body)
        return None if is_whole else f"ends with {body[-80:]!r}"


# --- the records ----------------------------------------------------------------------------------------------------


def begin(trace: dict[str, Any]) -> float:
    """When a request arrived, in seconds since 1970."""
    return datetime.fromisoformat(trace["timestamp"].replace("Z", "+00:00")).timestamp()


def end(trace: dict[str, Any]) -> float:
    """When it ended."""
    return begin(trace) + trace["latency_ms"] / 1e3


def is_completed(trace: dict[str, Any] | None) -> bool:
    """Whether it was answered in full."""
    return trace is not None and trace["status"] == "completed"


def most_at_once(spans: Iterable[tuple[float, float]], slack_secs: float = 0.0) -> int:
    """How many of these spans of time overlap at most. One that ends as another begins does not overlap it."""
    steps = [step for since, until in spans for step in ((since, 1), (max(since, until - slack_secs), -1))]
    return max(itertools.accumulate(change for _, change in sorted(steps)), default=0)


def at_the_workers(log: Iterable[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """From when to when each request was at a worker, by the workers' own log."""
    arrived: dict[str, float] = {}
    for line in log:
        if line["event"] == "arrived":
            arrived[line["request_id"]] = line["at"]
        else:
            yield arrived.pop(line["request_id"]), line["at"]
    for since in arrived.values():
        yield since, float("inf")


# --- the verdict ----------------------------------------------------------------------------------------------------


def differs(exchange: Exchange, trace: dict[str, Any] | None) -> str | None:
    """Where a trace says other than its client."""
    if trace is None:
        return f"{exchange.id} has no trace"
    expected = ("completed" if exchange.status == 200 else "failed", exchange.status)
    told = (trace["status"], trace["http_status"])
    return None if told == expected else f"{exchange.id}: client {expected}, trace {told}"


def judge(
    settings: argparse.Namespace,
    calm: Phase,
    storm: Phase,
    traces: dict[str, dict[str, Any]],
    at_workers: list[tuple[float, float]],
) -> list[Rule]:
    """What must hold of the records."""
    exchanges = [*calm.exchanges, *storm.exchanges]
    capacity, goodput = calm.answered_per_sec(traces), storm.answered_per_sec(traces)
    rate = len(storm.exchanges) / (storm.until - storm.since)
    asked = settings.factor * capacity
    let_in = [trace for it in exchanges if is_completed(trace := traces.get(it.id))]
    spans = [(begin(it) + it["queue_ms"] / 1e3, end(it)) for it in let_in]
    cap = settings.cap
    by_traces, by_workers = most_at_once(spans, STAMP_SECS), most_at_once(at_workers)
    refused = [traces[it.id]["latency_ms"] for it in storm.exchanges if it.status == 429 and it.id in traces]
    seen = [it.took_ms for it in storm.exchanges if it.status == 429]
    waited = [traces[it.id]["queue_ms"] for it in storm.exchanges if is_completed(traces.get(it.id))]
    slow = percentile(refused, 99)
    statuses = Counter(it.status for it in storm.exchanges)
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items(), key=str))
    return [
        Rule(
            f"the load was {settings.factor:g} x capacity",
            [f"{rate:.0f} requests/s of {asked:.0f}"] if rate < LOAD_SHARE * asked else [],
            f"{rate:.0f} requests/s for {storm.until - storm.since:.1f} s: {counts}",
        ),
        Rule(
            "every request was answered, or refused with 429 and Retry-After", [str(it) for it in exchanges if it.wrong]
        ),
        Rule("traces say what clients saw", [told for it in exchanges if (told := differs(it, traces.get(it.id)))]),
        Rule(
            f"at most {cap} were in flight, by the traces",
            [f"{by_traces}"] if by_traces > cap else [],
            f"most {by_traces}",
        ),
        Rule(
            f"at most {cap} were at the workers, by their own log",
            [f"{by_workers}"] if by_workers > cap else [],
            f"most {by_workers} of {len(at_workers)}",
        ),
        Rule(
            f"p99 of a refusal is at most {REFUSED_WITHIN_MS:g} ms",
            [] if slow <= REFUSED_WITHIN_MS else [f"{slow:.2f} ms"],
            f"{spread(refused)}; by the clients' clock {spread(seen)}",
        ),
        Rule(
            f"goodput is at least {GOODPUT_SHARE:.0%} of capacity",
            [] if goodput >= GOODPUT_SHARE * capacity else [f"{goodput:.1f}/s of {capacity:.1f}/s"],
            f"{goodput:.1f}/s of {capacity:.1f}/s, {goodput / capacity:.1%}; waited {spread(waited)}",
        ),
    ]


# --- the run --------------------------------------------------------------------------------------------------------


def router_command(settings: argparse.Namespace, port: int, workers: list[int]) -> list[str]:
    """The command line of the router under test."""
    options = {
        "port": port,
        "policy": "shortest_queue",
        "seed": settings.seed,
        "max-concurrent-requests": settings.cap,
        "queue-size": settings.queue_size,
        "enable-request-tracking": "true",
        # All are compared.
        "max-trace-entries": 1_000_000,
        "trace-ttl-seconds": 86_400,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [settings.program, "launch", *flags, "--worker-urls", *(f"http://127.0.0.1:{it}" for it in workers)]


async def run(settings: argparse.Namespace, processes: Processes) -> list[Rule]:
    """Make the run and judge it."""
    port, *ports = free_ports(1 + settings.workers)
    log = processes.directory / "requests.jsonl"
    sim = [settings.program, "sim", f"--ports={ports[0]}-{ports[-1]}", f"--request-log={log}"]
    workers = processes.start("workers", sim)
    router = processes.start("router", router_command(settings, port, ports))
    await until_open(ports[-1], workers)
    await until_open(port, router)
    url = f"http://127.0.0.1:{port}"

    async with contextlib.AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        stack.push_async_callback(cancel_others)
        clients = Clients(url, session, settings)
        await clients.in_turn("warm", settings.cap, WARM_SECS)
        calm = await clients.in_turn("calm", settings.cap, settings.seconds / 2)
        capacity = calm.answered_per_sec(await all_traces(url, session))
        if not capacity:
            raise Failure("nothing was answered before the storm")
        print(
            f"{capacity:.1f} requests/s by {settings.cap} clients in turn; now {settings.factor:g} times that",
            flush=True,
        )
        storm = await clients.at_rate("storm", settings.factor * capacity, settings.seconds)
        resting = await at_rest(lambda: in_flight(url, session))
        traces = await all_traces(url, session)

    ending = await stopped(router)
    return [
        *judge(settings, calm, storm, traces, list(at_the_workers(request_log(log)))),
        Rule("nothing is in flight at the end", resting),
        Rule("the router ends on SIGTERM with exit status 0", ending),
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    add = made.add_argument
    add(
        "--seconds",
        type=positive,
        default=20,
        help="how long the overload lasts; the capacity is measured half as long",
    )
    add("--factor", type=positive, default=10, help="the load, in multiples of the capacity")
    add("--cap", type=int, default=32, help="the router's max_concurrent_requests")
    add("--queue-size", type=int, default=100, help="the router's queue_size")
    add("--workers", type=int, default=2, choices=range(1, 65), metavar="N", help="simulated workers, 1 to 64")
    add("--seed", type=int, default=1, help="decides the requests, and when they are sent")
    return parsed(made)


if __name__ == "__main__":
    sys.exit(carry_out("overload", parse(), run))
