"""The load generator against workers that answer as the test wants: when requests leave, and what became of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from laboratory import Handler, answers, arrived, requests, service
from running import DEADLINE_SECS, Sim, ask, until
from sglang_router_rs.routing_test import generator
from sglang_router_rs.routing_test.config import ROUTES
from sglang_router_rs.routing_test.exchange import Exchange
from sglang_router_rs.routing_test.generator import Generator, Sent, Target
from sglang_router_rs.routing_test.load import Request
from sglang_router_rs.routing_test.prompts import Text

FRAME = {"text": "a b", "meta_info": {"id": "w", "completion_tokens": 2, "prompt_tokens": 5, "finish_reason": {}}}


def target(url: str, **more: Any) -> Target:
    settings = {"route": "/generate", "model": "m", "stream": True, "ignore_eos": True, "timeout_secs": 60.0, **more}
    return Target(url, **settings)


def send(where: Target, load: Sequence[Request], ended: Callable[[Exchange], object] = lambda _: None) -> Sent:
    return asyncio.run(Generator(where, ended).send(load, [f"r-{number}" for number in range(len(load))]))


def one(handler: Handler, route: str = "/generate", **more: Any) -> Exchange:
    with service({f"POST {route}": handler}) as url:
        return send(target(url, route=route, **more), requests(1)).exchanges[0]


def stream(*chunks: bytes | None) -> Handler:
    """An event stream of these chunks; ``None`` breaks the connection."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            if chunk is None:
                assert request.transport is not None
                request.transport.close()
            else:
                await response.write(chunk)
        return response

    return handler


def data(*frames: object) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(frame).encode() for frame in frames)


DONE = b"data: [DONE]\n\n"


def test_without_a_limit_all_requests_are_in_flight_at_once(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    # None is answered before all have arrived; an answer that does not come delays no arrival.
    load = requests(300, output_length=1, spacing_secs=0.001)
    with Sim("--hang", "--speed", "100", "--request-log", str(log)) as sim:

        async def run() -> list[Sent]:
            halves = [load[::2], load[1::2]]
            sending = [
                asyncio.create_task(Generator(target(url)).send(half, [f"{url} {number}" for number in range(150)]))
                for url, half in zip(sim.urls, halves, strict=True)
            ]
            await asyncio.to_thread(until, lambda: log.exists() and len(arrived(log)) == 300)
            assert not any(task.done() for task in sending)
            assert '"ended"' not in log.read_text()
            for url in sim.urls:
                assert ask(f"{url}/sim/faults", {"hang": False}).status == 200
            return await asyncio.gather(*sending)

        sent = asyncio.run(run())
    exchanges = [exchange for part in sent for exchange in part.exchanges]
    assert len(exchanges) == 300
    assert all(exchange.succeeded for exchange in exchanges)
    last_sent = max(exchange.sent_at or 0.0 for exchange in exchanges)
    assert all((exchange.finished_at or 0.0) > last_sent for exchange in exchanges)


def test_no_more_requests_are_in_flight_than_is_allowed() -> None:
    with Sim("--speed", "50", ports="0") as sim:
        sent = send(target(sim.urls[0], max_concurrency=3), requests(40))
        assert sim.stats()[0]["max_running_seen"] <= 3
        assert sim.stats()[0]["served"] == 40
    assert all(exchange.succeeded for exchange in sent.exchanges)
    # The wait is counted from the arrival, which was the same for all.
    assert max(exchange.sent_at or 0.0 for exchange in sent.exchanges) > min(
        exchange.finished_at or 0.0 for exchange in sent.exchanges
    )


def test_every_request_has_its_own_body_however_many_are_written_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append((await request.json())["text"])
        return web.json_response(FRAME)

    load = requests(20, spacing_secs=0.001)
    for room in (0, 500, 1 << 20):
        monkeypatch.setattr(generator, "PREPARED_BYTES", room)
        with service({"POST /generate": handler}) as url:
            assert all(exchange.body is None for exchange in send(target(url, stream=False), load).exchanges)
        assert sorted(asked) == sorted(request.prompt.text() for request in load)
        asked.clear()


def test_the_start_is_told_once_before_anything_ends() -> None:
    told: list[str] = []
    with service({"POST /generate": answers(FRAME)}) as url:
        sending = Generator(target(url, stream=False), lambda _: told.append("end"), lambda: told.append("start"))
        asyncio.run(sending.send(requests(2), ["a", "b"]))
    assert told == ["start", "end", "end"]


def test_no_request_leaves_before_its_time() -> None:
    with service({"POST /generate": answers(FRAME)}) as url:
        sent = send(target(url, stream=False), requests(30, spacing_secs=0.005))
    assert all((exchange.sent_at or 0.0) >= exchange.request.arrival_time for exchange in sent.exchanges)
    assert [exchange.request_id for exchange in sent.exchanges] == [f"r-{number}" for number in range(30)]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_is_read_whole(route: str, streamed: bool) -> None:
    with Sim("--speed", "100", ports="0") as sim:
        made = send(target(sim.urls[0], route=route, stream=streamed), requests(1, output_length=5)).exchanges[0]
        port = int(sim.urls[0].rpartition(":")[2])
    assert (made.error, made.http_status, made.succeeded) == ("", 200, True)
    assert made.completion_tokens == made.tokens_received == 5
    assert made.answer_id is not None
    assert made.answer_port in ((port,) if route == "/generate" else (port, None))
    assert (made.first_content_at is not None) is streamed
    assert made.sent_at is not None
    assert made.finished_at is not None
    assert made.sent_at <= (made.first_content_at or made.sent_at) <= made.finished_at


def test_headers_of_the_request_and_of_the_answer() -> None:
    seen: list[Any] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((request.headers["x-request-id"], request.headers["authorization"], request.content_type))
        return web.json_response(FRAME, headers={"x-sglang-worker": "http://w:1", "x-sglang-node": "n"})

    made = one(handler, headers={"authorization": "Bearer key"})
    assert seen == [("r-0", "Bearer key", "application/json")]
    assert (made.header_worker, made.header_node) == ("http://w:1", "n")


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([data(FRAME)], "the stream ended before its [DONE]"),
        ([], "the stream ended before its [DONE]"),
        ([data(FRAME), DONE[:-1]], "the stream ended before its [DONE]"),
        ([data(FRAME), DONE, b"data: {"], "the stream ended before its [DONE]"),
        ([data(FRAME), b"data: {half\n\n", DONE], "the answer is not JSON: {half"),
        ([data([1]), DONE], "the answer is not a JSON object: [1]"),
        ([data({"error": {"message": "out of memory"}}), DONE], "out of memory"),
        ([data({"meta_info": 5}), DONE], "the answer has another shape than expected"),
        ([b"data: " + b"[" * 100_000 + b"\n\n", DONE], "the answer is not JSON: [[["),
        ([data(FRAME), None], "ClientPayloadError"),
    ],
)
def test_a_stream_that_is_not_whole_is_a_failure(chunks: list[bytes | None], error: str) -> None:
    made = one(stream(*chunks))
    assert made.error is not None
    assert made.error.startswith(error)
    assert made.http_status == 200
    assert not made.succeeded
    assert made.finished_at is not None


def test_the_tokens_of_a_stream_that_broke_off_are_counted() -> None:
    made = one(stream(data({"meta_info": {"completion_tokens": 2}}), None))
    assert (made.tokens_received, made.completion_tokens, made.succeeded) == (2, None, False)


@pytest.mark.parametrize(
    ("handler", "status", "error"),
    [
        (answers({"error": {"message": "busy"}}, 503), 503, "HTTP 503: busy"),
        (answers("gone", 410), 410, "HTTP 410: gone"),
        (answers([1]), 200, "the answer is not a JSON object: [1]"),
        (answers({"error": "no"}), 200, "no"),
        (stream(None), 200, "ClientPayloadError"),
    ],
)
def test_an_answer_that_is_none_is_a_failure(handler: Handler, status: int, error: str) -> None:
    made = one(handler, stream=False)
    assert made.http_status == status
    assert made.error is not None
    assert made.error.startswith(error)


def test_nobody_there_is_a_failure_of_each_request() -> None:
    with service({}) as url:
        pass
    ended: list[Exchange] = []
    sent = send(target(url), requests(3), ended.append)
    assert len(sent.exchanges) == len(ended) == 3
    for exchange in sent.exchanges:
        assert exchange.http_status is None
        assert exchange.sent_at is None
        assert exchange.error


def test_a_request_without_an_end_is_given_up() -> None:
    async def never(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(DEADLINE_SECS)
        return web.Response()

    made = one(never, timeout_secs=0.05)
    assert made.error == "no end after 0.05 s"


def test_stopping_ends_what_is_in_flight_and_forgets_what_was_not_sent() -> None:
    asked: list[str] = []

    async def never(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers["x-request-id"])
        await asyncio.sleep(DEADLINE_SECS)
        return web.Response()

    async def run(url: str) -> Sent:
        generator = Generator(target(url, max_concurrency=2))
        load = [*requests(5), Request(1e6, 5, 1, Text("late"))]
        sending = asyncio.create_task(generator.send(load, [f"r-{number}" for number in range(6)]))
        await asyncio.to_thread(until, lambda: len(asked) == 2)
        generator.stop()
        return await sending

    with service({"POST /generate": never}) as url:
        sent = asyncio.run(run(url))
    assert sent.interrupted
    assert [exchange.request_id for exchange in sent.exchanges] == ["r-0", "r-1"]
    assert {exchange.error for exchange in sent.exchanges} == {"interrupted before its end"}
