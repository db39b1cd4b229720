"""The verdicts of tools/overload.py and tools/disconnects.py: what must hold, and what each rule is there to find."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import disconnects
import overload
import pytest
from trial import Rule, percentile

STAMP = "2026-01-01T00:00:00.000000Z"
BEGAN = overload.begin({"timestamp": STAMP})
SETTINGS = argparse.Namespace(factor=2.0, cap=2)


def against(rules: list[Rule]) -> list[str]:
    return [rule.name for rule in rules if rule.against]


class Overload:
    """A capacity of 2 per second, and then 4 per second of which every other one is refused."""

    def __init__(self) -> None:
        self.traces: dict[str, dict[str, Any]] = {}
        self.at_workers = [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)]
        self.calm = self.phase("calm", 0, [200] * 20)
        self.storm = self.phase("storm", 100, [200, 429] * 20)

    def phase(self, name: str, since: float, statuses: list[int]) -> Any:
        """Ten seconds of evenly sent requests; the first of each second of 200s waits, all take a second."""
        exchanges = []
        for number, status in enumerate(statuses):
            exchange = overload.Exchange(f"{name}-{number}", True, status)
            second = 10 * number / len(statuses)
            at = f"2026-01-01T00:{int(since + second) // 60:02}:{(since + second) % 60:09.6f}Z"
            is_refused = status == 429
            self.traces[exchange.id] = {
                "timestamp": at,
                "queue_ms": 0.0,
                "latency_ms": 1.0 if is_refused else 1000.0,
                "status": "failed" if is_refused else "completed",
                "http_status": status,
            }
            exchanges.append(exchange)
        return overload.Phase(name, BEGAN + since, BEGAN + since + 10, exchanges)

    def against(self) -> list[str]:
        return against(overload.judge(SETTINGS, self.calm, self.storm, self.traces, self.at_workers))


def refuse_late(run: Overload) -> None:
    for trace in run.traces.values():
        if trace["http_status"] == 429:
            trace["latency_ms"] = 51.0


def lose_goodput(run: Overload) -> None:
    for number in range(0, 40, 10):
        trace = run.traces[f"storm-{number}"]
        trace.update(status="failed", http_status=429, latency_ms=1.0)
        run.storm.exchanges[number].status = 429


def test_a_storm_that_was_weathered_passes() -> None:
    assert Overload().against() == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda run: run.storm.exchanges.__delitem__(slice(3, None)), "the load was 2 x capacity"),
        (lambda run: vars(run.storm.exchanges[0]).update(wrong="no end"), "every request was answered"),
        (lambda run: run.traces.pop("storm-1"), "traces say what clients saw"),
        (lambda run: run.traces["storm-0"].update(status="failed"), "traces say what clients saw"),
        (lambda run: run.traces["storm-4"].update(latency_ms=1600.0), "at most 2 were in flight"),
        (lambda run: run.at_workers.append((0.7, 0.8)), "at most 2 were at the workers"),
        (refuse_late, "p99 of a refusal"),
        (lose_goodput, "goodput"),
    ],
)
def test_what_a_storm_broke_is_told(change: Callable[[Overload], Any], rule: str) -> None:
    run = Overload()
    change(run)
    assert any(rule in name for name in run.against()), run.against()


def test_the_most_at_once_counts_spans_that_overlap() -> None:
    assert overload.most_at_once([]) == 0
    assert overload.most_at_once([(0, 1), (1, 2)]) == 1
    assert overload.most_at_once([(0, 1.5), (1, 2), (1.2, 3)]) == 3
    assert overload.most_at_once([(0, 1.5), (1, 2)], slack_secs=1) == 1


def line(event: str, request_id: str, at: float, ending: str | None = None) -> dict[str, Any]:
    return {"event": event, "request_id": request_id, "at": at, "port": 1, "ending": ending}


def test_a_request_that_never_ended_stays_at_its_worker() -> None:
    log = [line("arrived", "a", 1), line("arrived", "b", 2), line("ended", "a", 3, "completed")]
    assert list(overload.at_the_workers(log)) == [(1, 3), (2, float("inf"))]


class Disconnects:
    """Three clients of one worker: one leaves its answer, one its prefill, one its queue, each told 10 ms later."""

    def __init__(self) -> None:
        prefill = disconnects.PREFILL_SECS
        leaves = {"answer": prefill + 0.8, "prefill": prefill + 0.5, "queue": prefill + 0.1}
        self.clients, self.log, self.traces = [], [], {}
        for number, (name, at) in enumerate(leaves.items()):
            self.clients.append(disconnects.Client(name, number, True, 0, at, 9, left_at=at))
            self.log.append(line("arrived", name, number / 100))
            self.log.append(line("ended", name, at + 0.01, "cut_off"))
            self.traces[name] = {"status": "failed", "error_message": "client disconnected"}
        self.log.sort(key=lambda line: line["at"])

    def against(self) -> list[str]:
        return against(disconnects.judge(self.clients, self.traces, disconnects.visits(self.log), 0.0))


def test_clients_that_were_noticed_pass() -> None:
    run = Disconnects()
    assert run.against() == []
    places = {name: visit.place for name, visit in disconnects.visits(run.log).items()}
    assert places == {"answer": "answer", "prefill": "prefill", "queue": "queue"}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda run: vars(run.clients[0]).update(wrong="ended"), "no answer ended"),
        (lambda run: run.log.pop(), "every worker was told"),
        (lambda run: run.log[-1].update(ending="completed"), "every worker was told"),
        (lambda run: run.log[-1].update(at=9.0), "p99 from close"),
        (lambda run: run.traces.pop("queue"), "every trace says"),
        (lambda run: run.traces["queue"].update(error_message="timeout"), "every trace says"),
    ],
)
def test_a_client_that_was_not_noticed_is_told(change: Callable[[Disconnects], Any], rule: str) -> None:
    run = Disconnects()
    change(run)
    assert any(rule in name for name in run.against()), run.against()


def test_who_left_at_once_may_have_no_trace() -> None:
    run = Disconnects()
    run.clients.append(disconnects.Client("hasty", 3, True, 0, 0.001, 9, left_at=1))
    assert run.against() == []
    run.clients[-1].stays_secs = 1
    assert run.against() == ["every trace says that the client disconnected"]


def test_percentiles_are_by_nearest_rank() -> None:
    assert [percentile(range(1, 101), percent) for percent in (50, 99, 100)] == [50, 99, 100]
    assert percentile([7], 1) == 7
