"""One run: a load goes to a service, and its results come back, each row with the worker that served it.

``measure`` sends, ``attribute`` asks the router who served what, ``save`` writes. A run that is interrupted keeps what
it has; a run whose workers are not certain is saved and then refused.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from ..client import Trace
from . import attribution, results
from .attribution import Disagreement
from .cluster import RunError
from .exchange import Exchange
from .generator import Generator, Sent, Target
from .interruption import interrupted_by, interruptible
from .load import Load
from .results import Results
from .service import Service

# A generator this late has not sent the load that was asked for.
LATE_SECS = 0.020
# Waits that have grown that much, by a factor and by seconds, go on growing.
GROWN, GROWN_SECS = 3, 0.5
# How often a run is heard of without a terminal.
TOLD_EVERY_SECS = 10.0
# Of a list of requests, in a message.
SHOWN = 10


class AttributionError(RunError):
    """The worker of some requests is not certain: the results are void."""


def tell(notes: Sequence[str]) -> None:
    """Say before a run what its user should know of it."""
    for line in notes:
        print(f"note: {line}", file=sys.stderr)


async def measure(
    target: Target,
    load: Load,
    name: str = "requests",
    before: Callable[[], Awaitable[object]] | None = None,
    on_start: Callable[[], object] = lambda: None,
) -> tuple[Results, list[Exchange]]:
    """Send the warm-up and then the load; a row per request that was sent. SIGINT and SIGTERM end it early.

    What is to happen in between, such as emptying caches, is done by ``before``; ``on_start`` is called at the moment
    from which arrivals are counted.

    Raises:
        RunError: the warm-up failed; nothing was measured.
    """
    await _warm_up(target, load)
    if before is not None:
        await before()
    # No two runs have an id in common, however often the same load is sent.
    run = uuid.uuid4().hex[:12]
    ids = [f"{run}-{number:06d}" for number in range(len(load.requests))]
    done = failed = 0
    told_at = time.monotonic()
    with tqdm(total=len(ids), desc=name, unit="req", disable=None, dynamic_ncols=True) as bar:

        def on_end(exchange: Exchange) -> None:
            nonlocal done, failed, told_at
            done += 1
            if not exchange.succeeded:
                failed += 1
                bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            if bar.disable and time.monotonic() > told_at + TOLD_EVERY_SECS:
                told_at = time.monotonic()
                print(f"{name}: {done} of {len(ids)}", file=sys.stderr)

        sent = await _send(Generator(target, on_end, on_start), load, ids)
    rows = [results.row(exchange) for exchange in sent.exchanges]
    made = Results(rows, sent.lags, planned=len(ids), interrupted=sent.interrupted)
    return made, sent.exchanges


async def _warm_up(target: Target, load: Load) -> None:
    if not load.warmup:
        return
    ids = [f"warmup-{uuid.uuid4().hex[:12]}-{number}" for number in range(len(load.warmup))]
    sent = await _send(Generator(target), load, ids, warmup=True)
    if sent.interrupted:
        raise KeyboardInterrupt
    failed = [exchange for exchange in sent.exchanges if not exchange.succeeded]
    if len(failed) == len(ids):
        raise RunError(f"all {len(ids)} requests of the warm-up failed, the first with: {failed[0].error}")


async def _send(generator: Generator, load: Load, ids: Sequence[str], warmup: bool = False) -> Sent:
    with interrupted_by(generator.stop):
        return await generator.send(load.warmup if warmup else load.requests, ids)


async def attribute(service: Service, made: Results, exchanges: Sequence[Exchange]) -> dict[str, Trace]:
    """Write into the rows who served them, and find where the witnesses of a request's worker disagree.

    The witnesses of a router with request tracking are its headers, its traces and the answers; of one without, its
    headers; a worker is its own. If the router is gone, what was measured is kept, and void. Returns the traces.
    """
    traces: dict[str, Trace] = {}
    if not service.is_router:
        made.disagreements += attribution.by_address(exchanges, made.rows, service.url)
    elif not service.has_traces:
        made.disagreements += attribution.by_headers(exchanges, made.rows)
    else:
        try:
            async with service.traces() as client:
                ids = [exchange.request_id for exchange in exchanges]
                traces = await interruptible(attribution.fetch(client, ids))
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, RuntimeError, KeyboardInterrupt) as error:
            made.interrupted |= isinstance(error, KeyboardInterrupt)
            problem = f"the router's traces cannot be read: {str(error) or type(error).__name__}"
            made.disagreements += [Disagreement(exchange.request_id, problem) for exchange in exchanges]
            return traces
        made.disagreements += attribution.by_traces(exchanges, made.rows, traces)
    return traces


def save(made: Results, summary: dict[str, Any], output: Path) -> None:
    """Write the rows to ``output``, the summary and the cumulative figures beside it, and print what they amount to.

    Raises:
        OSError: names the path, and where the results are instead, among the system's temporary files.
    """
    print(results.text(summary))
    for line in summary["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    try:
        files = _write(made, summary, output)
    except OSError as error:
        # A run may have taken hours.
        raise OSError(f"{error}; {_kept_elsewhere(made, summary, output.name)}") from error
    print("written:", *files)


def beside(output: Path, what: str) -> Path:
    """Where another file of the run goes: ``results.csv`` has ``results.summary.json`` beside it."""
    return output.with_name(f"{output.name.removesuffix('.csv')}.{what}")


def _kept_elsewhere(made: Results, summary: dict[str, Any], name: str) -> str:
    """Write the files where there may be room; says where that is."""
    refuge = Path(tempfile.mkdtemp(prefix="routing-test-"))
    try:
        _write(made, summary, refuge / name)
    except OSError as error:
        shutil.rmtree(refuge)
        return f"nor elsewhere ({error}): the results are lost"
    return f"the results are in {refuge}"


def _write(made: Results, summary: dict[str, Any], output: Path) -> list[Path]:
    table = made.table
    return [
        results.save_csv(table, output),
        results.save_json(summary, beside(output, "summary.json")),
        results.save_csv(results.cumulative(table), beside(output, "cumulative.csv")),
    ]


def warnings(made: Results, summary: dict[str, Any], limit: int | None) -> list[str]:
    """What whoever reads the results must know, the worst first; ``limit`` is the run's ``max_concurrency``."""
    lines = [f"{name}: {problem}" for name, problem in made.disagreements[:SHOWN]]
    if made.disagreements:
        requests = len({name for name, _ in made.disagreements})
        lines.insert(0, f"THE WORKER OF {requests} REQUESTS IS NOT CERTAIN, these results are void:")
    if made.interrupted:
        lines.append(f"interrupted: {len(made.rows)} of {made.planned} requests were sent")
    failed, total = summary["requests"]["failed"], summary["requests"]["total"]
    if failed:
        lines.append(f"{failed} of {total} requests failed")
    early, late_on = summary["wait_secs"]["first_quarter"], summary["wait_secs"]["last_quarter"]
    if early is not None and late_on is not None and late_on > GROWN * early + GROWN_SECS:
        lines.append(
            f"requests waited longer and longer: {early:.3g} s in the first quarter, {late_on:.3g} s in the last "
            "(median). The workers were given more than they can bear, and latencies tell how long that went on: lower "
            "--request-rate or --trace-speed, or add workers"
        )
    arrivals = summary["arrivals"]
    late, lag = (arrivals[name]["p99"] for name in ("lateness_secs", "loop_lag_secs"))
    if late is None or late <= LATE_SECS:
        pass
    elif limit is not None:
        lines.append(
            f"1 % of the requests left more than {late * 1e3:.0f} ms late; they may wait for one of {limit} places"
        )
    elif arrivals["scheduled_span_secs"] == 0:
        last = arrivals["lateness_secs"]["max"]
        lines.append(f"all were to leave at once; the last left {last * 1e3:.0f} ms after the start")
    else:
        lines.append(
            f"THE GENERATOR DID NOT KEEP UP: 1 % of the requests left more than {late * 1e3:.0f} ms late; what was "
            "measured is another load than the one asked for. Lower the rate (--request-rate, --trace-speed) or the "
            "tokens per answer, or give it a core of its own"
        )
    if lag is not None and lag > LATE_SECS:
        lines.append(f"the generator's own clock was {lag * 1e3:.0f} ms late at p99: times are no better than that")
    return lines
