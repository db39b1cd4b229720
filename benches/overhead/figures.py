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

from contenders import HAPROXY_ONE, OURS, OURS_TTFT, THEIRS_ONE
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
class Tracking:
    """One side of a pair, tracking on or off."""

    cpu_us: float


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


Measurement = Requests | Latency | Rate | Streams | Tracking | Instructions | Memory
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
        """Of the values that are numbers; not a number if none is."""
        numbers = [value for value in values if math.isfinite(value)]
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
    return Summary.of(value / other if other > 0 else math.nan for value, other in pairs)


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


def more_columns(run: str, rows: Rows) -> dict[str, dict[str, Summary]]:
    """The comparisons that belong into a run's table: by heading, then by contender."""
    haproxy, theirs = str(HAPROXY_ONE), str(THEIRS_ONE)
    compared: dict[str, dict[str, Summary]] = {}
    bases = {
        "requests": [("cpu_us", haproxy), ("cpu_us", theirs)],
        "latency": [("p50_us", haproxy)],
        "streams": [("cpu_us_per_chunk", theirs)],
        "cores": [("cpu_us", ONE_CORE)],
        "tracking": [("cpu_us", OFF)],
        "instructions": [("instructions", OFF)],
    }
    for field, base in bases.get(run, []):
        if base in rows:
            compared[f"{field} x {base}"] = {who: ratios(rows, field, who, base) for who in rows}
    added_fields = {"latency": ["p50_us"], "rate": ["p99_us"], "streams": ["first_us"]}
    for field in added_fields.get(run, []):
        if DIRECT in rows:
            compared[f"added {field}"] = {who: added(rows, field, who) for who in rows if who != DIRECT}
    return compared


def table(run: str, rows: Rows) -> list[str]:
    """The lines of a run's table."""
    names = [field.name for field in fields(next(iter(rows.values()))[0])]
    more = more_columns(run, rows)
    head = [run, *names, *more]
    lines = [head]
    for who in rows:
        figures = [str(Summary.of(rounds_of(rows, who, name))) for name in names]
        compared = [str(column[who]) if who in column else "" for column in more.values()]
        lines.append([who, *figures, *compared])
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]


# --- what must hold -------------------------------------------------------------------------------------------------


def rule(name: str, figure: Summary, most: float, wrong: Sequence[str] = ()) -> Rule:
    """A figure that must not be above a bound; one that could not be measured does not hold."""
    against = [] if figure.median <= most else [f"{figure} > {number(most)}"]
    return Rule(name, [*against, *wrong], f"{figure}")


def unreached(rows: Rows, rate: float, names: Iterable[str]) -> list[str]:
    """Who did not reach the rate that was asked for."""
    reached = {who: Summary.of(rounds_of(rows, who, "reached_per_sec")) for who in names if who in rows}
    return [
        f"{who} reached {number(it.median)} of {number(rate)} requests/s"
        for who, it in reached.items()
        if not it.median >= REACHED_SHARE * rate
    ]


def judge(found: Mapping[str, Rows], rate: float) -> list[Rule]:
    """Each bound whose figures were measured."""
    judges = {
        "requests": judge_requests,
        "latency": judge_latency,
        "rate": lambda rows: judge_rate(rows, rate),
        "streams": judge_streams,
        "cores": judge_cores,
        "instructions": judge_instructions,
        "tracking": judge_tracking,
        "memory": judge_memory,
    }
    return [made for run, rows in found.items() for made in judges[run](rows)]


def judge_requests(rows: Rows) -> list[Rule]:
    """Time of processors."""
    ours, ttft, haproxy, theirs = map(str, (OURS, OURS_TTFT, HAPROXY_ONE, THEIRS_ONE))
    bounds = [
        ("CPU per request is at most 2.0 x HAProxy's", ours, haproxy, 2.0),
        ("CPU per request is at most 0.30 x sglang-router's", ours, theirs, 0.30),
        ("CPU per request with least_ttft is at most 1.15 x cache_aware's", ttft, ours, 1.15),
    ]
    return [
        rule(name, ratios(rows, "cpu_us", who, base), most)
        for name, who, base, most in bounds
        if who in rows and base in rows
    ]


def judge_latency(rows: Rows) -> list[Rule]:
    """One connection."""
    ours, haproxy = str(OURS), str(HAPROXY_ONE)
    if ours not in rows or haproxy not in rows:
        return []
    return [rule("p50 of one connection is at most 1.3 x HAProxy's", ratios(rows, "p50_us", ours, haproxy), 1.3)]


def judge_rate(rows: Rows, rate: float) -> list[Rule]:
    """A constant rate."""
    ours, haproxy = str(OURS), str(HAPROXY_ONE)
    if not {ours, haproxy, DIRECT} <= set(rows):
        return []
    limit = 2 * added(rows, "p99_us", haproxy).median
    name = f"added p99 at {number(rate)} requests/s is at most 2 x HAProxy's, in us"
    made = rule(name, added(rows, "p99_us", ours), limit, unreached(rows, rate, (DIRECT, haproxy, ours)))
    made.note += f"; 2 x HAProxy's is {number(limit)}"
    return [made]


def judge_streams(rows: Rows) -> list[Rule]:
    """Streams."""
    ours, theirs = str(OURS), str(THEIRS_ONE)
    made = []
    if {ours, DIRECT} <= set(rows):
        more = Summary.of([added(rows, "crowded", ours).median])
        made += [
            rule("the first byte of a stream is at most 500 us after direct", added(rows, "first_us", ours), 500.0),
            rule(f"reads with two chunks: at most {CROWDED_MORE:.1%} more than direct", more, CROWDED_MORE),
        ]
    if {ours, theirs} <= set(rows):
        figure = ratios(rows, "cpu_us_per_chunk", ours, theirs)
        made.append(rule("CPU per chunk is at most 0.85 x sglang-router's", figure, 0.85))
    return made


def judge_cores(rows: Rows) -> list[Rule]:
    """Two cores against one."""
    figure = ratios(rows, "cpu_us", TWO_CORES, ONE_CORE)
    return [rule("CPU per request on two cores is at most 1.15 x that on one", figure, 1.15)]


def judge_instructions(rows: Rows) -> list[Rule]:
    """Tracking, by count."""
    figure = ratios(rows, "instructions", ON, OFF)
    return [rule("tracking costs at most 1.03 x the instructions of a request", figure, 1.03)]


def judge_tracking(rows: Rows) -> list[Rule]:
    """Tracking, by time."""
    figure = ratios(rows, "cpu_us", ON, OFF)
    return [rule(f"and at most 1.03 x the CPU time, in {len(rows[ON])} pairs", figure, 1.03)]


def judge_memory(rows: Rows) -> list[Rule]:
    """Many different requests."""
    made = []
    for who in rows:
        end, half, growth = (Summary.of(rounds_of(rows, who, name)) for name in ("most_mb", "half_mb", "growth_mb"))
        count = f"{rounds_of(rows, who, 'requests')[0]:,.0f} different requests"
        limit = GROWTH_SHARE * half.median
        made += [
            rule(f"at most 180 MB after {count}", end, 180.0),
            rule(f"at most {GROWTH_SHARE:.0%} growth over their last half, in MB", growth, limit),
        ]
    return made
