"""Which worker served which request: by id only, from three witnesses that must agree.

The router's headers on the answer, its trace of the request, and the answer itself (its id, which the trace knows as
``worker_request_id``; a simulated worker's port). Where two of them differ, or one that must be there is missing, the
run is void: ``disagreements`` says so. Nothing is ever joined by position, and nothing is filled in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..client import AsyncRouterTraceClient, Trace
from .exchange import Exchange

# Traces asked for at once: some 700 KB.
PAGE = 1000
# A trace ends when its last byte was relayed, which may be just after the client has read it.
SETTLE_SECS = 10.0
LOOK_EVERY_SECS = 0.05

NO_HEADER = "its answer names no worker: no header x-sglang-worker; start the router with worker_headers=url"

Row = dict[str, Any]

# Columns that are a trace's own fields.
_FIELDS = {
    "node_id": "node_id",
    "gpu_id": "node_id",
    "routing_policy": "routing_policy",
    "trace_status": "status",
    "reason": "reason",
    "matched_tokens": "matched_tokens",
    "router_queue_ms": "queue_ms",
    "router_ttft_ms": "ttft_ms",
    "router_latency_ms": "latency_ms",
}


class Disagreement(NamedTuple):
    """A request whose worker is not certain, and why."""

    req_id: str
    problem: str


async def fetch(client: AsyncRouterTraceClient, ids: Sequence[str]) -> dict[str, Trace]:
    """The traces of these ids, by id, in pages; those that have not ended are waited for, for some seconds."""
    traces: dict[str, Trace] = {}
    wanted = list(ids)
    deadline = time.monotonic() + SETTLE_SECS
    while wanted:
        for start in range(0, len(wanted), PAGE):
            found = await client.batch_get_traces(wanted[start : start + PAGE])
            traces.update((trace["request_id"], trace) for trace in found)
        wanted = [name for name in wanted if name in traces and traces[name]["status"] not in ("completed", "failed")]
        if time.monotonic() > deadline:
            break
        if wanted:
            await asyncio.sleep(LOOK_EVERY_SECS)
    return traces


def fill(row: Row, trace: Trace) -> None:
    """Write what the trace says into the row of its request."""
    row.update((column, trace[name]) for column, name in _FIELDS.items())
    row["worker_url"] = row.get("worker_url") or trace["worker_url"]
    row["attempts"] = len(trace["attempts"])


def decisions(traces: dict[str, Trace]) -> list[Row]:
    """A row for each candidate of each request's last pick."""
    return [
        {
            "req_id": name,
            "routing_policy": trace["routing_policy"],
            "reason": trace["reason"],
            **candidate,
        }
        for name, trace in traces.items()
        for candidate in trace["candidates"] or []
    ]


def by_traces(
    exchanges: Sequence[Exchange], rows: Sequence[Row], traces: Mapping[str, Trace]
) -> Iterable[Disagreement]:
    """Write what the traces say into the rows; what speaks against the workers."""
    for exchange, row in zip(exchanges, rows, strict=True):
        trace = traces.get(exchange.request_id)
        if trace is not None:
            fill(row, trace)
        yield from disagreements(exchange, trace)


def by_headers(exchanges: Sequence[Exchange], rows: Sequence[Row]) -> Iterable[Disagreement]:
    """Write what the headers say into the rows, where there are no traces; what speaks against the workers."""
    for exchange, row in zip(exchanges, rows, strict=True):
        row["node_id"] = row["gpu_id"] = exchange.header_node
        if exchange.succeeded and exchange.header_worker is None:
            yield Disagreement(exchange.request_id, NO_HEADER)


def by_address(exchanges: Sequence[Exchange], rows: Sequence[Row], url: str) -> Iterable[Disagreement]:
    """Write the worker that was asked directly into the rows; what speaks against it."""
    for exchange, row in zip(exchanges, rows, strict=True):
        row["worker_url"] = url
        if exchange.header_worker not in (None, url):
            problem = f"the header says that {exchange.header_worker} served it, not {url}: is that a router?"
            yield Disagreement(exchange.request_id, problem)


def disagreements(exchange: Exchange, trace: Trace | None) -> Iterable[Disagreement]:
    """What speaks against the worker of a request."""
    return (Disagreement(exchange.request_id, problem) for problem in _problems(exchange, trace))


def restore(exchanges: Sequence[Exchange], rows: Sequence[Row], traces: Mapping[str, Trace]) -> Iterable[Disagreement]:
    """Find rows that have come to name another worker than their trace, and give them back the right one."""
    for exchange, row in zip(exchanges, rows, strict=True):
        trace = traces.get(exchange.request_id)
        if trace is None:
            continue
        # That the header contradicts the trace has been told.
        worker, node = exchange.header_worker or trace["worker_url"], trace["node_id"]
        for column, known in (("worker_url", worker), ("node_id", node), ("gpu_id", node)):
            if row.get(column) != known:
                yield Disagreement(exchange.request_id, f"{column}: the row says {row.get(column)}, the trace {known}")
        fill(row, trace)
        row["worker_url"] = worker


def _problems(exchange: Exchange, trace: Trace | None) -> Iterable[str]:
    if exchange.succeeded and exchange.header_worker is None:
        yield NO_HEADER
    if trace is None:
        # What never reached the router cannot have one.
        if exchange.http_status is not None:
            yield "the router has no trace of it"
        return
    if trace.get("same_id", 1) > 1:
        yield f"the router saw {trace['same_id']} requests with this id"
    if exchange.succeeded and trace["status"] != "completed":
        yield f"its answer came whole, but the trace says {trace['status']}: {trace['error_message']}"
    for what, told, traced in (
        ("worker", exchange.header_worker, trace["worker_url"]),
        ("node", exchange.header_node, trace["node_id"]),
    ):
        if told is not None and told != traced:
            yield f"{what}: the header says {told}, the trace {traced}"
    answered: tuple[tuple[str, object, object], ...] = (
        ("id of the answer", exchange.answer_id, trace["worker_request_id"]),
        ("port of the worker", exchange.answer_port, _port(trace["worker_url"])),
    )
    for what, said, known in answered:
        # The router need not have read the answer.
        if said is not None and known is not None and said != known:
            yield f"{what}: the answer says {said}, the trace {known}"


def _port(url: str | None) -> int | None:
    return None if url is None else urlsplit(url).port
