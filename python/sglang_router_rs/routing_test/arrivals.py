"""When requests arrive: seconds from the first arrival, ascending, the first exactly 0.

Pure functions. Everything random comes from the generator that is given, so that one seed is one schedule. A drawn
schedule has its rate on average; the span of a single draw is what it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


def poisson(count: int, rate: float, draw: np.random.Generator) -> Times:
    """Independent arrivals: gaps are drawn from the exponential distribution with mean 1/``rate`` (per second)."""
    return bursts(count, rate, 1, draw)


def constant(count: int, rate: float) -> Times:
    """An arrival every 1/``rate`` seconds."""
    return np.arange(count) / rate


def bursts(count: int, rate: float, size: int, draw: np.random.Generator) -> Times:
    """``size`` arrivals at once, at Poisson moments that make ``rate`` arrivals per second.

    The last burst may be smaller. At an infinite rate all arrive at once.
    """
    if math.isinf(rate):
        return np.zeros(count)
    moments = math.ceil(count / size)
    gaps = draw.exponential(size / rate, moments)
    gaps[:1] = 0
    return np.repeat(np.cumsum(gaps), size)[:count]


def recorded(times: Sequence[float], speed: float) -> Times:
    """The times of a recording, from its first on, passing ``speed`` times faster."""
    since_start = np.asarray(times, dtype=np.float64)
    return (since_start - since_start[:1]) / speed
