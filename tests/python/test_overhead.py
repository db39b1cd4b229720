"""The figures of benches/overhead: what is read of wrk, how rounds are summed up, and what must hold of them."""

from __future__ import annotations

import argparse
import json
import math

import pytest
from contenders import ALL, Contender, contender
from figures import (
    Latency,
    Rate,
    Requests,
    Rows,
    Summary,
    added,
    judge,
    memory_of,
    parse_instructions,
    parse_wrk,
    ratios,
    table,
)
from trial import Failure

FINE = {"requests": 1000, "secs": 2.0, "p50_us": 100.0, "p99_us": 200.0}
NO_ERRORS = dict.fromkeys(("connect", "read", "write", "status", "timeout"), 0)


def busy(*cpu_us: float) -> list[Requests]:
    return [Requests(value, 10_000.0, 20.0) for value in cpu_us]


def at_rate(*p99_us: float, reached: float = 8000.0) -> list[Rate]:
    return [Rate(reached, 100.0, value, 2 * value) for value in p99_us]


def verdicts(found: dict[str, Rows]) -> dict[str, bool]:
    return {rule.name: not rule.against for rule in judge(found, 8000)}


def test_wrk_is_read_from_its_last_line() -> None:
    made = parse_wrk(f"Running 2s test\n  1 threads\n\n{json.dumps(FINE | NO_ERRORS)}\n")
    assert (made.requests, made.per_sec, made.p50_us, made.p99_us) == (1000, 500.0, 100.0, 200.0)


@pytest.mark.parametrize("error", NO_ERRORS)
def test_an_error_of_wrk_ends_the_bench(error: str) -> None:
    with pytest.raises(Failure, match=error):
        parse_wrk(json.dumps(FINE | NO_ERRORS | {error: 1}))


def test_wrk_without_requests_or_words_ends_the_bench() -> None:
    with pytest.raises(Failure, match="not one request"):
        parse_wrk(json.dumps(FINE | NO_ERRORS | {"requests": 0}))
    with pytest.raises(Failure, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1")


def test_callgrind_is_read_or_the_bench_ends() -> None:
    assert parse_instructions("==7== Events    : Ir\n==7== Collected : 296962865\n") == 296962865
    with pytest.raises(Failure, match="Illegal"):
        parse_instructions("Illegal instruction")


def test_ratios_are_those_of_the_same_round() -> None:
    rows = {"ours": busy(20, 60, 30), "haproxy": busy(10, 20, 30)}
    assert ratios(rows, "cpu_us", "ours", "haproxy") == Summary(2.0, 1.0, 3.0)


def test_a_ratio_to_nothing_is_no_small_one() -> None:
    assert ratios({"ours": busy(20), "haproxy": busy(0)}, "cpu_us", "ours", "haproxy").median == math.inf
    assert math.isnan(ratios({"ours": busy(20)}, "cpu_us", "ours", "haproxy").median)


def test_what_is_added_is_taken_round_by_round() -> None:
    rows = {"direct": [Latency(10, 20), Latency(30, 40)], "ours": [Latency(110, 20), Latency(150, 40)]}
    assert added(rows, "p50_us", "ours") == Summary(110.0, 100.0, 120.0)


def test_growth_is_that_of_the_last_half() -> None:
    samples = [(0, 10.0), (10, 90.0), (20, 100.0), (30, 104.0), (40, 103.0)]
    made = memory_of(samples)
    assert (made.half_mb, made.end_mb, made.most_mb, made.growth_mb) == (100.0, 103.0, 104.0, 3.0)


def test_a_bound_holds_up_to_its_figure_and_not_above() -> None:
    rows = {"ours:cache_aware": busy(20), "haproxy": busy(10), "sglang-router:cache_aware": busy(60)}
    assert verdicts({"requests": rows}) == {
        "CPU per request, x HAProxy's <= 2.00": True,
        "CPU per request, x sglang-router's <= 0.30": False,
    }


def test_added_latency_is_judged_against_haproxys() -> None:
    rows = {"direct": at_rate(100), "haproxy": at_rate(200), "ours:cache_aware": at_rate(300)}
    assert all(verdicts({"rate": rows}).values())
    assert not all(verdicts({"rate": rows | {"ours:cache_aware": at_rate(301)}}).values())


def test_a_rate_that_was_not_reached_is_told() -> None:
    rows = {"direct": at_rate(100), "haproxy": at_rate(200), "ours:cache_aware": at_rate(300, reached=7000)}
    wrong = [line for rule in judge({"rate": rows}, 8000) for line in rule.against]
    assert wrong == ["ours:cache_aware reached 7000 of 8000 requests/s"]


def test_a_table_compares_with_haproxy_if_it_was_measured() -> None:
    head, ours, haproxy = table("requests", {"ours:cache_aware": busy(20, 30), "haproxy": busy(10, 10)})
    assert head.endswith("cpu_us / haproxy")
    assert ours.endswith("2.50 (2.00..3.00)")
    assert haproxy.endswith("1.00")
    assert "haproxy" not in table("requests", {"ours:cache_aware": busy(20)})[0]


@pytest.mark.parametrize("who", ALL, ids=str)
def test_a_contender_is_named_as_it_is_printed(who: Contender) -> None:
    assert contender(str(who)) == who


@pytest.mark.parametrize("text", ["", "ours", "ours:", "ours:cache_aware:off", "haproxy:2", "sglang-router", "envoy"])
def test_an_unknown_contender_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not haproxy, nginx"):
        contender(text)
