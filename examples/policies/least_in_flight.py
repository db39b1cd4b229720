"""The worker with the fewest requests in flight.

python -m sglang_router_rs launch --policy examples/policies/least_in_flight.py:choose --worker-urls ...
"""

from collections.abc import Sequence

from sglang_router_rs import RequestView, WorkerView


def choose(_request: RequestView, workers: Sequence[WorkerView]) -> int:
    """The place of the first of the least busy workers."""
    return min(range(len(workers)), key=lambda place: workers[place].in_flight)
