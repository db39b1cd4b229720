"""Routers and policies side by side over HTTP: the same trace, one after the other, before simulated workers.

    make bench-routing ROUTING="--trace conversation_trace.jsonl"         ours and sglang-router 0.3.2
    make bench-routing ROUTING="--trace FILE --speeds 1,1,1,1,.5,.5,.5,.5"  half of the workers at half speed
    make bench-routing ROUTING="--trace FILE --lose 3@400"                worker 3 is killed at second 400
    make bench-routing ROUTING="--trace FILE --contenders ours:least_ttft ours:policy.py:choose --plot ttft.png"

Workers and trace run ``--speed`` times faster than time; all times that are printed are those of the trace, but for
those of decisions, which are true. Each contender gets fresh workers. Requests are streams to /v1/completions, whose
frames are small. A contender is ``ours:POLICY``, where a policy may be one's own, FILE.py:NAME, or
``sglang-router:POLICY``; that router is installed from PyPI into a virtual environment of its own. In the directory are
the table (table.csv), the rows of each contender's requests, and logs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sglang_router_rs.routing_test import LoadConfig, RunError, plots
from sglang_router_rs.routing_test.cluster import HOST, Cluster, Process, Worker, free_ports, worker_command
from sglang_router_rs.routing_test.command import check_writable
from sglang_router_rs.routing_test.config import tracking_settings
from sglang_router_rs.routing_test.load import Load, plan
from sglang_router_rs.routing_test.metrics import Run
from sglang_router_rs.routing_test.options import OptionError
from sglang_router_rs.routing_test.results import Results, hit_rate, save_csv, succeeded
from sglang_router_rs.routing_test.run import attribute, measure
from sglang_router_rs.routing_test.service import Service, prepare
from trial import Failure, Help, positive, request_log, their_command

READY_SECS = 60.0
# Workers do not cost more of the machine than they must: pages and frames of one token would.
COARSE = ("--page-tokens", "16", "--stream-interval", "16")
# Arrivals that are looked at together around a loss, in seconds of the trace after it.
WINDOWS = ((-60, 0), (0, 10), (10, 20), (20, 40), (40, 100))
DPI = 110


@dataclass(frozen=True)
class Contender:
    """A router and its policy."""

    router: str
    policy: str

    def __str__(self) -> str:
        return f"{self.router}:{Path(self.policy).name}"

    @property
    def is_ours(self) -> bool:
        """Whether it tells of its requests."""
        return self.router == "ours"

    @property
    def stem(self) -> str:
        """The name of its files."""
        return str(self).replace(":", "-")


@dataclass(frozen=True)
class Loss:
    """A worker that is killed at a second of the trace, and does not come back."""

    worker: int
    at_secs: float

    def __str__(self) -> str:
        return f"{self.worker}@{self.at_secs:g}"


@dataclass
class Outcome:
    """What became of one contender's requests."""

    made: Results
    # Microseconds from looking at the workers to a pick; None if the router does not tell.
    decisions_us: list[float] | None
    # Requests that the killed worker had when it died, by its own log; None if none was killed.
    died_with_worker: set[str] | None


# --- the command line -----------------------------------------------------------------------------------------------


def contender(text: str) -> Contender:
    """A contender of the command line."""
    router, _, policy = text.partition(":")
    if router not in ("ours", "sglang-router") or not policy:
        raise argparse.ArgumentTypeError(f"{text} is not ours:POLICY or sglang-router:POLICY")
    return Contender(router, policy)


def speeds(text: str) -> list[float]:
    """The speed of each worker."""
    return [positive(part) for part in text.split(",")]


def loss(text: str) -> Loss:
    """A loss of the command line."""
    worker, _, at_secs = text.partition("@")
    if worker.isdecimal():
        with contextlib.suppress(ValueError):
            return Loss(int(worker), positive(at_secs))
    raise argparse.ArgumentTypeError(f"{text} is not WORKER@SECONDS, workers counted from 0")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=Help)
    made.add_argument("--trace", required=True, help="a trace in Mooncake's format")
    made.add_argument("--num-requests", type=int, default=3000, help="the first of its requests")
    made.add_argument("--workers", type=int, default=8, help="simulated workers")
    made.add_argument("--speed", type=positive, default=20, help="workers and trace run that many times faster")
    made.add_argument("--speeds", type=speeds, help="speed of each worker beside that, such as 1,1,0.5,0.5")
    made.add_argument("--rate-scale", type=positive, default=1, help="arrivals come that many times faster")
    made.add_argument("--hide-kv", action="store_true", help="workers do not tell the size of their KV caches")
    made.add_argument("--lose", type=loss, metavar="WORKER@SECONDS", help="kill a worker at a second of the trace")
    made.add_argument("--options", nargs="*", default=[], help="further options of our router, NAME=VALUE")
    made.add_argument("--directory", type=Path, default=Path("bench-routing"), help="where rows and logs go")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the shares of requests by TTFT and latency")
    made.add_argument(
        "--contenders",
        type=contender,
        nargs="+",
        default=[
            contender(f"{who}:{policy}")
            for who in ("sglang-router", "ours")
            for policy in ("round_robin", "cache_aware")
        ]
        + [contender("ours:least_ttft")],
        help="routers and policies, in this order",
    )
    settings = made.parse_args(arguments)
    if settings.speeds is not None and len(settings.speeds) != settings.workers:
        made.error(f"--speeds has {len(settings.speeds)} speeds for {settings.workers} workers")
    if settings.lose is not None and settings.lose.worker >= settings.workers:
        made.error(f"--lose {settings.lose}: there are workers 0 to {settings.workers - 1} only")
    if settings.plot is not None and settings.plot.suffix != ".png":
        made.error(f"--plot {settings.plot} must end in .png")
    names = [str(who) for who in settings.contenders]
    if len(set(names)) < len(names):
        made.error("--contenders: one is named twice")
    return settings


# --- a contender ----------------------------------------------------------------------------------------------------


async def start_router(
    cluster: Cluster, who: Contender, workers: Sequence[Worker], options: dict[str, object]
) -> Service:
    """The contender's router, ready; the options are for ours."""
    port = free_ports(1)[0]
    url = f"http://{HOST}:{port}"
    if who.is_ours:
        await cluster.start_router(port, workers, {"policy": who.policy, **options})
    else:
        command = await their_command(port, who.policy, [worker.url for worker in workers])
        process = cluster.start(who.stem, command)
        await process.until_answers(url, "/readiness", READY_SECS)
    return Service(url, has_traces=who.is_ours)


async def start_workers(
    cluster: Cluster, settings: argparse.Namespace, log: Path
) -> tuple[list[Worker], list[Process]]:
    """The workers, ready; the one that will be killed writes the log."""
    workers, processes = [], []
    for index, port in enumerate(free_ports(settings.workers)):
        speed = settings.speed * (settings.speeds[index] if settings.speeds else 1.0)
        flags = ["--speed", f"{speed:g}", *COARSE, *(["--hide-kv"] if settings.hide_kv else [])]
        if settings.lose is not None and settings.lose.worker == index:
            flags += ["--request-log", str(log)]
        processes.append(cluster.start(f"worker-gpu_{index}", worker_command(port, index, None, flags)))
        workers.append(Worker(f"http://{HOST}:{port}", f"gpu_{index}"))
    for worker, process in zip(workers, processes, strict=True):
        await process.until_answers(worker.url, "/health", READY_SECS)
    return workers, processes


class Killing:
    """The end of a worker at a moment of the run, without a word to anybody."""

    def __init__(self, process: Process, after_secs: float) -> None:
        self._process, self._after_secs = process, after_secs
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Count from now."""
        self._timer = asyncio.get_running_loop().call_later(self._after_secs, self._process.kill)

    def cancel(self) -> None:
        """Leave the worker alone."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def killing(settings: argparse.Namespace, processes: Sequence[Process]) -> Iterator[Killing | None]:
    """What kills the worker that is to be lost."""
    if settings.lose is None:
        yield None
        return
    planned = Killing(processes[settings.lose.worker], settings.lose.at_secs / settings.speed)
    try:
        yield planned
    finally:
        planned.cancel()


def unended(log: Path) -> set[str]:
    """The ids of the requests that arrived and did not end, by a worker's own log."""
    ids: dict[str, set[str]] = {"arrived": set(), "ended": set()}
    for line in request_log(log):
        ids[line["event"]].add(line["request_id"])
    return ids["arrived"] - ids["ended"]


async def contend(who: Contender, load: Load, config: LoadConfig, settings: argparse.Namespace) -> Outcome:
    """One contender on the whole load."""
    directory = settings.directory / who.stem
    log = directory / "requests-of-the-lost.jsonl"
    log.unlink(missing_ok=True)
    given = dict(option.partition("=")[::2] for option in settings.options)
    async with Cluster(directory) as cluster:
        workers, processes = await start_workers(cluster, settings, log)
        service = await start_router(cluster, who, workers, {**tracking_settings(load, config), **given})
        target, _ = await prepare(service, config, load)
        with killing(settings, processes) as planned:
            made, exchanges = await measure(target, load, str(who), on_start=planned.begin if planned else lambda: None)
        decisions = None
        if service.has_traces:
            traces = await attribute(service, made, exchanges)
            told = (trace["decision_us"] for trace in traces.values())
            decisions = [value for value in told if value is not None]
    if made.disagreements:
        name, problem = made.disagreements[0]
        print(f"warning: {len(made.disagreements)} like {name}: {problem}", file=sys.stderr)
    return Outcome(made, decisions, None if settings.lose is None else unended(log))


# --- what is told of it ---------------------------------------------------------------------------------------------


def at_percent(values: Sequence[float] | np.ndarray[Any, Any] | None, percent: float) -> float:
    """A percentile, not a number without values."""
    return float(np.percentile(values, percent)) if values is not None and len(values) else np.nan


def line(outcome: Outcome, speed: float) -> dict[str, float]:
    """What a contender's requests got, in seconds of the trace."""
    table = outcome.made.table
    good, hits = succeeded(table), hit_rate(table)
    ttft = good["ttft"].dropna().to_numpy(float) * speed
    late = table["queue_time"].dropna().to_numpy(float) * speed
    return {
        "requests": len(table),
        "failed": len(table) - len(good),
        "hit rate %": np.nan if hits is None else 100 * hits,
        "TTFT mean s": ttft.mean() if len(ttft) else np.nan,
        "TTFT p50 s": at_percent(ttft, 50),
        "TTFT p90 s": at_percent(ttft, 90),
        "TTFT p99 s": at_percent(ttft, 99),
        "E2E mean s": good["total_latency"].mean() * speed if len(good) else np.nan,
        "generator late p99 s": at_percent(late, 99),
        "decision p50 us": at_percent(outcome.decisions_us, 50),
        "decision p99 us": at_percent(outcome.decisions_us, 99),
    }


def loss_line(outcome: Outcome, at_secs: float, speed: float) -> dict[str, float]:
    """What a worker's death meant to a contender's requests, in seconds of the trace."""
    table = outcome.made.table
    good = succeeded(table)
    lost = set(table["req_id"]) - set(good["req_id"])
    had = outcome.died_with_worker or set()
    made: dict[str, float] = {
        "in its hands": len(had),
        "of these failed": len(lost & had),
        "others failed": len(lost - had),
    }
    after = good["arrival_time"].to_numpy(float) * speed - at_secs
    for begin, end in WINDOWS:
        ttft = good["ttft"][(after >= begin) & (after < end)]
        made[f"TTFT {begin}..{end} s"] = float(ttft.mean()) * speed if len(ttft.dropna()) else np.nan
    return made


def verdict(who: Contender, row: dict[str, float]) -> str:
    """Whether a request was lost that need not have been, in words."""
    its, others = int(row["of these failed"]), int(row["others failed"])
    if not its and not others:
        return f"{who}: no request failed"
    where = f"{others} of them NOT IN THE HANDS" if others else "all in the hands"
    return f"{who}: {its + others} requests failed, {where} of the killed worker"


def as_run(who: Contender, outcome: Outcome, speed: float) -> Run:
    """A contender's requests in seconds of the trace, for plots."""
    rows = outcome.made.table
    for column in ("ttft", "total_latency"):
        rows[column] *= speed
    return Run(str(who), who.is_ours, 0, rows, {}, None, None, workers=())


def printed(rows: dict[str, dict[str, float]], names: int) -> list[str]:
    """A table's head and its lines, which have the same widths however many there are."""
    columns = list(next(iter(rows.values())))
    head = " " * names + "".join(f"  {column}" for column in columns)
    lines = [head]
    for who, row in rows.items():
        cells = "".join(f"  {cell(row[column]):>{len(column)}}" for column in columns)
        lines.append(f"{who:<{names}}{cells}")
    return lines


def cell(value: float) -> str:
    """A number in a table; nothing if it is not known."""
    return "" if np.isnan(value) else f"{value:.2f}" if isinstance(value, float) else str(value)


async def run(settings: argparse.Namespace) -> None:
    """All contenders, one after the other; each one's line is printed and saved as it ends."""
    config = LoadConfig(
        route="/v1/completions",
        model="sim-model",
        dataset=f"trace:{settings.trace}",
        trace_speed=settings.speed * settings.rate_scale,
        num_requests=settings.num_requests,
        warmup=0,
    )
    load = plan(config)
    last_secs = load.requests[-1].arrival_time * settings.speed
    if settings.lose is not None and settings.lose.at_secs >= last_secs:
        raise OptionError("lose", str(settings.lose), f"the last request arrives at second {last_secs:g}")
    if settings.plot is not None:
        check_writable("plot", settings.plot)
    width = max(len(str(who)) for who in settings.contenders)
    rows: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, float]] = {}
    runs: list[Run] = []
    for who in settings.contenders:
        outcome = await contend(who, load, config, settings)
        save_csv(outcome.made.table, settings.directory / f"{who.stem}.csv")
        row = rows[str(who)] = line(outcome, settings.speed)
        print(*printed({str(who): row}, width)[0 if len(rows) == 1 else 1 :], sep="\n", flush=True)
        if settings.lose is not None:
            losses[str(who)] = loss_line(outcome, settings.lose.at_secs, settings.speed)
        table = pd.DataFrame.from_dict({name: row | losses.get(name, {}) for name, row in rows.items()}, orient="index")
        save_csv(table.rename_axis("contender").reset_index(), settings.directory / "table.csv")
        runs.append(as_run(who, outcome, settings.speed))
        if settings.plot is not None:
            plots.latency_cdfs(runs).savefig(settings.plot, dpi=DPI)
        if outcome.made.interrupted:
            break
    if losses:
        print(f"\nworker {settings.lose.worker} was killed at {settings.lose.at_secs:g} s; mean TTFT by arrival after:")
        print(*printed(losses, width), sep="\n")
        print(*(verdict(who, losses[str(who)]) for who in settings.contenders if str(who) in losses), sep="\n")
    compare(rows, width)


def compare(rows: dict[str, dict[str, float]], width: int) -> None:
    """Print what each contender's times are in parts of those of the router that we replace."""
    base = "sglang-router:cache_aware"
    if base in rows:
        print(f"\nin parts of {base}:")
        columns = ("TTFT mean s", "TTFT p99 s", "E2E mean s")
        parts = {who: {name: row[name] / rows[base][name] for name in columns} for who, row in rows.items()}
        print(*printed(parts, width), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, this process's own by default; returns its exit status."""
    settings = parsed(arguments)
    try:
        asyncio.run(run(settings))
    except OptionError as error:
        print(f"error: {error.as_flag}", file=sys.stderr)
        return 2
    except (RunError, Failure, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
