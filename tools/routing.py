"""Routers and policies side by side over HTTP: the same trace, one after the other, before simulated workers.

    make bench-routing ROUTING="--trace conversation_trace.jsonl"         ours and sglang-router 0.3.2
    make bench-routing ROUTING="--trace FILE --speeds 1,1,1,1,.5,.5,.5,.5"  half of the workers at half speed

Workers and trace run ``--speed`` times faster than time; all times that are printed are those of the trace. Each
contender gets fresh workers. Requests are streams to /v1/completions, whose frames are small. A contender is
``ours:POLICY`` or ``sglang-router:POLICY``; the latter is installed from PyPI into a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sglang_router_rs.routing_test import LoadConfig, RunError
from sglang_router_rs.routing_test.cluster import HOST, Cluster, Process, Worker, free_ports
from sglang_router_rs.routing_test.load import Load, plan
from sglang_router_rs.routing_test.results import Results, hit_rate, save_csv, succeeded
from sglang_router_rs.routing_test.run import measure
from sglang_router_rs.routing_test.service import Service, prepare
from trial import Failure, Help, positive

THEIRS = "sglang-router==0.3.2"
VENV = Path("target/venv-sglang-router")
READY_SECS = 60.0


@dataclass(frozen=True)
class Contender:
    """A router and its policy."""

    router: str
    policy: str

    def __str__(self) -> str:
        return f"{self.router}:{self.policy}"


def contender(text: str) -> Contender:
    """A contender of the command line."""
    router, _, policy = text.partition(":")
    if router not in ("ours", "sglang-router") or not policy:
        raise argparse.ArgumentTypeError(f"{text} is not ours:POLICY or sglang-router:POLICY")
    return Contender(router, policy)


def speeds(text: str) -> list[float]:
    """The speed of each worker."""
    return [positive(part) for part in text.split(",")]


async def their_python() -> Path:
    """The interpreter that has sglang-router; installs it if it is not there."""
    python = VENV / "bin" / "python"
    if not (VENV / ".installed").exists():
        print(f"installing {THEIRS} into {VENV}", file=sys.stderr)
        for command in ([sys.executable, "-m", "venv", str(VENV)], [str(python), "-m", "pip", "install", "-q", THEIRS]):
            process = await asyncio.create_subprocess_exec(*command)
            if await process.wait() != 0:
                raise Failure(f"{' '.join(command)} failed")
        (VENV / ".installed").touch()
    return python


async def start_router(cluster: Cluster, who: Contender, workers: Sequence[Worker], options: Sequence[str]) -> Service:
    """The contender's router, ready."""
    port = free_ports(1)[0]
    url = f"http://{HOST}:{port}"
    if who.router == "ours":
        named = dict(option.partition("=")[::2] for option in options)
        await cluster.start_router(port, workers, {"policy": who.policy, **named})
    else:
        metrics = free_ports(1)[0]
        command = [str(await their_python()), "-m", "sglang_router.launch_router", "--host", HOST, "--port", str(port)]
        command += ["--policy", who.policy, "--prometheus-port", str(metrics), "--log-level", "warn"]
        command += ["--worker-startup-check-interval", "1", "--worker-urls", *(worker.url for worker in workers)]
        process: Process = cluster.start(str(who).replace(":", "-"), command)
        await process.until_answers(url, "/readiness", READY_SECS)
    return Service(url, has_traces=False)


async def contend(who: Contender, load: Load, settings: argparse.Namespace, directory: Path) -> Results:
    """One contender on the whole load."""
    config = LoadConfig(route="/v1/completions", model="sim-model", num_requests=len(load.requests), warmup=0)
    count = settings.workers
    factors = settings.speeds or [1.0] * count
    async with Cluster(directory / str(who).replace(":", "-")) as cluster:
        workers = []
        for index, port in enumerate(free_ports(count)):
            speed = settings.speed * factors[index]
            flags = ["--speed", f"{speed:g}", *(["--hide-kv"] if settings.hide_kv else [])]
            workers += await cluster.start_workers([port], [index], None, flags)
        service = await start_router(cluster, who, workers, settings.options)
        target, _ = await prepare(service, config, load)
        made, _ = await measure(target, load, str(who))
    return made


def line(made: Results, speed: float) -> dict[str, Any]:
    """What a contender's requests got, in seconds of the trace."""
    table = made.table
    good, hits = succeeded(table), hit_rate(table)
    ttft = good["ttft"].dropna().to_numpy(float) * speed
    late = table["queue_time"].dropna().to_numpy(float)
    return {
        "requests": len(table),
        "failed": len(table) - len(good),
        "hit rate %": np.nan if hits is None else 100 * hits,
        "TTFT mean s": ttft.mean() if len(ttft) else np.nan,
        "p50": np.percentile(ttft, 50) if len(ttft) else np.nan,
        "p90": np.percentile(ttft, 90) if len(ttft) else np.nan,
        "p99": np.percentile(ttft, 99) if len(ttft) else np.nan,
        "E2E mean s": good["total_latency"].mean() * speed if len(good) else np.nan,
        "generator late p99 s": np.percentile(late, 99) * speed if len(late) else np.nan,
    }


async def run(settings: argparse.Namespace) -> pd.DataFrame:
    """All contenders, one after the other."""
    rate = settings.speed * settings.rate_scale
    config = LoadConfig(
        dataset=f"trace:{settings.trace}", trace_speed=rate, num_requests=settings.num_requests, warmup=0
    )
    load = plan(config)
    lines = {}
    for who in settings.contenders:
        print(f"{who} …", file=sys.stderr)
        made = await contend(who, load, settings, settings.directory)
        save_csv(made.table, settings.directory / f"{str(who).replace(':', '-')}.csv")
        lines[str(who)] = line(made, settings.speed)
        if made.interrupted:
            break
    return pd.DataFrame.from_dict(lines, orient="index")


def main() -> int:
    """Run the command line; returns its exit status."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=Help)
    made.add_argument("--trace", required=True, help="a trace in Mooncake's format")
    made.add_argument("--num-requests", type=int, default=3000, help="the first of its requests")
    made.add_argument("--workers", type=int, default=8, help="simulated workers")
    made.add_argument("--speed", type=positive, default=20, help="workers and trace run that many times faster")
    made.add_argument("--speeds", type=speeds, help="speed of each worker beside that, such as 1,1,0.5,0.5")
    made.add_argument("--rate-scale", type=positive, default=1, help="arrivals come that many times faster")
    made.add_argument("--hide-kv", action="store_true", help="workers do not tell the size of their KV caches")
    made.add_argument("--options", nargs="*", default=[], help="further options of our router, NAME=VALUE")
    made.add_argument("--directory", type=Path, default=Path("bench-routing"), help="where rows and logs go")
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
    settings = made.parse_args()
    if settings.speeds is not None and len(settings.speeds) != settings.workers:
        made.error(f"--speeds has {len(settings.speeds)} speeds for {settings.workers} workers")
    try:
        table = asyncio.run(run(settings))
    except (RunError, Failure, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.round(2).to_string())
    base = "sglang-router:cache_aware"
    if base in table.index:
        print(f"\nin parts of {base}:")
        print(
            (table[["TTFT mean s", "p99", "E2E mean s"]] / table.loc[base, ["TTFT mean s", "p99", "E2E mean s"]])
            .round(3)
            .to_string()
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
