"""What a router costs, beside HAProxy, nginx and sglang-router 0.3.2 in the same run.

    make bench-overhead                                                   all of it
    make bench-overhead OVERHEAD="--runs requests streams --rounds 5"     some of it
    make bench-overhead OVERHEAD="--contenders haproxy ours:cache_aware"  some contenders

The runs:
  requests      many connections, each with its next request when the last was answered: CPU time of the contender per
                request, throughput, memory
  latency       one connection
  rate          a constant rate of requests; latency is counted from when a request was due, also without a router
  streams       many streams at a time: CPU time per chunk, delay of a chunk, chunks that came together; and one stream
                at a time: its first chunk
  cores         ours on two cores against one
  tracking      ours with tracking on and off, in pairs
  instructions  the same by callgrind's count, if valgrind is there
  memory        ours under many different requests

A contender has core 0 to itself, workers and clients share core 1. Contenders take turns; a figure is the median of the
rounds, with the least and the most. Tables are followed by what must hold; the exit status is 0 if all of it held, 1 if
not, 2 if the run could not be made. Needed beside Rust and Python: wrk, haproxy and nginx; sglang-router is installed
from PyPI into a virtual environment of its own. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import contenders as make
import figures
from contenders import ALL, LOAD_CORE, OURS, OURS_UNTRACKED, Contender, Target, pinned
from figures import DIRECT, OFF, ON, ONE_CORE, TWO_CORES, Measurement, Rows, number
from trial import (
    THEIR_PACKAGE,
    Failure,
    Processes,
    Rule,
    carry_out,
    free_ports,
    parsed,
    parser,
    positive,
    stopped,
    until_open,
)

HERE = Path(__file__).parent
WARM_SECS = 1.0
PRINT_EVERY = 100_000
# So many times as many rounds for the runs whose figures differ most from round to round: a router that is idle most of
# the time is measured with all that the machine does meanwhile.
SPREAD = 3

# Chunks of a stream of which only the first counts, and requests of the two counts whose difference is taken.
FEW_CHUNKS = 4
COUNTED = (500, 2500)

M = TypeVar("M", bound=Measurement)


@dataclass
class Bench:
    """What every run needs."""

    settings: argparse.Namespace
    processes: Processes
    # The program built of load.rs.
    load: str
    found: dict[str, Rows] = field(default_factory=dict)
    # Makes the prompts of no two runs of wrk the same.
    runs_of_wrk: itertools.count[int] = field(default_factory=itertools.count)

    @contextlib.asynccontextmanager
    async def running(
        self, run: str, contenders: Sequence[Contender], *, has_direct: bool = False, streams: bool = False
    ) -> AsyncIterator[list[Target]]:
        """Contenders that share their workers, for the length of a run."""
        with Processes(self.processes.directory) as processes:
            if streams:
                ports = await make.start_stream_workers(processes, run, self.load, self.settings.gap_ms)
            else:
                ports = await make.start_workers(processes, run)
            targets = [Target(DIRECT, ports[0])] if has_direct else []
            for who in contenders:
                print(f"{run}: starting {who}", flush=True)
                targets.append(await make.start(processes, run, who, self.settings.program, ports))
            yield targets

    async def wrk(self, target: Target, connections: int, secs: float) -> tuple[figures.Wrk, float]:
        """Requests with wrk; also the microseconds of processors that each cost the target."""
        url = f"http://127.0.0.1:{target.port}/generate"
        script, number_of_run = str(HERE / "prompts.lua"), str(next(self.runs_of_wrk))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(secs))}s", "--latency", "-s", script, url]
        before = target.cpu_secs()
        made = figures.parse_wrk(await output([*pinned(LOAD_CORE, command), "--", number_of_run]))
        return made, (target.cpu_secs() - before) * 1e6 / made.requests

    async def busy(self, target: Target, secs: float) -> figures.Requests:
        """What a target does with as many connections as are asked for."""
        made, cpu_us = await self.wrk(target, self.settings.connections, secs)
        return figures.Requests(cpu_us, made.per_sec, target.rss_mb())

    def client(self, command: str, target: Target, connections: int, **options: float) -> list[str]:
        """The command line of a client of load.rs."""
        given = {"port": target.port, "connections": connections, "seed": self.settings.seed, **options}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        return pinned(LOAD_CORE, [self.load, command, *flags])


async def output(command: Sequence[str]) -> str:
    """What a program prints; it does not outlive this."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        told, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise Failure(f"{' '.join(command)}: exit status {process.returncode}: {errors.decode()[-500:].strip()}")
    return told.decode()


async def in_turn(
    run: str, targets: Sequence[Target], rounds: int, measure: Callable[[Target, float], Awaitable[M]], secs: float
) -> dict[str, list[M]]:
    """The figures of each target, round by round, after a short time that is not counted."""
    rows: dict[str, list[M]] = {target.name: [] for target in targets}
    for target in targets:
        await measure(target, min(WARM_SECS, secs))
    for number_of_round in range(rounds):
        # Every other round backwards, so that nobody always follows the same one.
        for target in targets[:: -1 if number_of_round % 2 else 1]:
            made = await measure(target, secs)
            rows[target.name].append(made)
            told = ", ".join(f"{name} {number(value)}" for name, value in asdict(made).items())
            print(f"{run} {number_of_round + 1}/{rounds} {target.name}: {told}", flush=True)
    return rows


# --- the runs -------------------------------------------------------------------------------------------------------


async def requests(bench: Bench) -> Rows:
    """Many connections."""
    settings = bench.settings
    async with bench.running("requests", settings.contenders) as targets:
        return await in_turn("requests", targets, settings.rounds, bench.busy, settings.seconds)


async def latency(bench: Bench) -> Rows:
    """One connection."""
    settings = bench.settings

    async def measure(target: Target, secs: float) -> figures.Latency:
        made, _ = await bench.wrk(target, 1, secs)
        return figures.Latency(made.p50_us, made.p99_us)

    async with bench.running("latency", settings.contenders, has_direct=True) as targets:
        return await in_turn("latency", targets, settings.rounds, measure, settings.seconds)


async def rate(bench: Bench) -> Rows:
    """A constant rate."""
    settings = bench.settings

    async def measure(target: Target, secs: float) -> figures.Rate:
        told = await output(bench.client("rate", target, settings.connections, per_sec=settings.rate, secs=secs))
        return figures.Rate(**json.loads(told))

    async with bench.running("rate", settings.contenders, has_direct=True) as targets:
        rows = await in_turn("rate", targets, SPREAD * settings.rounds, measure, settings.seconds)
    for line in figures.unreached(rows, settings.rate):
        print(line, flush=True)
    return rows


async def streams(bench: Bench) -> Rows:
    """Many streams at a time, and one."""
    settings = bench.settings

    async def measure(target: Target, secs: float) -> figures.Streams:
        before = target.cpu_secs()
        many = await watch(target, settings.streams, settings.chunks, secs)
        cpu_us = (target.cpu_secs() - before) * 1e6 / many.pop("chunks")
        one = await watch(target, 1, FEW_CHUNKS, secs / 2)
        return figures.Streams(cpu_us_per_chunk=cpu_us, **(many | {"first_us": one["first_us"]}))

    async def watch(target: Target, streams: int, chunks: int, secs: float) -> dict[str, float]:
        return dict(json.loads(await output(bench.client("streams", target, streams, chunks=chunks, secs=secs))))

    async with bench.running("streams", settings.contenders, has_direct=True, streams=True) as targets:
        return await in_turn("streams", targets, SPREAD * settings.rounds, measure, settings.seconds)


async def cores(bench: Bench) -> Rows:
    """Ours on two cores and on one."""
    settings = bench.settings
    wide = Contender(OURS.name, OURS.policy, cores="0,1")
    async with bench.running("cores", [OURS, wide]) as (narrow, both):
        targets = [Target(ONE_CORE, narrow.port, narrow.process), Target(TWO_CORES, both.port, both.process)]
        return await in_turn("cores", targets, settings.rounds, bench.busy, settings.seconds)


async def tracking(bench: Bench) -> Rows:
    """Tracking on and off in pairs, every other one in the other order."""
    settings = bench.settings
    async with bench.running("tracking", [OURS, OURS_UNTRACKED]) as (on, off):
        targets = [Target(ON, on.port, on.process), Target(OFF, off.port, off.process)]
        return await in_turn("tracking", targets, settings.pairs, bench.busy, settings.seconds)


async def instructions(bench: Bench) -> Rows:
    """Tracking on and off, counted."""
    if make.found("valgrind") is None:
        print("instructions: there is no valgrind here; on Debian: apt-get install valgrind", flush=True)
        return {}
    rows = {}
    for name, who in ((ON, OURS), (OFF, OURS_UNTRACKED)):
        few, many = [await count(bench, f"instructions-{name}-{total}", who, total) for total in COUNTED]
        rows[name] = [figures.Instructions((many - few) / (COUNTED[1] - COUNTED[0]))]
        print(f"instructions {name}: {number(rows[name][0].instructions)} per request", flush=True)
    return rows


async def count(bench: Bench, run: str, who: Contender, total: int) -> int:
    """The instructions of a router's whole life with so many requests."""
    directory, port = bench.processes.directory, free_ports(1)[0]
    with Processes(directory) as processes:
        workers = await make.start_workers(processes, run)
        callgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={directory / f'{run}.callgrind'}"]
        launch = [*make.our_command(bench.settings.program, who, port, workers), "--worker-threads", "1"]
        process = processes.start(run, pinned(make.CONTENDER_CORE, [*callgrind, *launch]))
        await until_open(port, process)
        await make.until_ready(port, run)
        await output(bench.client("turns", Target(run, port, process), 1, requests=total))
        if problems := await stopped(process):
            raise Failure(f"{run}: {', '.join(problems)}")
    return figures.parse_instructions((directory / f"{run}.log").read_text())


async def memory(bench: Bench) -> Rows:
    """Ours under many different requests, none of which begins like another."""
    settings = bench.settings
    async with bench.running("memory", [OURS]) as (target,):
        command = bench.client("turns", target, settings.connections, requests=settings.requests)
        samples = [(0, target.rss_mb())]
        process = await asyncio.create_subprocess_exec(*command, "--distinct", stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                if (text := line.decode().strip()).isdigit():
                    samples.append((int(text), target.rss_mb()))
                    if samples[-1][0] % PRINT_EVERY == 0:
                        print(f"memory: {samples[-1][1]:.1f} MB after {samples[-1][0]:,} requests", flush=True)
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
        if status != 0:
            raise Failure(f"{' '.join(command)}: exit status {status}")
        samples.append((settings.requests, target.rss_mb()))
        return {target.name: [figures.memory_of(samples)]}


RUNS: dict[str, Callable[[Bench], Awaitable[Rows]]] = {
    "requests": requests,
    "latency": latency,
    "rate": rate,
    "streams": streams,
    "cores": cores,
    "tracking": tracking,
    "instructions": instructions,
    "memory": memory,
}


# --- the command ----------------------------------------------------------------------------------------------------


async def build() -> str:
    """The program of load.rs, built; its name has a hash in it that only cargo knows."""
    print("building the load, which takes minutes the first time", flush=True)
    told = await output(
        ["cargo", "build", "--locked", "--profile=load", "--bench=overhead", "--message-format=json-render-diagnostics"]
    )
    for line in told.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "overhead":
            return str(message["executable"])
    raise Failure("cargo built no load")


async def machine() -> dict[str, str]:
    """What the figures were measured on, and with."""
    lines = (await output(["cat", "/proc/cpuinfo"])).splitlines()
    models = [line for line in lines if line.startswith("model name")]
    versions = [["haproxy", "-v"], ["sh", "-c", "nginx -v 2>&1"], ["sh", "-c", "wrk -v || true"]]
    told = [
        (await output([make.found(command[0]) or command[0], *command[1:]])).splitlines()[0]
        for command in versions
        if make.found(command[0])
    ]
    return {
        "CPU": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release()}",
        "load": f"{os.getloadavg()[0]:.2f} before it began",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "programs": "; ".join([*told, THEIR_PACKAGE]),
    }


def check(settings: argparse.Namespace) -> None:
    """Say what is missing before anything is measured."""
    if (os.cpu_count() or 1) < 2:
        raise Failure("a contender and its load need a core each, and there is one")
    needed = {"nginx", *(who.name for who in settings.contenders if who.name in ("haproxy", "nginx"))}
    if {"requests", "latency", "cores", "tracking"} & set(settings.runs):
        needed.add("wrk")
    make.check_installed([*needed])


async def run(settings: argparse.Namespace, processes: Processes) -> list[Rule]:
    """Make the runs and judge them."""
    check(settings)
    bench = Bench(settings, processes, await build())
    about = await machine()
    for name in settings.runs:
        if rows := await RUNS[name](bench):
            bench.found[name] = rows
    print("\n" + "\n".join(f"{name:<9} {value}" for name, value in about.items()))
    for name, rows in bench.found.items():
        print("", *figures.table(name, rows), sep="\n")
    rules = figures.judge(bench.found, settings.rate)
    if settings.json is not None:
        settings.json.write_text(json.dumps(report(about, bench.found, rules), indent=2) + "\n")
    return rules


def report(about: dict[str, str], found: dict[str, Rows], rules: Sequence[Rule]) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "machine": about,
        "runs": {
            name: {who: [asdict(it) for it in made] for who, made in rows.items()} for name, rows in found.items()
        },
        "must_hold": [{"name": it.name, "held": not it.against, "measured": it.note} for it in rules],
    }


def count_of(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if not 0 < value <= 100_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 100000000")
    return value


def parse() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.set_defaults(program="target/release/sglang-router-rs")
    add = made.add_argument
    add("--runs", nargs="+", choices=RUNS, default=[*RUNS], help="what to measure", metavar="RUN")
    add("--contenders", nargs="+", type=make.contender, default=[*ALL], help="of the first four runs", metavar="NAME")
    rounds = f"how often each contender is measured; in rate and streams {SPREAD} times as often"
    add("--rounds", type=count_of, default=3, help=rounds)
    add("--pairs", type=count_of, default=10, help="how often tracking is measured on and off")
    add("--seconds", type=positive, default=5, help="how long each measurement lasts; wrk knows whole ones only")
    add("--connections", type=count_of, default=64, help="connections of the clients")
    add("--rate", type=positive, default=8000, help="requests per second at a constant rate")
    add("--streams", type=count_of, default=64, help="streams at a time")
    add("--chunks", type=count_of, default=200, help="chunks of a stream")
    add("--gap-ms", type=positive, default=5, help="time between two chunks of a stream")
    add("--requests", type=count_of, default=1_000_000, help="different requests of the memory run")
    add("--seed", type=int, default=1, help="decides the prompts that are not wrk's")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parsed(made)


if __name__ == "__main__":
    sys.exit(carry_out("overhead", parse(), run))
