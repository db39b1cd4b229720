"""The worker where one more request is worth most, by what its latest requests earned and took.

With n requests in flight a worker is worth ``throughput * ln(1 + n) - PRICE * latency / load * n**2 / 2``: each further
request earns less than the one before and keeps all others waiting longer. What one more is worth is the derivative at
n + 1. Throughput (tokens a second), latency (seconds) and load (requests in flight on average, by Little's law) are
those of a window of the latest requests that ended there. Needs ``--enable-request-tracking``.

python -m sglang_router_rs replay TRACE --policy examples/policies/marginal_utility.py:MarginalUtility
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sglang_router_rs import RequestView, WorkerView

# Requests in a window.
WINDOW = 64

# Fewer say nothing yet.
WINDOW_MIN = 8

# Tokens a second that a second of everybody's latency is worth.
PRICE = 100.0


class Ended(NamedTuple):
    """A request that is over."""

    at_secs: float
    took_secs: float
    tokens: int


class MarginalUtility:
    """The policy."""

    def __init__(self) -> None:
        # finished() is called by another thread than choose().
        self._lock = threading.Lock()
        self._windows: defaultdict[str, deque[Ended]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def choose(self, _request: RequestView, workers: Sequence[WorkerView]) -> int:
        """The place of the worker where one more is worth most; of one that is hardly known, if there is one."""
        with self._lock:
            known = {worker.url: self._windows[worker.url] for worker in workers}
            unknown = [place for place, worker in enumerate(workers) if len(known[worker.url]) < WINDOW_MIN]
            if unknown:
                return min(unknown, key=lambda place: workers[place].in_flight)
            worths = [worth(known[worker.url], worker.in_flight + 1) for worker in workers]
        return max(range(len(workers)), key=lambda place: worths[place])

    def finished(self, record: Mapping[str, Any]) -> None:
        """Notes what a request earned and took."""
        if record["status"] != "completed" or record["latency_ms"] is None:
            return
        ended_at = datetime.fromisoformat(record["completion_time"].removesuffix("Z") + "+00:00").timestamp()
        ended = Ended(ended_at, record["latency_ms"] / 1000, record["completion_tokens"] or 0)
        with self._lock:
            self._windows[record["worker_url"]].append(ended)


def worth(window: Sequence[Ended], in_flight: int) -> float:
    """What the last of so many requests in flight is worth, in tokens a second."""
    span_secs = max(1e-3, window[-1].at_secs - window[0].at_secs)
    throughput = sum(ended.tokens for ended in window) / span_secs
    together_secs = sum(ended.took_secs for ended in window)
    latency_secs, load = together_secs / len(window), max(1.0, together_secs / span_secs)
    return throughput / (1 + in_flight) - PRICE * latency_secs / load * in_flight
