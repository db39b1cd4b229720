"""The worker where the first token is expected soonest, by weights that learn from every answer.

The expected time to the first token is a weighted sum of what is known of a worker: tokens of the prompt it has not
cached, tokens that wait there, requests in flight. When the answer is over, the weights move towards what would have
been right, by the normalised least mean squares rule (Widrow and Hoff 1960). Needs ``--enable-request-tracking`` and
streams, as only those have a first token.

python -m sglang_router_rs replay TRACE --policy examples/policies/tuned_by_feedback.py:TunedByFeedback
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_router_rs import RequestView, WorkerView

# How far the weights move towards what one answer says, 0 to 1.
RATE = 0.02

# Most requests under way that are remembered.
REMEMBERED_MAX = 10_000


class TunedByFeedback:
    """The policy."""

    def __init__(self) -> None:
        # finished() is called by another thread than choose().
        self._lock = threading.Lock()
        # Milliseconds for each of `known`.
        self.weights = [10.0, 100.0, 100.0, 100.0]
        self._chosen: OrderedDict[str, list[float]] = OrderedDict()

    def choose(self, request: RequestView, workers: Sequence[WorkerView]) -> int:
        """The place of the worker where the first token is expected soonest."""
        with self._lock:
            all_known = [known(request, worker) for worker in workers]
            place = min(range(len(workers)), key=lambda place: self._expected_ms(all_known[place]))
            if request.request_id is not None:
                self._chosen[request.request_id] = all_known[place]
                if len(self._chosen) > REMEMBERED_MAX:
                    self._chosen.popitem(last=False)
        return place

    def finished(self, record: Mapping[str, Any]) -> None:
        """Moves the weights towards what would have been right."""
        with self._lock:
            chosen = self._chosen.pop(record["request_id"], None)
            if chosen is None or record["ttft_ms"] is None:
                return
            error_ms = record["ttft_ms"] - self._expected_ms(chosen)
            step = RATE * error_ms / sum(value * value for value in chosen)
            # More of anything never makes it faster.
            self.weights = [max(0.0, weight + step * value) for weight, value in zip(self.weights, chosen, strict=True)]

    def _expected_ms(self, values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))


def known(request: RequestView, worker: WorkerView) -> list[float]:
    """What a worker's time to the first token may depend on, each of about the same size."""
    uncached = request.tokens - worker.matched_tokens
    return [1.0, uncached / 1000, worker.pending_tokens / 1000, worker.in_flight / 4]
