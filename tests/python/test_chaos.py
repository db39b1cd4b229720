"""The verdict of tools/chaos.py: records that agree pass, and each kind of disagreement is told by its own rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import pytest

A, B = "http://127.0.0.1:1", "http://127.0.0.1:2"


class Worker(chaos.Worker):
    """A worker of which only the deaths are known."""

    def __init__(self, *downs: tuple[float, float]) -> None:
        self.downs = [chaos.Down(*down) for down in downs]


def trace(exchange: Any, *attempts: str) -> dict[str, Any]:
    is_whole = exchange.outcome == chaos.WHOLE
    return {
        "status": "completed" if is_whole else "failed",
        "worker_url": exchange.worker,
        "route": exchange.path,
        "stream": exchange.streamed,
        "http_status": exchange.status,
        "completion_tokens": exchange.tokens,
        "error_message": None if is_whole else "broke off",
        "attempts": [{"worker_url": url} for url in attempts],
    }


class Run:
    """Two requests sent to A, which died at second 100: one was retried on B, the other one's stream broke."""

    def __init__(self) -> None:
        def exchange(name: str, worker: str, outcome: str) -> Any:
            return chaos.Exchange(name, "/generate", True, 4, "p", 99, 101, 200, worker, outcome)

        self.retried, self.broken = exchange("r", B, chaos.WHOLE), exchange("b", A, chaos.REPORTED)
        self.traces = {"r": trace(self.retried, A, B), "b": trace(self.broken, A)}
        self.logs = chaos.WorkerLogs([])
        self.logs.arrivals.update({("r", A): 1, ("r", B): 1, ("b", A): 1})
        self.logs.answers["r"] = [(100.5, B)]
        self.workers = {A: Worker((100, 101)), B: Worker()}

    def against(self) -> dict[str, list[str]]:
        records = chaos.Records([self.retried, self.broken], self.traces, self.logs, self.workers)
        return {rule.name: rule.against for rule in records.rules() if rule.against}


def set_trace(name: str, **values: Any) -> Callable[[Run], None]:
    return lambda run: run.traces[name].update(values)


def set_exchange(name: str, **values: Any) -> Callable[[Run], None]:
    return lambda run: vars(getattr(run, name)).update(values)


def test_records_that_agree_pass() -> None:
    run = Run()
    assert run.against() == {}
    # What was on its way to a worker that died may not have come.
    run.logs.arrivals["b", A] = 0
    assert run.against() == {}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (set_exchange("retried", wrongs=["answers x"]), "each id has one answer"),
        (set_exchange("broken", outcome=chaos.SILENT), "was reported to its client"),
        (set_exchange("broken", sent_at=103, ended_at=104), "only when its worker died"),
        (lambda run: run.traces.pop("b"), "every trace is there"),
        (set_trace("b", status="completed"), "say what clients saw"),
        (set_trace("b", error_message=None), "say what clients saw"),
        (set_trace("r", completion_tokens=3), "say what clients saw"),
        (set_trace("r", http_status=502), "say what clients saw"),
        (set_trace("r", attempts=[{"worker_url": B}, {"worker_url": A}]), "say what clients saw"),
        (lambda run: run.logs.answers.clear(), "the worker in a trace answered"),
        (lambda run: run.logs.arrivals.pop(("r", B)), "every attempt in a trace arrived"),
        (lambda run: run.logs.arrivals.update({("r", B): 1}), "every arrival at a worker is an attempt"),
        (lambda run: run.logs.answers["r"].append((101.5, A)), "answered by two workers"),
    ],
)
def test_each_disagreement_is_told(change: Callable[[Run], Any], rule: str) -> None:
    run = Run()
    change(run)
    assert any(rule in name for name in run.against()), run.against()


def test_a_failed_request_is_told() -> None:
    run = Run()
    run.broken.ended(chaos.FAILED, "status 503")
    run.broken.ended_at = 101
    assert list(run.against()) == ["no request failed that had not begun to stream"]


def stream(path: str, events: list[bytes]) -> Any:
    exchange = chaos.Exchange("r", path, True, 2, "p")
    story = chaos.Story(exchange, " the old fox")
    for event in events:
        story.take(event)
    story.end()
    return exchange


def frame(text: str, answered: str = "r") -> bytes:
    return b'data: {"text": "%s", "meta_info": {"id": "%s"}}' % (text.encode(), answered.encode())


def delta(text: str) -> bytes:
    return b'data: {"id": "r", "choices": [{"delta": {"content": "%s"}}]}' % text.encode()


DONE, ERROR = b"data: [DONE]", b'data: {"error": {"message": "died"}}'


@pytest.mark.parametrize(
    ("path", "events", "outcome"),
    [
        ("/generate", [frame(" the"), frame(" the old"), DONE], chaos.WHOLE),
        ("/v1/chat/completions", [delta(""), delta(" the"), delta(" old"), delta(""), DONE], chaos.WHOLE),
        ("/generate", [frame(" the"), ERROR], chaos.REPORTED),
        ("/generate", [frame(" the")], chaos.SILENT),
    ],
)
def test_streams_in_order(path: str, events: list[bytes], outcome: str) -> None:
    exchange = stream(path, events)
    assert (exchange.outcome, exchange.wrongs) == (outcome, [])


@pytest.mark.parametrize(
    ("path", "events"),
    [
        ("/generate", [frame(" the"), DONE]),
        ("/generate", [frame(" the old")]),
        ("/generate", [frame(" the"), frame(" old")]),
        ("/generate", [frame(" the", "another"), frame(" the old"), DONE]),
        ("/generate", [frame(" the"), ERROR, DONE]),
        ("/generate", [frame(" the"), frame(" the old"), DONE, ERROR]),
        ("/v1/chat/completions", [delta(" the"), delta(" the"), delta(" old"), DONE]),
    ],
)
def test_streams_out_of_order_are_told(path: str, events: list[bytes]) -> None:
    assert stream(path, events).wrongs


def test_memory_that_grows_is_told() -> None:
    memory = chaos.Memory(0, Path())
    memory.samples = [(float(t), 1000.0 + 2 * max(t, 50)) for t in range(100)]
    assert memory.slope() == pytest.approx(2)
