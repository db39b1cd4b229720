"""Clients of a router's request traces: blocking, asynchronous, and of a log of them."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode, urlsplit

from . import _core

if TYPE_CHECKING:
    import aiohttp
    from typing_extensions import Self

# One trace: the JSON object described in docs/traces.md.
Trace = dict[str, Any]

# What an answer is: an object or a list.
_Shape = TypeVar("_Shape", dict[str, Any], list[Any])

# What one request may ask for.
_PAGE_MAX = 1000
_BATCH_MAX = 10_000


class TracingDisabled(RuntimeError):
    """The router runs without request tracking."""

    def __init__(self) -> None:
        super().__init__(
            "request tracking is off: start the router with Router(..., enable_request_tracking=True) or "
            "--enable-request-tracking"
        )


class NotThisRouter(RuntimeError):
    """What answers at the URL is not sglang_router_rs."""

    def __init__(self, url: str) -> None:
        super().__init__(f"this is not sglang_router_rs: {url} has no /v1/traces; is it a worker or another router?")


class _Answer:
    """An HTTP answer, read."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.body = status, body
        self.error_code: str | None = headers.get("x-router-error-code")
        self.cursor: str | None = headers.get("x-next-cursor")
        self.left_out: str | None = headers.get("x-left-out")

    def json(self, url: str, kind: type[_Shape]) -> _Shape:
        """The body of a 2xx answer; raises what any other answer means."""
        self._check(url)
        return self._parsed(url, kind)

    def load(self, url: str) -> tuple[str, int]:
        """The lines of a load, and how many traces gave none; raises as ``json``."""
        self._check(url)
        if self.left_out is None:
            raise NotThisRouter(url)
        return self.body.decode(), int(self.left_out)

    def _check(self, url: str) -> None:
        if 200 <= self.status < 300:
            return
        if self.error_code == "tracking_disabled":
            raise TracingDisabled
        if self.error_code is None and self.status in (404, 405):
            raise NotThisRouter(url)
        try:
            message = json.loads(self.body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = self.body[:200].decode(errors="replace")
        error = ValueError if self.error_code == "invalid_query" else RuntimeError
        raise error(f"{url} answered {self.status}: {message}")

    def json_or_none(self, url: str) -> Trace | None:
        """The same, with ``None`` for a trace that is not there."""
        is_missing = self.status == 404 and self.error_code == "not_found"
        return None if is_missing else self.json(url, dict)

    def _parsed(self, url: str, kind: type[_Shape]) -> _Shape:
        # Some servers answer every path with a page of theirs.
        try:
            value = json.loads(self.body)
        except ValueError:
            value = None
        if not isinstance(value, kind):
            raise NotThisRouter(url)
        return value


def _trace_path(request_id: str) -> str:
    # Every byte is escaped, so that an id may hold slashes or be the name of another route.
    return "/v1/traces/" + "".join(f"%{byte:02X}" for byte in request_id.encode())


def _pairs(filters: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in filters.items() if value is not None]


def _load_path(filters: dict[str, Any]) -> str:
    return f"/v1/traces?{urlencode([*_pairs(filters), ('format', 'mooncake')])}"


# A page is asked for with (name, text) pairs and answered with traces and the next cursor.
_Pairs = list[tuple[str, str]]
_Page = tuple[list[Trace], "str | None"]


def page_queries(limit: int | None, filters: dict[str, Any]) -> Generator[_Pairs, _Page, None]:
    """The queries of a listing, page by page: yields pairs, is sent the page they gave."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not a number of traces from 1 on, nor None for all")
    left, cursor = limit, None
    while left is None or left > 0:
        size = _PAGE_MAX if left is None else min(left, _PAGE_MAX)
        pairs = [*_pairs(filters), ("limit", str(size))]
        traces, cursor = yield pairs if cursor is None else [*pairs, ("cursor", cursor)]
        left = None if left is None else left - len(traces)
        if cursor is None:
            return


def pages(ask: Callable[[_Pairs], _Page], limit: int | None, filters: dict[str, Any]) -> Iterator[list[Trace]]:
    """All pages of a listing, each asked for when it is wanted."""
    queries = page_queries(limit, filters)
    try:
        pairs = next(queries)
        while True:
            page = ask(pairs)
            yield page[0]
            pairs = queries.send(page)
    except StopIteration:
        return


def listed(core: _core.Server | _core.TraceLog, limit: int | None, filters: dict[str, Any]) -> list[Trace]:
    """All pages of a listing that needs no HTTP."""

    def page(pairs: _Pairs) -> _Page:
        text, cursor = core.traces(pairs)
        return json.loads(text), cursor

    return [trace for traces in pages(page, limit, filters) for trace in traces]


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ValueError(f"{url!r} is not the URL of a router; write http://HOST:PORT, without a path")
    return url.rstrip("/")


def _unreachable(url: str, reason: object) -> OSError:
    return ConnectionError(f"cannot reach {url}: is the router running there? ({reason})")


def _batches(ids: Iterable[str]) -> Iterator[list[str]]:
    if isinstance(ids, str):
        raise TypeError(f"ids takes a list of request ids, not the str {ids!r}")
    ids = list(ids)
    for start in range(0, len(ids), _BATCH_MAX):
        yield ids[start : start + _BATCH_MAX]


class RouterTraceClient:
    """Reads the traces of the router at ``url`` over HTTP, blocking.

    Every method raises ``TracingDisabled`` when the router runs without request tracking, ``NotThisRouter``
    when something else answers, ``ValueError`` for a query it refuses, and ``OSError`` when nobody answers.
    """

    def __init__(self, url: str, timeout: float = 30, headers: dict[str, str] | None = None) -> None:
        """``timeout`` in seconds per request; ``headers`` go with every request."""
        self.url = _base(url)
        self._timeout = timeout
        self._headers = dict(headers or {})
        # A router is asked directly, as by the asynchronous client, whatever proxies the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def from_log(cls, path: str | os.PathLike[str]) -> RouterTraceClient:
        """A client that answers from the ``trace_log`` at ``path`` and its older files as they are now, with no router.

        Statistics are of what the log holds, ``None`` where only a running router knows. Lines that break off, as a
        crash leaves them, are left out with a warning.

        Raises:
            OSError: a file cannot be read, ``FileNotFoundError`` if there is none.
            ValueError: a line is not the trace of an ended request; names file and line.
        """
        return _LogClient(path)

    def get_request_trace(self, request_id: str) -> Trace | None:
        """The newest trace with this id; ``None`` if there is none."""
        answer = self._ask(_trace_path(request_id))
        return answer.json_or_none(self.url)

    def batch_get_traces(self, ids: Sequence[str]) -> list[Trace]:
        """The traces of these ids, in their order; unknown ids are left out. Any number of ids."""
        return [
            trace
            for batch in _batches(ids)
            for trace in self._ask("/v1/traces/batch", {"request_ids": batch}).json(self.url, list)
        ]

    def list_recent_traces(self, limit: int | None = 100, **filters: Any) -> list[Trace]:
        """Traces, newest first: at most ``limit`` (``None``: all), filtered as ``GET /v1/traces`` does."""

        def page(pairs: _Pairs) -> _Page:
            answer = self._ask(f"/v1/traces?{urlencode(pairs)}")
            return answer.json(self.url, list), answer.cursor

        return [trace for traces in pages(page, limit, filters) for trace in traces]

    def get_mooncake_trace(self, **filters: Any) -> tuple[str, int]:
        """The requests as a load to replay: lines in the format of Mooncake's traces, and how many traces gave none.

        Needs a router with ``trace_prompt_blocks``; filters as for ``list_recent_traces``.
        """
        return self._ask(_load_path(filters)).load(self.url)

    def get_trace_stats(self) -> dict[str, Any]:
        """Counts since the start and of what is held now."""
        return self._ask("/v1/traces/stats").json(self.url, dict)

    def _ask(self, path: str, body: object = None) -> _Answer:
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", **self._headers} if data else self._headers
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return _Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return _Answer(error.code, error.headers, error.read())
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise error.reason from None
            raise _unreachable(self.url, error.reason) from None


class _LogClient(RouterTraceClient):
    """Reads the traces of a log."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.url = Path(path).absolute().as_uri()
        self._log = _core.TraceLog(path)
        if self._log.torn_lines:
            warnings.warn(f"{os.fspath(path)}: {self._log.torn_lines} lines break off and are left out", stacklevel=3)

    def get_request_trace(self, request_id: str) -> Trace | None:
        text = self._log.trace(request_id)
        return None if text is None else json.loads(text)

    def batch_get_traces(self, ids: Sequence[str]) -> list[Trace]:
        found = (self.get_request_trace(request_id) for batch in _batches(ids) for request_id in batch)
        return [trace for trace in found if trace is not None]

    def list_recent_traces(self, limit: int | None = 100, **filters: Any) -> list[Trace]:
        return listed(self._log, limit, filters)

    def get_mooncake_trace(self, **filters: Any) -> tuple[str, int]:
        return self._log.mooncake(_pairs(filters))

    def get_trace_stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(self._log.trace_stats())
        return stats


class AsyncRouterTraceClient:
    """Reads the traces of the router at ``url`` over HTTP with aiohttp; methods and errors as ``RouterTraceClient``.

    Use it in ``async with``, or call ``close()``.
    """

    def __init__(self, url: str, timeout: float = 30, headers: dict[str, str] | None = None) -> None:
        """``timeout`` in seconds per request; ``headers`` go with every request."""
        self.url = _base(url)
        self._timeout = timeout
        self._headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None

    async def get_request_trace(self, request_id: str) -> Trace | None:
        """The newest trace with this id; ``None`` if there is none."""
        answer = await self._ask(_trace_path(request_id))
        return answer.json_or_none(self.url)

    async def batch_get_traces(self, ids: Sequence[str]) -> list[Trace]:
        """The traces of these ids, in their order; unknown ids are left out. Any number of ids."""
        traces: list[Trace] = []
        for batch in _batches(ids):
            answer = await self._ask("/v1/traces/batch", {"request_ids": batch})
            traces += answer.json(self.url, list)
        return traces

    async def list_recent_traces(self, limit: int | None = 100, **filters: Any) -> list[Trace]:
        """Traces, newest first: at most ``limit`` (``None``: all), filtered as ``GET /v1/traces`` does."""
        found: list[Trace] = []
        queries = page_queries(limit, filters)
        try:
            pairs = next(queries)
            while True:
                answer = await self._ask(f"/v1/traces?{urlencode(pairs)}")
                traces = answer.json(self.url, list)
                found += traces
                pairs = queries.send((traces, answer.cursor))
        except StopIteration:
            return found

    async def get_mooncake_trace(self, **filters: Any) -> tuple[str, int]:
        """The requests as a load to replay: lines in the format of Mooncake's traces, and how many traces gave none."""
        answer = await self._ask(_load_path(filters))
        return answer.load(self.url)

    async def get_trace_stats(self) -> dict[str, Any]:
        """Counts since the start and of what is held now."""
        answer = await self._ask("/v1/traces/stats")
        return answer.json(self.url, dict)

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, path: str, body: object = None) -> _Answer:
        # The blocking client does without it, and starts the faster.
        import aiohttp  # noqa: PLC0415
        from yarl import URL  # noqa: PLC0415

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._timeout)
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        method = "GET" if body is None else "POST"
        # The id in the path is quoted already.
        url = URL(self.url + path, encoded=True)
        try:
            async with self._session.request(method, url, json=body) as response:
                return _Answer(response.status, response.headers, await response.read())
        except asyncio.TimeoutError as error:
            # Before Python 3.11 not an OSError.
            raise TimeoutError(f"{self.url} did not answer within {self._timeout} s") from error
        except aiohttp.ClientConnectorError as error:
            raise _unreachable(self.url, error.os_error) from None
        except aiohttp.ServerDisconnectedError as error:
            # The one end of a connection that aiohttp does not count among the OSErrors.
            raise ConnectionResetError(f"{self.url} closed the connection without an answer") from error
