"""SIGINT, SIGTERM and SIGHUP, which end a run in good order.

Python's own KeyboardInterrupt may come between the start of a process and the note that it was started. Here a signal
is noticed at a wait only, so that whatever has begun is ended, and what was measured is saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What a signal does now: the last one.
_stops: list[Callable[[], object]] = []


def _stop() -> None:
    _stops[-1]()


@contextlib.contextmanager
def interrupted_by(stop: Callable[[], object]) -> Iterator[None]:
    """Within the block signals call ``stop``, and nothing else. Off the main thread they are somebody else's."""
    loop = asyncio.get_running_loop()
    earlier = {number: signal.getsignal(number) for number in NUMBERS}
    is_outermost = not _stops
    _stops.append(stop)
    try:
        if is_outermost:
            with contextlib.suppress(ValueError, RuntimeError):
                for number in NUMBERS:
                    loop.add_signal_handler(number, _stop)
        yield
    finally:
        _stops.pop()
        if is_outermost:
            with contextlib.suppress(ValueError, RuntimeError):
                for number, handler in earlier.items():
                    if loop.remove_signal_handler(number):
                        signal.signal(number, handler)


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """The work, which a signal cancels at its next wait.

    Raises:
        KeyboardInterrupt: a signal came.
    """
    task = asyncio.ensure_future(work)
    was_signalled = False

    def stop() -> None:
        nonlocal was_signalled
        was_signalled = True
        task.cancel()

    with interrupted_by(stop):
        try:
            return await task
        except asyncio.CancelledError:
            if was_signalled:
                raise KeyboardInterrupt from None
            raise
