"""Does the laboratory tell the truth? Its rows against what simulated workers wrote down themselves.

    make bench-truth                              the defaults
    make bench-truth TRUTH="--requests 500"  with options

Three runs of ``RoutingTest``: a steady stream of requests over four workers (is every row's worker the one whose own
log has the request, and did the requests leave when they should?); many at once (were they in flight together?); and
one worker whose prefill and decode times are set (do TTFT, ITL and E2E in the CSV equal them?). What must hold is in
the table that is printed; the exit status is 0 if all of it held, 1 if not, 2 if the run could not be made.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sglang_router_rs.routing_test import RoutingConfig, RoutingTest, RunError
from trial import Failure, Processes, Rule, carry_out, free_ports, parsed, parser, positive, request_log

# What must hold.
SPAN_WITHIN = 0.01
LATE_SECS = 0.020
AT_ONCE_SHARE = 2900 / 3000
TRUTH_WITHIN = 0.05

# The worker of the third run: 0.1 s for a prompt, 0.02 s a step; few enough requests that no prefill waits for another.
PREFILL_RATE, PROMPT_TOKENS, STEP_SECS, ANSWER_TOKENS, TRUTH_RATE = 5000, 500, 0.02, 100, 4


def away(name: str, seen: float, wanted: float, within: float) -> list[str]:
    """What speaks against a measure that should be as wanted."""
    return [] if abs(seen / wanted - 1) <= within else [f"{name} is {seen:.6g}, not {wanted:.6g}"]


def events(log: Path) -> list[tuple[float, int]]:
    """When a request arrived at the workers (+1) and ended there (-1), in order."""
    changes = {"arrived": 1, "ended": -1}
    lines = (line for line in request_log(log) if not line["request_id"].startswith("warmup-"))
    return sorted((line["at"], changes[line["event"]]) for line in lines)


def most_at_once(changes: Iterable[tuple[float, int]]) -> int:
    """The most requests in flight at the workers together."""
    count = most = 0
    for _, change in changes:
        count += change
        most = max(most, count)
    return most


def mean_in_flight(changes: list[tuple[float, int]]) -> float:
    """The mean number of requests at the workers, over the time from the first's arrival to the last's end."""
    count, area, before = 0, 0.0, changes[0][0]
    for at, change in changes:
        area += count * (at - before)
        count, before = count + change, at
    return area / (before - changes[0][0])


async def run_one(directory: Path, workers: int, flags: list[str], **load: Any) -> tuple[Any, Path]:
    """A run in a directory of its own: its results, and the workers' log."""
    log = directory / "requests.jsonl"
    ports = free_ports(workers + 1)
    config = RoutingConfig(
        base_port=ports[0],
        worker_base_port=ports[1],
        num_workers=workers,
        worker_args=["--request-log", str(log), *flags],
        output_dir=str(directory),
        **load,
    )
    return await RoutingTest(config).run(), log


def whose(results: Any, log: Path, ports: list[int]) -> list[str]:
    """Rows whose worker is not the one that has the request in its own log."""
    truth = {line["request_id"]: line["port"] for line in request_log(log) if line["event"] == "arrived"}
    wrong = []
    for row in results.rows:
        port = truth.get(row["req_id"])
        if row["gpu_id"] is None or urlsplit(row["worker_url"]).port != port or ports[int(row["gpu_id"][4:])] != port:
            wrong.append(f"{row['req_id']}: {row['gpu_id']} at {row['worker_url']}, but it arrived at port {port}")
    return wrong


async def steady(directory: Path, requests: int, rate: float) -> list[Rule]:
    """Is every row right, and did every request leave in time?"""
    load = {"num_requests": requests, "request_rate": rate, "input_len": 64, "output_len": 16, "policy": "cache_aware"}
    results, log = await run_one(directory, 4, ["--speed", "20"], **load)
    return steady_rules(results, log, rate)


def steady_rules(results: Any, log: Path, rate: float) -> list[Rule]:
    """What must hold of the steady run."""
    summary = results.summary()
    requests, arrivals, base = len(results.rows), summary["arrivals"], summary["config"]["worker_base_port"]
    late = arrivals["lateness_secs"]["p99"]
    spans = f"{arrivals['achieved_span_secs']:.3f} s of {arrivals['scheduled_span_secs']:.3f} s"
    span = away("the span", arrivals["achieved_span_secs"], arrivals["scheduled_span_secs"], SPAN_WITHIN)
    return [
        Rule(f"{requests} requests at {rate:g}/s: all succeeded", list(summary["requests"]["errors"])),
        Rule(
            "  each row's gpu_id and worker_url are those of the worker's own log",
            whose(results, log, [*range(base, base + 4)]),
        ),
        Rule(f"  they left over their schedule, to {SPAN_WITHIN:.0%}", span, spans),
        Rule(
            f"  1 % left later than {LATE_SECS * 1e3:.0f} ms at most",
            [] if late <= LATE_SECS else [f"{late * 1e3:.1f} ms"],
            f"p99 {late * 1e3:.2f} ms, most {arrivals['lateness_secs']['max'] * 1e3:.2f} ms",
        ),
    ]


async def at_once(directory: Path, requests: int) -> list[Rule]:
    """Are many requests really in flight together?"""
    load = {"num_requests": requests, "request_rate": float("inf"), "input_len": 64, "output_len": 128}
    results, log = await run_one(directory, 4, [], policy="round_robin", **load)
    return at_once_rules(results, log)


def at_once_rules(results: Any, log: Path) -> list[Rule]:
    """What must hold of many at once."""
    requests = results.planned
    most = most_at_once(events(log))
    few = [] if most > requests * AT_ONCE_SHARE else [f"{most} of {requests}"]
    return [
        Rule(f"{requests} requests at once: all succeeded", list(results.summary()["requests"]["errors"])),
        Rule(f"  more than {requests * AT_ONCE_SHARE:.0f} at the workers together, by their own log", few, f"{most}"),
    ]


async def truth(directory: Path, requests: int) -> list[Rule]:
    """Do the times in the CSV equal those that are set?"""
    load = {"num_requests": requests, "request_rate": TRUTH_RATE, "arrivals": "constant"}
    load |= {"input_len": PROMPT_TOKENS, "output_len": ANSWER_TOKENS, "policy": "random"}
    flags = ["--prefill-rate", str(PREFILL_RATE), "--step-base", str(STEP_SECS), "--step-per-seq", "0"]
    results, log = await run_one(directory, 1, flags, **load)
    with (directory / "results.csv").open() as file:
        return truth_rules(results.summary(), list(csv.DictReader(file)), log)


def truth_rules(summary: dict[str, Any], rows: list[dict[str, str]], log: Path) -> list[Rule]:
    """What must hold of the worker whose times are set."""
    means = {
        name: statistics.fmean(float(row[name]) for row in rows) for name in ("ttft", "itl_mean", "server_latency")
    }
    prefill = PROMPT_TOKENS / PREFILL_RATE
    # The simulated worker's answer of n tokens takes n steps; its first token comes before the first of them.
    decode = ANSWER_TOKENS * STEP_SECS
    wanted = {"ttft": prefill, "itl_mean": decode / (ANSWER_TOKENS - 1), "server_latency": prefill + decode}
    rules = [
        Rule(
            f"  {name} is {wanted[name] * 1e3:.1f} ms, to {TRUTH_WITHIN:.0%}",
            away(name, means[name], wanted[name], TRUTH_WITHIN),
            f"{means[name] * 1e3:.1f} ms",
        )
        for name in wanted
    ]
    at_workers = mean_in_flight(events(log))
    by_law = len(rows) / summary["duration_secs"] * means["server_latency"]
    differ = [name for name, mean in means.items() if abs(summary["secs"][name]["mean"] - mean) > 1e-6]
    return [
        Rule(f"{len(rows)} requests to a worker of set times: all succeeded", list(summary["requests"]["errors"])),
        *rules,
        Rule(
            f"  Little's law: in flight = rate x latency, to {TRUTH_WITHIN:.0%}",
            away("rate x latency", by_law, at_workers, TRUTH_WITHIN),
            f"{by_law:.3f}, by the worker's log {at_workers:.3f}",
        ),
        Rule("  means of the CSV are those of the summary", differ),
    ]


async def run(settings: argparse.Namespace, processes: Processes) -> list[Rule]:
    """All three."""
    try:
        return [
            *await steady(processes.directory / "steady", settings.requests, settings.rate),
            *await at_once(processes.directory / "at-once", settings.at_once),
            *await truth(processes.directory / "truth", settings.truth),
        ]
    except (RunError, RuntimeError, ValueError) as error:
        raise Failure(str(error)) from error


def main() -> int:
    """Make the trial; returns the exit status."""
    made = parser(__doc__)
    made.add_argument("--requests", type=int, default=5000, help="requests of the steady run")
    made.add_argument("--rate", type=positive, default=500, help="requests per second of the steady run")
    made.add_argument("--at-once", type=int, default=3000, help="requests of the second run")
    made.add_argument("--truth", type=int, default=60, help="requests of the third run")
    return carry_out("truth", parsed(made), run)


if __name__ == "__main__":
    sys.exit(main())
