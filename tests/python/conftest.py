"""What the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from running import Sim
from sglang_router_rs import Router

# The same examples in every run.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def no_options_from_outside() -> None:
    for name in [name for name in os.environ if name.startswith("SGLANG_ROUTER__")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def sim() -> Iterator[Sim]:
    """Two healthy simulated workers that take no time."""
    with Sim("--speed", "1000") as workers:
        yield workers


@pytest.fixture
def router(sim: Sim) -> Iterator[Router]:
    """A router that serves those workers and records its requests."""
    options = {"port": 0, "enable_request_tracking": True, "log_level": "error"}
    with Router(sim.urls, "round_robin", **options) as serving:
        assert serving.wait_ready()
        yield serving


@pytest.fixture
def hanging() -> Iterator[Sim]:
    """One worker that never answers."""
    with Sim("--hang", ports="0") as worker:
        yield worker
