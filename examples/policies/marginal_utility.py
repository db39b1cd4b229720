"""The worker where one more request is worth most: the throughput it adds for the latency it adds.

A request that is sent to a worker adds its tokens to what is done there. It waits for the prompts before it and for its
own, and it makes those in flight there wait for its own: seconds, by the worker's throughput in a window of the latest
requests that ended there. The worth is the one divided by the other. What others wait is an external cost (Pigou 1920):
who counts it sends a prompt rather to where it is cached, though it may wait a little longer there itself.

Needs ``--enable-request-tracking`` and streams, as only those have a first token.

python -m sglang_router_rs replay TRACE --policy examples/policies/marginal_utility.py:MarginalUtility
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_router_rs import RequestView, WorkerView

# Requests in a window.
WINDOW = 64

# Fewer say nothing yet.
WINDOW_MIN = 8

# A second that others wait, in seconds of the request itself. They have begun and may be decoding, which a prompt only
# slows down.
OTHERS = 0.3

# A worker that was not shown for that long is forgotten.
FORGOTTEN_SECS = 600.0

# Most requests under way that are remembered.
REMEMBERED_MAX = 10_000


class Window:
    """What the latest requests at a worker show."""

    def __init__(self) -> None:
        self.shown_at_secs = 0.0
        # Of each request, the tokens that were to be computed until its first token, and the seconds that took.
        self.ended: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    @property
    def throughput(self) -> float | None:
        """Tokens a second; ``None`` while too little is known."""
        secs = sum(took_secs for _, took_secs in self.ended)
        return sum(tokens for tokens, _ in self.ended) / secs if len(self.ended) >= WINDOW_MIN and secs else None


class MarginalUtility:
    """The policy."""

    def __init__(self) -> None:
        # finished() is called by another thread than choose().
        self._lock = threading.Lock()
        # By URL.
        self._windows: dict[str, Window] = {}
        # Tokens before the first one, by request.
        self._under_way: OrderedDict[str, int] = OrderedDict()

    def choose(self, request: RequestView, workers: Sequence[WorkerView]) -> int:
        """The place of the worker where one more is worth most."""
        with self._lock:
            throughputs = filled([window.throughput for window in self._shown(request.at_secs, workers)])
            place = max(range(len(workers)), key=lambda place: worth(request, workers[place], throughputs[place]))
            if request.request_id is not None:
                self._under_way[request.request_id] = ahead(request, workers[place])
                if len(self._under_way) > REMEMBERED_MAX:
                    self._under_way.popitem(last=False)
        return place

    def finished(self, record: Mapping[str, Any]) -> None:
        """Notes what a request waited for, and how long."""
        with self._lock:
            tokens = self._under_way.pop(record["request_id"], None)
            window = self._windows.get(record["worker_url"])
            if tokens is not None and window is not None and record["ttft_ms"] is not None:
                window.ended.append((tokens, record["ttft_ms"] / 1000))

    def _shown(self, at_secs: float, workers: Sequence[WorkerView]) -> list[Window]:
        shown = [self._windows.setdefault(worker.url, Window()) for worker in workers]
        for window in shown:
            window.shown_at_secs = at_secs
        # One that is only not shown to this request keeps what is known of it.
        for url in [url for url, window in self._windows.items() if at_secs - window.shown_at_secs > FORGOTTEN_SECS]:
            del self._windows[url]
        return shown


def filled(throughputs: Sequence[float | None]) -> list[float]:
    """Those that are not known are taken to be like the others."""
    known = [throughput for throughput in throughputs if throughput is not None]
    mean = sum(known) / len(known) if known else 1.0
    return [mean if throughput is None else throughput for throughput in throughputs]


def worth(request: RequestView, worker: WorkerView, throughput: float) -> float:
    """Tokens that a request adds for each second of latency that it adds."""
    for_others = OTHERS * worker.in_flight * uncached(request, worker)
    return request.tokens * throughput / max(1.0, ahead(request, worker) + for_others)


def ahead(request: RequestView, worker: WorkerView) -> int:
    """Tokens to be computed until the request's first token."""
    return worker.pending_tokens + uncached(request, worker)


def uncached(request: RequestView, worker: WorkerView) -> int:
    """Tokens of the prompt that are not in the worker's cache."""
    return request.tokens - worker.matched_tokens
