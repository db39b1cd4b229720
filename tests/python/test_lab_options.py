"""Options of the laboratory: one declaration, and the same from a flag as from a keyword."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_router_rs import _core
from sglang_router_rs.routing_test import LoadConfig, OptionError, RoutingConfig
from sglang_router_rs.routing_test import options as lab
from sglang_router_rs.routing_test.bench import BenchConfig
from sglang_router_rs.routing_test.config import ARRIVALS, ROUTES

CONFIGS = (LoadConfig, RoutingConfig, BenchConfig)
# Only a keyword has it.
NO_FLAG = frozenset({"router_options"})

texts = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=","), min_size=1, max_size=8)
words = texts.filter(lambda text: not text.startswith("-"))

# Values that the options take.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "num_requests": st.integers(1, 10**9),
    "request_rate": st.floats(0.001) | st.just(math.inf),
    "arrivals": st.sampled_from(ARRIVALS),
    "range_ratio": st.floats(0, 1),
    "input_len": st.integers(1, 10**6),
    "route": st.sampled_from(sorted(ROUTES)),
    "model": texts,
    "stream": st.booleans(),
    "seed": st.integers(0, 2**64),
    "max_concurrency": st.integers(1),
    "timeout_secs": st.floats(0.001, 1e9),
    "base_port": st.integers(0, 65535),
    "gpu_ids": st.lists(st.integers(0, 99), min_size=1, unique=True),
    "worker_args": st.lists(words, min_size=1),
    "policy": st.sampled_from([policy["name"] for policy in _core.policies()]),
}


def parsed(arguments: list[str], options: type = RoutingConfig) -> Any:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    lab.add_flags(parser, options, NO_FLAG)
    return options(**lab.given(parser.parse_args(arguments), options))


def flags(name: str, value: Any, separator: str) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        items = [str(item) for item in value]
        return [flag, *(items if separator == " " else [separator.join(items)])]
    return [f"{flag}={value}"]


@given(st.fixed_dictionaries({}, optional=VALUES), st.sampled_from([" ", ","]))
def test_flags_and_keywords_give_the_same_object(values: dict[str, Any], separator: str) -> None:
    arguments = [word for name, value in values.items() for word in flags(name, value, separator)]
    assert parsed(arguments) == RoutingConfig(**values)


def test_lists_are_separated_by_commas_and_spaces() -> None:
    for line in ("--gpu-ids 1 2 3", "--gpu-ids 1,2,3", "--gpu-ids 1,2 3", "--gpu-ids 1, 2, 3", "--gpu-ids 1 2,3,"):
        assert parsed(line.split()).gpu_ids == [1, 2, 3]


@pytest.mark.parametrize("options", CONFIGS)
def test_every_default_is_a_value_that_the_option_takes(options: type) -> None:
    options()
    for field in dataclasses.fields(options):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        judge = field.metadata["check"]
        assert default is None or judge is None or judge(default) is None, field.name
        assert field.metadata["help"]
        assert field.name.islower()
    assert parsed([], options) == options()


@pytest.mark.parametrize("options", CONFIGS)
def test_a_value_of_another_type_is_named(options: type) -> None:
    for field in dataclasses.fields(options):
        value = object()
        with pytest.raises(OptionError) as error:
            options(**{field.name: value})
        assert (error.value.name, error.value.value) == (field.name, value)
        assert str(error.value).startswith(f"{field.name}={value!r}: takes ")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("num_requests", 0, "must be a number from 1 on"),
        ("num_requests", 1.0, "takes int, not float"),
        ("num_requests", True, "takes int, not bool"),
        ("num_requests", "5", "takes int, not str"),
        ("num_requests", None, "takes int, not NoneType"),
        ("request_rate", 0, "must be a number from 1e-06 on, or inf"),
        ("request_rate", -0.5, "must be a number from 1e-06 on, or inf"),
        ("request_rate", math.nan, "must be a number from 1e-06 on, or inf"),
        ("request_rate", -math.inf, "must be a number from 1e-06 on, or inf"),
        ("request_rate", True, "takes float, not bool"),
        ("trace_speed", math.inf, "must be a number from 1e-06 on"),
        ("range_ratio", math.nan, "must be between 0 and 1"),
        ("range_ratio", 1.5, "must be between 0 and 1"),
        ("arrivals", "uniform", "must be one of poisson, constant, burst, trace"),
        ("route", "generate", "must be one of /generate, /v1/completions, /v1/chat/completions"),
        ("stream", 1, "takes bool, not int"),
        ("max_concurrency", 0, "must be a number from 1 on"),
        ("timeout_secs", 0, "must be a number above 0"),
        ("base_port", 65536, "must be between 0 and 65535"),
        ("worker_base_port", 0, "must be between 1 and 65535"),
        ("gpu_ids", "0,1", "takes list, not str"),
        ("gpu_ids", ["0"], "takes a list of int, not of str"),
        ("gpu_ids", [True], "takes a list of int, not of bool"),
        ("gpu_ids", [-1], "must be different numbers from 0 on"),
        ("gpu_ids", [1, 1], "must be different numbers from 0 on"),
        ("gpu_ids", [], "must be as many as num_workers"),
        ("worker_urls", "http://w", "takes list, not str"),
        ("worker_urls", [None], "takes a list of str, not of NoneType"),
        ("worker_urls", [], "must name a worker"),
        ("worker_args", None, "takes list, not NoneType"),
        ("worker_args", [1], "takes a list of str, not of int"),
        ("router_options", [], "takes dict, not list"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any, problem: str) -> None:
    with pytest.raises(OptionError) as error:
        RoutingConfig(**{name: value})
    assert isinstance(error.value, ValueError)
    assert (error.value.name, error.value.problem[: len(problem)]) == (name, problem)
    assert repr(error.value.value) == repr(value)
    assert str(error.value).startswith(f"{name}={value!r}: {problem}")


def test_workers_are_as_many_as_their_gpus() -> None:
    assert RoutingConfig().gpus == [0, 1]
    assert RoutingConfig(num_workers=3).gpus == [0, 1, 2]
    assert RoutingConfig(gpu_ids=[2, 3]).gpus == [2, 3]
    assert RoutingConfig(gpu_ids=[2, 3], num_workers=2).gpus == [2, 3]
    with pytest.raises(OptionError, match=r"gpu_ids=\[2, 3\]: must be as many as num_workers"):
        RoutingConfig(gpu_ids=[2, 3], num_workers=3)


def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="num_request"):
        RoutingConfig(num_request=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        RoutingConfig(5)  # type: ignore[misc]


def test_an_error_in_the_words_of_the_command_line() -> None:
    assert OptionError("input_len", 0, "no").as_flag == "--input-len 0: no"
    assert OptionError("gpu_ids", [1, 1], "no").as_flag == "--gpu-ids 1 1: no"


def test_a_class_of_ones_own_works_alike() -> None:
    @dataclass(kw_only=True)
    class Options:
        sizes: list[float] = lab.option([0.5, 2], "50% of what", metavar="SIZE")
        tags: list[str] | None = lab.option(None, "names")
        on: bool = lab.option(True, "whether")
        share: float = lab.option(0.5, "of all", lab.between(0, 1))

    parser = argparse.ArgumentParser(prog="it")
    lab.add_flags(parser, Options, frozenset({"tags"}))
    text = " ".join(parser.format_help().split())
    for part in (
        "--sizes SIZE [SIZE ...]",
        "50% of what [default: 0.5,2]",
        "--no-on",
        "whether [default: yes]",
        "of all [default: 0.5]",
    ):
        assert part in text
    assert "--tags" not in text
    assert lab.given(parser.parse_args(["--sizes", "1,2", "--sizes", "3", "--no-on"]), Options) == {
        "sizes": [1.0, 2.0, 3.0],
        "on": False,
    }
    one, other = Options(), Options()
    assert one.sizes is not other.sizes
    lab.check(one)
