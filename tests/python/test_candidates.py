"""What a policy chose among, as Python reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Sim, generate, module, until, until_healthy
from sglang_router_rs import Router, RouterTraceClient


def test_a_trace_tells_what_the_policy_chose_among(sim: Sim, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    options = {"port": 0, "enable_request_tracking": True, "log_level": "off", "trace_log": path}
    with Router(sim.urls, "cache_aware", trace_candidates=-1, **options) as router:
        until_healthy(router.url, 2)
        for request_id in ("first", "again"):
            assert generate(router.url, request_id, "The same words in both requests.").status == 200
            until(lambda each=request_id: (router.trace(each) or {}).get("latency_ms"), "the end")
        trace = RouterTraceClient(router.url).get_request_trace("again")
        assert trace == router.trace("again")
    assert trace is not None
    assert trace["reason"] == "prefix_match"
    chosen, other = trace["candidates"]
    assert chosen == {
        "worker_url": trace["worker_url"], "node_id": trace["node_id"], "in_flight": 0,
        "matched_tokens": trace["matched_tokens"], "pending_tokens": None, "speed": None, "same_prefix": None,
        "score": 1.0, "chosen": True,
    }  # fmt: skip
    assert (other["matched_tokens"], other["score"], other["chosen"]) == (0, 0.0, False)
    assert {chosen["worker_url"], other["worker_url"]} == set(sim.urls)
    assert RouterTraceClient.from_log(path).get_request_trace("again") == trace


def test_candidates_need_tracking_and_a_number_from_minus_one() -> None:
    with pytest.raises(ValueError, match=r"trace_candidates: .*enable_request_tracking"):
        Router(trace_candidates=3)
    with pytest.raises(ValueError, match=r"trace_candidates: .*-2.*-1\.\."):
        Router(trace_candidates=-2, enable_request_tracking=True)


def test_the_commands_of_python_are_in_the_help() -> None:
    with module("--help") as program:
        assert program.end() == 0
    assert "\n  bench  " in program.output
    assert "\n  compare  " in program.output
