"""The figures of the overhead bench: what is measured, how rounds are summed up and printed, and what must hold.

A measurement is one contender's in one round. Ratios are those of two contenders in the same round, and then summed up.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from contenders import HAPROXY, OURS, OURS_TTFT, THEIRS
from trial import Failure, Rule

DIRECT = "direct"
ONE_CORE, TWO_CORES = "one core", "two cores"
ON, OFF = "on", "off"
# A rate counts as reached from this share of it on.
REACHED_SHARE = 0.99
# What streams may do more often than without a router, and memory may grow, before it is said to be so.
CROWDED_MORE = 0.001
GROWTH_SHARE = 0.02


@dataclass(frozen=True)
class Requests:
    """Many connections, each with its next request when the last was answered."""

    cpu_us: float
    per_sec: float
    rss_mb: float


@dataclass(frozen=True)
class Latency:
    """One connection."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class Rate:
    """Requests at a constant rate; latencies are counted from when a request was due."""

    reached_per_sec: float
    p50_us: float
    p99_us: float
    p999_us: float


@dataclass(frozen=True)
class Streams:
    """Many streams at a time, and then one, for the time to its first chunk."""

    cpu_us_per_chunk: float
    delay_p50_us: float
    delay_p99_us: float
    gap_p50_us: float
    gap_p99_us: float
    # The share of reads with a chunk that brought more than one.
    crowded: float
    first_us: float


@dataclass(frozen=True)
class Instructions:
    """What a request costs by callgrind's count."""

    instructions: float


@dataclass(frozen=True)
class Memory:
    """Resident memory in the course of many different requests."""

    requests: float
    half_mb: float
    end_mb: float
    most_mb: float
    growth_mb: float


Measurement = Requests | Latency | Rate | Streams | Instructions | Memory
# The rounds of each contender.
Rows = Mapping[str, Sequence[Measurement]]


@dataclass(frozen=True)
class Summary:
    """The median of the rounds, and how far they lie apart."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary:
        """Not a number if there are no values."""
        numbers = list(values)
        if not numbers:
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def __str__(self) -> str:
        if math.isnan(self.median):
            return "-"
        return number(self.median) + (f" ({number(self.least)}..{number(self.most)})" if self.least < self.most else "")


def number(value: float) -> str:
    """A figure with about three digits that mean something."""
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 5}f}"


def rounds_of(rows: Rows, who: str, field: str) -> list[float]:
    """One figure of one contender, round by round; nothing if it was not measured."""
    return [getattr(measurement, field) for measurement in rows.get(who, ())]


def ratios(rows: Rows, field: str, who: str, base: str) -> Summary:
    """One figure in parts of another contender's in the same round."""
    pairs = zip(rounds_of(rows, who, field), rounds_of(rows, base, field), strict=False)
    return Summary.of(value / other if other > 0 else math.inf for value, other in pairs)


def added(rows: Rows, field: str, who: str) -> Summary:
    """How much more one figure is than without a router in the same round."""
    pairs = zip(rounds_of(rows, who, field), rounds_of(rows, DIRECT, field), strict=False)
    return Summary.of(value - other for value, other in pairs)


# --- what programs print --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrk:
    """What wrk says of a run, as prompts.lua has it printed."""

    requests: int
    per_sec: float
    p50_us: float
    p99_us: float


def parse_wrk(text: str) -> Wrk:
    """The last line; a run with an error has failed."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise Failure(f"wrk said nothing of its requests: {text[-300:]!r}")
    told = json.loads(lines[-1])
    errors = {name: told[name] for name in ("connect", "read", "write", "status", "timeout") if told[name]}
    if errors or not told["requests"]:
        raise Failure(f"wrk saw errors: {errors or 'not one request was answered'}")
    return Wrk(told["requests"], told["requests"] / told["secs"], told["p50_us"], told["p99_us"])


def parse_instructions(text: str) -> int:
    """The count in callgrind's last words."""
    found = re.search(r"Collected : (\d+)", text)
    if found is None:
        raise Failure(f"callgrind counted nothing: {text[-300:]!r}")
    return int(found[1])


def memory_of(samples: Sequence[tuple[int, float]]) -> Memory:
    """Of (requests, MB), in order, from the first request to the last."""
    total, end = samples[-1]
    half = min(samples, key=lambda sample: abs(sample[0] - total / 2))[1]
    return Memory(total, half, end, max(mb for _, mb in samples), end - half)


# --- tables ---------------------------------------------------------------------------------------------------------


# What a run's table compares: a field with a contender's, and a field with the same without a router.
COMPARED = {
    "requests": [("cpu_us", str(HAPROXY)), ("cpu_us", str(THEIRS))],
    "latency": [("p50_us", str(HAPROXY))],
    "streams": [("cpu_us_per_chunk", str(THEIRS))],
    "cores": [("cpu_us", ONE_CORE)],
    "tracking": [("cpu_us", OFF)],
    "instructions": [("instructions", OFF)],
}
ADDED = {"latency": "p50_us", "rate": "p99_us", "streams": "first_us"}


def table(run: str, rows: Rows) -> list[str]:
    """The lines of a run's table."""
    names = [field.name for field in fields(next(iter(rows.values()))[0])]
    columns = {name: [Summary.of(rounds_of(rows, who, name)) for who in rows] for name in names}
    for name, base in COMPARED.get(run, []):
        if base in rows:
            columns[f"{name} / {base.partition(':')[0]}"] = [ratios(rows, name, who, base) for who in rows]
    if DIRECT in rows:
        columns[f"added {ADDED[run]}"] = [added(rows, ADDED[run], who) for who in rows]
    cells = [[run, *rows], *([head, *map(str, column)] for head, column in columns.items())]
    widths = [max(map(len, column)) for column in cells]
    lines = zip(*cells, strict=True)
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


# --- what must hold -------------------------------------------------------------------------------------------------


def unreached(rows: Rows, rate: float) -> list[str]:
    """Who did not reach the rate that was asked for."""
    reached = {who: Summary.of(rounds_of(rows, who, "reached_per_sec")).median for who in rows}
    return [
        f"{who} reached {number(it)} of {number(rate)} requests/s"
        for who, it in reached.items()
        if it < REACHED_SHARE * rate
    ]


def judge(found: Mapping[str, Rows], rate: float) -> list[Rule]:
    """Each bound whose figures were measured."""
    ours, ttft, haproxy, theirs = map(str, (OURS, OURS_TTFT, HAPROXY, THEIRS))

    def ratio(run: str, field: str, who: str, base: str) -> Summary:
        return ratios(found.get(run, {}), field, who, base)

    def more(run: str, field: str, who: str) -> Summary:
        return added(found.get(run, {}), field, who)

    def memory(field: str) -> Summary:
        return Summary.of(rounds_of(found.get("memory", {}), ours, field))

    their_p99 = 2 * more("rate", "p99_us", haproxy).median
    growth = GROWTH_SHARE * memory("half_mb").median
    bounds = [
        ("CPU per request, x HAProxy's", ratio("requests", "cpu_us", ours, haproxy), 2.0),
        ("CPU per request, x sglang-router's", ratio("requests", "cpu_us", ours, theirs), 0.30),
        ("CPU per request with least_ttft, x cache_aware's", ratio("requests", "cpu_us", ttft, ours), 1.15),
        ("p50 of one connection, x HAProxy's", ratio("latency", "p50_us", ours, haproxy), 1.3),
        (f"added p99 at {number(rate)}/s, us (2 x HAProxy's)", more("rate", "p99_us", ours), their_p99),
        ("added time to a stream's first chunk, us", more("streams", "first_us", ours), 500.0),
        ("CPU per chunk, x sglang-router's", ratio("streams", "cpu_us_per_chunk", ours, theirs), 0.85),
        ("share of reads with two chunks, above direct", more("streams", "crowded", ours), CROWDED_MORE),
        ("CPU per request on two cores, x one core's", ratio("cores", "cpu_us", TWO_CORES, ONE_CORE), 1.15),
        ("instructions with tracking, x without", ratio("instructions", "instructions", ON, OFF), 1.03),
        ("CPU per request with tracking, x without", ratio("tracking", "cpu_us", ON, OFF), 1.03),
        ("memory of many different requests, MB", memory("most_mb"), 180.0),
        (f"its growth over the last half, MB ({GROWTH_SHARE:.0%})", memory("growth_mb"), growth),
    ]
    rules = [
        Rule(
            f"{name} <= {number(most)}",
            [] if figure.median <= most else [f"{figure} is above {number(most)}"],
            str(figure),
        )
        for name, figure, most in bounds
        if not math.isnan(figure.median)
    ]
    rows = {who: made for who, made in found.get("rate", {}).items() if who in (DIRECT, haproxy, ours)}
    if rows:
        rules.append(Rule(f"{number(rate)}/s was reached, by ours, HAProxy and direct", unreached(rows, rate)))
    return rules
