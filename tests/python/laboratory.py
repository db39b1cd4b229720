"""What the tests of the routing laboratory share: `bench` as a call, what workers were sent, scripted services."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from aiohttp import web
from sglang_router_rs.routing_test import bench as command
from sglang_router_rs.routing_test.load import Request
from sglang_router_rs.routing_test.prompts import Text

# A small load that leaves at once.
LOAD = ("--num-requests=20", "--request-rate=inf", "--input-len=20", "--output-len=4", "--warmup=3")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Bench:
    """What a run of `bench` said, and what it left behind."""

    status: int
    out: str
    err: str
    output: Path

    @property
    def rows(self) -> pd.DataFrame:
        return pd.read_csv(self.output, dtype={"sglang_queue_time": float})

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self.output.with_suffix(".summary.json").read_text())
        return summary


def bench(output: Path, *flags: str) -> Bench:
    """`python -m sglang_router_rs bench`, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = command.main([*flags, f"--output={output}"])
        except SystemExit as end:
            status = int(end.code or 0)
    return Bench(status, out.getvalue(), err.getvalue(), output)


def arrived(log: Path) -> dict[str, int]:
    """The port that each request arrived at, by id, from the workers' own log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    asked = [(line["request_id"], line["port"]) for line in lines if line["event"] == "arrived" and line["request_id"]]
    assert len(asked) == len({name for name, _ in asked}), "an id was used twice, or sent to two workers"
    return dict(asked)


def requests(count: int, output_length: int = 4, spacing_secs: float = 0.0) -> list[Request]:
    """Requests that arrive one after the other."""
    return [Request(number * spacing_secs, 5, output_length, Text(f"prompt {number}")) for number in range(count)]


@contextmanager
def service(routes: Mapping[str, Handler]) -> Iterator[str]:
    """A server with these handlers by "METHOD /path", on a free port; all else is 404."""
    loop = asyncio.new_event_loop()
    app = web.Application()
    for route, handler in routes.items():
        method, path = route.split()
        app.router.add_route(method, path, handler)

    async def start() -> web.AppRunner:
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = loop.run_until_complete(start())
    serving = threading.Thread(target=loop.run_forever)
    serving.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        serving.join()
        loop.close()


def answers(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Handler:
    """A handler that answers this as JSON."""

    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.json_response(value, status=status, headers=headers)

    return handler
