"""The command line: help, launch, sim, and sglang_router's."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import Program, Sim, ask, generate, module, until
from sglang_router_rs import RouterTraceClient, __version__, _core


def output(program: Program, status: int) -> str:
    with program:
        assert program.end() == status, program.output
        return program.output


def test_help_and_version() -> None:
    assert output(module("--version"), 0).split() == ["sglang-router-rs", __version__]
    text = output(module("--help"), 0)
    assert "launch" in text
    assert "sim" in text
    text = output(module("launch", "--help"), 0)
    assert all(f"--{option['name'].replace('_', '-')}" in text for option in _core.options())
    assert "--prefill-rate" in output(module("sim", "--help"), 0)


def test_the_console_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("sglang-router-rs")
    assert output(Program(str(script), "--version"), 0).split() == ["sglang-router-rs", __version__]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "Usage: sglang-router-rs"),
        (["lunch"], "lunch"),
        (["launch", "--prot", "1"], "--prot"),
        (["launch", "--port", "x"], "--port"),
        (["launch", "--policy", "best"], "round_robin"),
        (["launch", "stray"], "stray"),
        (["launch", "--worker-kv-tokens", "0"], "1..="),
        (["launch", "--port=70000"], "0..=65535"),
        (["sim", "--port", "70000"], "--port"),
    ],
)
def test_a_wrong_command_line_is_told(arguments: list[str], found: str) -> None:
    assert found in output(module(*arguments), 2)


@pytest.mark.parametrize(
    ("arguments", "environment", "found"),
    [
        (["--worker-urls", "http://a:1", "http://a:1"], {}, "worker_urls: "),
        ([], {"SGLANG_ROUTER__PORT": "x"}, "SGLANG_ROUTER__PORT: "),
        ([], {"SGLANG_ROUTER__PROT": "1"}, "SGLANG_ROUTER__PROT: there is no such option; did you mean port"),
        (["--config", "/no/such"], {}, "/no/such"),
    ],
)
def test_wrong_options_end_the_start(arguments: list[str], environment: dict[str, str], found: str) -> None:
    assert found in output(module("launch", *arguments, environment=environment), 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launch_serves_until_a_signal(sim: Sim, number: signal.Signals) -> None:
    flags = ["--port", "0", "--enable-request-tracking", "--worker-urls", *sim.urls]
    with module("launch", *flags, environment={"SGLANG_ROUTER__POLICY": "round_robin"}) as program:
        url = program.router_url()
        assert generate(url, "a").status == 200
        trace = RouterTraceClient(url).get_request_trace("a")
        assert trace is not None
        assert trace["routing_policy"] == "round_robin"
        program.send(number)
        assert program.end() == 0, program.output


def test_a_second_signal_ends_launch_at_once(hanging: Sim) -> None:
    flags = ["--port=0", "--disable-health-check", "--enable-request-tracking", "--worker-urls", *hanging.urls]
    with module("launch", *flags) as program:
        url = program.router_url()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}")
            until(lambda: RouterTraceClient(url).list_recent_traces(status="routed"))
            program.send(signal.SIGTERM)
            program.find("draining")
            assert program.process.poll() is None
            program.send(signal.SIGTERM)
            assert program.end() == 0, program.output


@pytest.mark.parametrize(
    ("flags", "is_warned_of"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "open-sesame"], False),
        (["--host", "0.0.0.0", "--admin-api-key", "open-sesame"], False),
        ([], False),
    ],
)
def test_a_router_open_to_everybody_is_warned_of(flags: list[str], is_warned_of: bool) -> None:
    with module("launch", "--port", "0", *flags) as program:
        program.find("no workers: requests are refused")
        assert ("no key is set" in program.output) == is_warned_of
        assert "open-sesame" not in program.output


@pytest.mark.parametrize("arguments", [["launch"], ["sim"]])
def test_a_taken_port_is_named(arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert port in output(module(*arguments, "--port", port), 1)


def test_a_simulated_worker_counts_and_fails_on_demand() -> None:
    with Sim("--speed", "1000") as sim:
        first, second = sim.urls
        assert ask(f"{first}/generate", {"text": "a b", "sampling_params": {"max_new_tokens": 2}}).status == 200
        stats = sim.stats()
        assert [worker["served"] for worker in stats] == [1, 0]
        assert stats[0]["port"] == int(first.rpartition(":")[2])
        assert stats[0]["prompt_tokens"] > 0
        assert ask(f"{first}/sim/faults", {"fail_rate": 1, "fail_status": 503}).status == 200
        assert ask(f"{first}/generate", {"text": "a"}).status == 503
        assert ask(f"{second}/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}}).status == 200
        assert ask(f"{first}/sim/faults", {"fail_rate": 2}).status == 400
        assert ask(f"{first}/sim/faults", {"fail_rate": 0}).status == 200
        assert ask(f"{first}/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}}).status == 200
        sim.send(signal.SIGTERM)
        assert sim.end() == 0


def test_a_router_whose_log_nobody_reads_any_more_serves_and_ends(sim: Sim) -> None:
    reader, writer = os.pipe()
    arguments = ["launch", "--port=0", "--enable-request-tracking", "--worker-urls", *sim.urls]
    router = subprocess.Popen([sys.executable, "-m", "sglang_router_rs", *arguments], stderr=writer)
    os.close(writer)
    try:
        log = b""
        while b"first round" not in log:
            log += os.read(reader, 4096)
        os.close(reader)
        found = re.search(rb"on (http://\S+),", log)
        assert found
        url = found[1].decode()
        # A refused request is logged.
        assert ask(f"{url}/generate", {}, {"x-sglang-target-worker": "nobody"}).status == 400
        assert generate(url).status == 200
        router.send_signal(signal.SIGTERM)
        assert router.wait(30) == 0
    finally:
        router.kill()
        router.wait()


def test_a_worker_that_is_not_there_is_told_with_the_reason() -> None:
    with module("launch", "--port=0", "--worker-urls", "http://127.0.0.1:9") as program:
        url = program.router_url()
        program.find("check failed: cannot connect to 127.0.0.1:9")
        assert "cannot connect" in ask(f"{url}/workers").json()["workers"][0]["last_error"]
        refused = ask(f"{url}/generate", {})
        assert refused.status == 503
        assert "cannot connect" in refused.json()["error"]["message"]
        program.send(signal.SIGTERM)
        assert program.end() == 0
