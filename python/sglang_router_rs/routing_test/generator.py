"""The load generator: an open loop. Every request leaves at its own time, however the ones before it fare.

One task waits for arrival times and starts a task per request; nothing limits how many are open at once, unless
``max_concurrency`` does. How late each request left, and how late the event loop was at all, are measured too: a
generator that is too slow for its load must say so rather than blame the worker.

Not here: what the answers mean (``exchange``), and whose they were (``attribution``).
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp

from .exchange import ROUTES, AnswerError, Events, Exchange, error_text
from .load import Request

# Idle connections are closed before a worker does it: uvicorn, which SGLang runs on, after 5 s.
KEEP_ALIVE_SECS = 4.0
# How often the event loop is looked at.
LAG_EVERY_SECS = 0.02
# Requests that are started in a row when they are due.
STARTED_AT_ONCE = 64
# Bodies that are written before the first request leaves, together.
PREPARED_BYTES = 256 << 20
# Open files beside the connections: logs, libraries, the event loop.
SPARE_FILES = 64


@dataclass(frozen=True)
class Target:
    """Where requests go, and how they ask."""

    url: str
    route: str
    model: str | None
    stream: bool
    ignore_eos: bool
    timeout_secs: float
    max_concurrency: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Sent:
    """What came of a load. Requests that were not sent any more are not in it."""

    exchanges: list[Exchange]
    # How late the event loop woke up each time, in seconds.
    lags: list[float]
    interrupted: bool


class Generator:
    """Sends one load; ``stop()`` ends it early."""

    def __init__(
        self,
        target: Target,
        on_end: Callable[[Exchange], object] = lambda _exchange: None,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        self._target = target
        self._route = ROUTES[target.route]
        self._on_end, self._on_start = on_end, on_start
        self._stop = asyncio.Event()
        self._zero = 0.0

    def stop(self) -> None:
        """Send nothing more, and end what is in flight."""
        self._stop.set()

    async def send(self, requests: Sequence[Request], ids: Sequence[str]) -> Sent:
        """Send each request at its arrival time, and wait for all answers. ``on_start`` is called at time zero."""
        exchanges = [Exchange(name, request) for name, request in zip(ids, requests, strict=True)]
        _allow_files(len(exchanges) if self._target.max_concurrency is None else self._target.max_concurrency)
        lags: list[float] = []
        await self._prepare(exchanges)
        async with self._session() as session:
            with _rare_collections():
                self._zero = time.perf_counter()
                self._on_start()
                watching = asyncio.create_task(_watch_lag(lags))
                sending = asyncio.create_task(self._send_all(session, exchanges))
                stopping = asyncio.create_task(self._stop.wait())
                both: set[asyncio.Future[Any]] = {sending, stopping}
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await _ended(sending, stopping, watching)
        begun = [exchange for exchange in exchanges if exchange.error is not None]
        return Sent(begun, lags, interrupted=self._stop.is_set())

    async def _prepare(self, exchanges: Sequence[Exchange]) -> None:
        """Write the bodies of the first requests, as many as there is room for; the others follow as they leave."""
        size = 0
        for number, exchange in enumerate(exchanges):
            if size >= PREPARED_BYTES or self._stop.is_set():
                return
            if number % STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
            exchange.body = self._body(exchange.request)
            size += len(exchange.body)

    def _body(self, request: Request) -> bytes:
        target = self._target
        return json.dumps(self._route.body(request, target.model, target.stream, target.ignore_eos)).encode()

    async def _send_all(self, session: aiohttp.ClientSession, exchanges: Sequence[Exchange]) -> None:
        limit = self._target.max_concurrency
        places = None if limit is None else asyncio.Semaphore(limit)
        tasks: list[asyncio.Task[None]] = []
        try:
            for number, exchange in enumerate(exchanges):
                early = exchange.request.arrival_time - self._now()
                # When it is late already, those before it get their turn now and then; a turn each would make it later.
                if early > 0 or number % STARTED_AT_ONCE == 0:
                    await asyncio.sleep(max(0.0, early))
                tasks.append(asyncio.create_task(self._one(session, exchange, places)))
            await asyncio.wait(tasks)
        finally:
            await _ended(*tasks)

    async def _one(self, session: aiohttp.ClientSession, exchange: Exchange, places: asyncio.Semaphore | None) -> None:
        try:
            if places is None:
                exchange.error = await self._ask(session, exchange)
            else:
                async with places:
                    exchange.error = await self._ask(session, exchange)
        except asyncio.CancelledError:
            # What never left is no request.
            if exchange.sent_at is not None:
                exchange.error = "interrupted before its end"
            raise
        finally:
            exchange.finished_at = self._now()
            if exchange.error is not None:
                self._on_end(exchange)

    async def _ask(self, session: aiohttp.ClientSession, exchange: Exchange) -> str:
        """Send it and read its answer; what went wrong, or nothing."""
        target = self._target
        body, exchange.body = exchange.body or self._body(exchange.request), None
        headers = {**target.headers, "content-type": "application/json", "x-request-id": exchange.request_id}
        try:
            async with session.post(
                target.url + target.route,
                data=body,
                headers=headers,
                allow_redirects=False,
                trace_request_ctx=exchange,
            ) as response:
                exchange.http_status = response.status
                exchange.header_worker = response.headers.get("x-sglang-worker")
                exchange.header_node = response.headers.get("x-sglang-node")
                if not 200 <= response.status < 300:
                    return f"HTTP {response.status}: {error_text(await response.read())}"
                if response.content_type == "text/event-stream":
                    return await self._read_stream(response, exchange)
                self._read(exchange, await response.read())
                return ""
        except AnswerError as error:
            return str(error)
        except asyncio.TimeoutError as error:
            # Only that of a connection says more.
            return str(error) or f"no end after {target.timeout_secs:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return f"{type(error).__name__}: {error}"

    async def _read_stream(self, response: aiohttp.ClientResponse, exchange: Exchange) -> str:
        events = Events()
        is_done = False
        async for chunk in response.content.iter_any():
            now = self._now()
            for data in events.feed(chunk):
                if data == b"[DONE]":
                    is_done = True
                else:
                    self._read(exchange, data, now)
        return "" if is_done and not events.has_rest else "the stream ended before its [DONE]"

    def _read(self, exchange: Exchange, data: bytes, now: float | None = None) -> None:
        try:
            # As text: of bytes the encoding would be looked for in each frame.
            answer = json.loads(data.decode())
        except (ValueError, RecursionError):
            raise AnswerError(f"the answer is not JSON: {error_text(data)}") from None
        if not isinstance(answer, dict):
            raise AnswerError(f"the answer is not a JSON object: {error_text(data)}")
        if answer.get("error"):
            raise AnswerError(error_text(data))
        try:
            self._route.read(exchange, answer, self._now() if now is None else now)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise AnswerError(f"the answer has another shape than expected ({error}): {error_text(data)}") from None
        if now is None:
            # Nothing is known of when the tokens of a whole answer came.
            exchange.first_content_at = exchange.last_content_at = None

    def _session(self) -> aiohttp.ClientSession:
        """Connections without a limit; the head of each request is stamped as it is written."""
        watch = aiohttp.TraceConfig()

        async def on_headers_sent(_session: Any, context: SimpleNamespace, _params: Any) -> None:
            exchange = context.trace_request_ctx
            if exchange.sent_at is None:
                exchange.sent_at = self._now()

        watch.on_request_headers_sent.append(on_headers_sent)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECS),
            timeout=aiohttp.ClientTimeout(total=self._target.timeout_secs, sock_connect=30),
            trace_configs=[watch],
        )

    def _now(self) -> float:
        return time.perf_counter() - self._zero


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and raise what went wrong in what has ended."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


async def _watch_lag(lags: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_EVERY_SECS)
        lags.append(max(0.0, time.perf_counter() - before - LAG_EVERY_SECS))


def _allow_files(connections: int) -> None:
    """Let this process have that many connections, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        highest = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Keep the garbage collector from pausing the event loop for the load's own objects."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
