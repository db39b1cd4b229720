"""The witnesses of who served a request: each is heard, and none is overruled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from laboratory import requests
from sglang_router_rs.client import AsyncRouterTraceClient, Trace
from sglang_router_rs.routing_test import attribution
from sglang_router_rs.routing_test.attribution import NO_HEADER
from sglang_router_rs.routing_test.exchange import Exchange
from sglang_router_rs.routing_test.results import row as row_of

URL = "http://127.0.0.1:30005"


def exchange(**more: Any) -> Exchange:
    """A request that succeeded, and whose witnesses agree with ``trace()``."""
    made = Exchange("r-1", requests(1)[0])
    facts = {
        "http_status": 200,
        "error": "",
        "header_worker": URL,
        "header_node": "gpu_4",
        "answer_id": "w-1",
        "answer_port": 30005,
        **more,
    }
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def trace(**more: Any) -> Trace:
    return {
        "request_id": "r-1",
        "worker_url": URL,
        "node_id": "gpu_4",
        "routing_policy": "cache_aware",
        "status": "completed",
        "reason": "prefix_match",
        "matched_tokens": 512,
        "queue_ms": 0.1,
        "ttft_ms": 41.0,
        "latency_ms": 93.0,
        "error_message": None,
        "worker_request_id": "w-1",
        "attempts": [{}, {}],
        "candidates": None,
        **more,
    }


REFUSED = {"http_status": 503, "error": "HTTP 503: no worker", "header_worker": None, "header_node": None}
REFUSED_TRACE = {"worker_url": None, "node_id": None, "status": "failed", "reason": None, "attempts": []}
NO_ANSWER = {"answer_id": None, "answer_port": None}


def problems(seen: Exchange, known: Trace | None) -> list[str]:
    found = list(attribution.disagreements(seen, known))
    assert {one.req_id for one in found} <= {"r-1"}
    return [one.problem for one in found]


@pytest.mark.parametrize(
    ("seen", "known"),
    [
        (exchange(), trace()),
        (exchange(), trace(same_id=1)),
        # What a witness does not say is no contradiction.
        (exchange(**NO_ANSWER, header_node=None), trace()),
        (exchange(), trace(worker_request_id=None)),
        # Refused before a pick.
        (exchange(**REFUSED, **NO_ANSWER), trace(**REFUSED_TRACE)),
        # A worker's error, and an answer that broke off.
        (exchange(http_status=500, error="HTTP 500: oh"), trace(status="failed")),
        (exchange(error="the stream ended before its [DONE]"), trace(status="failed")),
        # The router saw more of it than the client.
        (exchange(error="no end after 1 s"), trace()),
        # Never reached the router.
        (exchange(**{**REFUSED, "http_status": None}, **NO_ANSWER), None),
    ],
)
def test_witnesses_that_agree(seen: Exchange, known: Trace | None) -> None:
    assert problems(seen, known) == []


@pytest.mark.parametrize(
    ("seen", "known", "told"),
    [
        ({"header_worker": "http://127.0.0.1:30006"}, {}, "worker: the header says http://127.0.0.1:30006"),
        ({"header_node": "gpu_5"}, {}, "node: the header says gpu_5, the trace gpu_4"),
        ({"answer_id": "w-2"}, {}, "id of the answer: the answer says w-2, the trace w-1"),
        ({"answer_port": 30006}, {}, "port of the worker: the answer says 30006, the trace 30005"),
        ({}, {"worker_url": "http://127.0.0.1:30006"}, "worker: the header says " + URL),
        ({}, {"node_id": "gpu_5"}, "node: the header says gpu_4, the trace gpu_5"),
        ({}, {"same_id": 2}, "the router saw 2 requests with this id"),
        ({}, {"status": "failed", "error_message": "client gone"}, "but the trace says failed: client gone"),
        ({}, {"status": "processing"}, "but the trace says processing"),
        ({"header_worker": None}, {}, NO_HEADER),
        # Also of a request that failed.
        ({"header_worker": "http://w", "error": "HTTP 500: oh", "http_status": 500}, {"status": "failed"}, "http://w"),
        ({"error": "HTTP 500: oh", "http_status": 500}, {"status": "failed", "same_id": 3}, "3 requests"),
    ],
)
def test_each_witness_is_heard(seen: dict[str, Any], known: dict[str, Any], told: str) -> None:
    found = problems(exchange(**seen), trace(**known))
    assert any(told in problem for problem in found), found


def test_an_answer_without_a_trace_is_not_attributed() -> None:
    for seen in (exchange(), exchange(error="HTTP 500: oh", http_status=500), exchange(**REFUSED)):
        assert problems(seen, None) == ["the router has no trace of it"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, []),
        ({"own": 1}, []),
        ({"gpu_id": "gpu_5"}, ["gpu_id: the row says gpu_5, the trace gpu_4"]),
        ({"worker_url": None}, [f"worker_url: the row says None, the trace {URL}"]),
    ],
)
def test_what_an_analysis_wrote_into_the_row_is_checked_too(changed: dict[str, Any], told: list[str]) -> None:
    row = row_of(exchange())
    attribution.fill(row, trace())
    seen = {**row, **changed}
    found = attribution.restore([exchange()], [seen], {"r-1": trace()})
    assert [(one.req_id, one.problem) for one in found] == [("r-1", problem) for problem in told]
    # And taken back; what is the analysis' own stays.
    assert {name: seen[name] for name in row} == row
    assert seen.get("own") == changed.get("own")
    assert list(attribution.restore([exchange()], [{}], {})) == []


def test_a_row_is_filled_from_its_trace() -> None:
    row = row_of(exchange())
    assert list(attribution.by_traces([exchange()], [row], {"r-1": trace()})) == []
    told = {
        "worker_url": URL,
        "node_id": "gpu_4",
        "gpu_id": "gpu_4",
        "routing_policy": "cache_aware",
        "trace_status": "completed",
        "reason": "prefix_match",
        "matched_tokens": 512,
        "attempts": 2,
        "router_queue_ms": 0.1,
        "router_ttft_ms": 41.0,
        "router_latency_ms": 93.0,
    }
    assert row.items() >= told.items()


def test_a_request_that_no_worker_was_picked_for_stays_without_one() -> None:
    seen = exchange(**REFUSED, **NO_ANSWER)
    row = row_of(seen)
    assert list(attribution.by_traces([seen], [row], {"r-1": trace(**REFUSED_TRACE)})) == []
    assert [row[name] for name in ("worker_url", "node_id", "gpu_id", "reason")] == [None] * 4
    assert row["attempts"] == 0


def test_rows_are_joined_by_id_and_never_by_position() -> None:
    exchanges = [
        exchange(request_id=f"r-{number}", header_worker=f"http://w:{number}", **NO_ANSWER) for number in (1, 2)
    ]
    rows = [row_of(one) for one in exchanges]
    traces = {f"r-{number}": trace(request_id=f"r-{number}", worker_url=f"http://w:{number}") for number in (2, 1)}
    assert list(attribution.by_traces(exchanges, rows, traces)) == []
    assert [row["worker_url"] for row in rows] == ["http://w:1", "http://w:2"]


def test_without_tracking_the_headers_are_the_only_witness() -> None:
    exchanges = [exchange(), exchange(request_id="r-2", header_worker=None), exchange(request_id="r-3", **REFUSED)]
    rows = [row_of(one) for one in exchanges]
    assert list(attribution.by_headers(exchanges, rows)) == [("r-2", NO_HEADER)]
    assert (rows[0]["worker_url"], rows[0]["gpu_id"]) == (URL, "gpu_4")
    assert rows[2]["worker_url"] is None


def test_a_worker_that_is_asked_directly_may_not_name_another() -> None:
    rows = [row_of(exchange())]
    assert list(attribution.by_address([exchange()], rows, URL)) == []
    assert list(attribution.by_address([exchange(header_worker=None)], rows, URL)) == []
    assert rows[0]["worker_url"] == URL
    (found,) = attribution.by_address([exchange()], rows, "http://127.0.0.1:30001")
    assert URL in found.problem


def test_decisions_are_a_row_per_candidate() -> None:
    candidates = [{"worker_url": f"http://w:{number}", "node_id": f"gpu_{number}", "score": 1.0} for number in (1, 2)]
    rows = attribution.decisions({"r-1": trace(candidates=candidates), "r-2": trace(candidates=None)})
    assert [(row["req_id"], row["reason"], row["node_id"]) for row in rows] == [
        ("r-1", "prefix_match", "gpu_1"),
        ("r-1", "prefix_match", "gpu_2"),
    ]


class Client(AsyncRouterTraceClient):
    """Traces that end when they were asked for some times."""

    def __init__(self, looks: dict[str, int]) -> None:
        self.looks, self.pages = looks, list[int]()

    async def batch_get_traces(self, ids: Sequence[str]) -> list[Trace]:
        self.pages.append(len(ids))
        found = []
        for name in ids:
            if name in self.looks:
                self.looks[name] -= 1
                status = "processing" if self.looks[name] > 0 else "completed"
                found.append(trace(request_id=name, status=status))
        return found


def test_traces_are_asked_for_in_pages_until_they_have_ended() -> None:
    ids = [f"r-{number}" for number in range(2500)]
    client = Client({name: 3 if name == "r-7" else 1 for name in ids[:-1]})
    traces = asyncio.run(attribution.fetch(client, ids))
    assert list(traces) == ids[:-1]
    assert {known["status"] for known in traces.values()} == {"completed"}
    # What has ended, or is not known, is not asked for again.
    assert client.pages == [1000, 1000, 500, 1, 1]


def test_a_trace_that_does_not_end_is_given_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "SETTLE_SECS", 0.1)
    traces = asyncio.run(attribution.fetch(Client({"r-1": 10**9}), ["r-1"]))
    assert traces["r-1"]["status"] == "processing"
    assert asyncio.run(attribution.fetch(Client({}), [])) == {}
