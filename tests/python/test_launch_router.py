"""The command lines of sglang_router.launch_router."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from running import Program, Sim, ask, generate
from sglang_router_rs import _core, launch_router


def launched(*flags: str, environment: dict[str, str] | None = None) -> Program:
    return Program("-m", "sglang_router_rs.launch_router", *flags, environment=environment)


def passed_on(*flags: str) -> list[str]:
    arguments, warnings = launch_router.launch_arguments(list(flags))
    assert warnings == []
    return arguments


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_on_all_addresses_with_metrics_beside(sim: Sim, number: signal.Signals) -> None:
    flags = ["--worker-urls", *sim.urls, "--port", "0", "--prometheus-port", "0", "--model-path", "m"]
    with launched(*flags, "--policy", "power_of_two", "--enable-request-tracking") as program:
        program.find("warning: --model-path has no effect")
        program.find(r"on http://0\.0\.0\.0:\d+, policy power_of_two, request tracking on")
        url = program.router_url()
        assert generate(url, "a").status == 200
        assert ask(f"{url}/v1/traces/a").status == 200
        program.send(number)
        assert program.end() == 0


def test_its_defaults_are_sglang_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(arguments: list[str], defaults: dict[str, str]) -> int:
        calls.append((arguments, defaults))
        return 7

    monkeypatch.setattr(_core, "run", run)
    monkeypatch.setattr("sys.argv", ["launch_router", "--worker-urls", "http://a:1"])
    assert launch_router.main() == 7
    defaults = {"host": "0.0.0.0", "port": "30000", "prometheus_host": "0.0.0.0", "prometheus_port": "29000"}
    assert calls == [(["launch", "--worker-urls=http://a:1"], defaults)]
    for name, text in defaults.items():
        _core.Server.check([(name, [text])])


def test_its_defaults_give_way_to_the_environment_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("host = '127.0.0.1'\nprometheus_port = 0\n")
    with launched("--config", str(file), environment={"SGLANG_ROUTER__PORT": "0"}) as program:
        program.find(r"on http://127\.0\.0\.1:")
        assert ":30000" not in program.router_url()


def test_flags_are_passed_on_as_they_are() -> None:
    flags = ["--worker-urls", "http://a:1", "http://b:2", "--disable-retries", "--cache-threshold", "0.5"]
    assert passed_on(*flags) == [
        "--worker-urls=http://a:1",
        "--worker-urls=http://b:2",
        "--disable-retries",
        "--cache-threshold=0.5",
    ]
    assert passed_on("--worker-urls", "http://a:1", "--worker-urls", "http://b:2") == ["--worker-urls=http://b:2"]
    assert passed_on("--worker-urls") == []
    assert passed_on("--port=-1") == ["--port=-1"]


def test_unique_prefixes_are_whole_names() -> None:
    assert passed_on("--worker-u", "http://a:1", "--pol", "random") == ["--worker-urls=http://a:1", "--policy=random"]
    # Not --max-trace-entries, which sglang_router does not have.
    assert passed_on("--max-t", "4096") == ["--max-tree-size=4096"]


def test_sessions_are_passed_on_and_act() -> None:
    flags = ["--policy=manual", "--max-idle-secs=60", "--assignment-mode=min_group"]
    assert passed_on(*flags) == flags
    understood = _core.check_flags(flags, {})
    for shown in ("policy: Rule(Manual)", "max_idle_secs: 60", "assignment_mode: MinGroup"):
        assert shown in understood


def test_our_own_flags_are_passed_on() -> None:
    own = ["--enable-request-tracking", "--trace-ttl", "9", "--node-ids", "http://a:1=x", "http://b:1=y", "--seed=1"]
    assert passed_on("--port", "1", *own) == ["--port=1", *own]


def test_every_flag_of_survival_is_passed_on_and_acts() -> None:
    given = {
        "retry-max-retries": "3",
        "retry-initial-backoff-ms": "10",
        "retry-max-backoff-ms": "100",
        "retry-backoff-multiplier": "2",
        "retry-jitter-factor": "0",
        "cb-failure-threshold": "5",
        "cb-success-threshold": "1",
        "cb-timeout-duration-secs": "30",
        "cb-window-duration-secs": "60",
        "max-concurrent-requests": "-1",
        "queue-size": "0",
        "queue-timeout-secs": "5",
        "rate-limit-tokens-per-second": "8",
        "shutdown-grace-period-secs": "10",
        "api-key": "a-key",
        "log-dir": "logs",
    }
    flags = [text for name, value in given.items() for text in (f"--{name}", value)]
    several = ["--cors-allowed-origins", "http://a.test", "--prometheus-duration-buckets", "0.5", "1"]
    arguments = passed_on(*flags, *several, "--disable-circuit-breaker", "--disable-retries", "--disable-health-check")
    assert arguments == [
        *(f"--{name}={value}" for name, value in given.items()),
        "--cors-allowed-origins=http://a.test",
        "--prometheus-duration-buckets=0.5",
        "--prometheus-duration-buckets=1",
        "--disable-circuit-breaker",
        "--disable-retries",
        "--disable-health-check",
    ]
    understood = _core.check_flags(arguments, {})
    for name, value in given.items():
        if name != "api-key":
            field = f"{name.replace('-', '_')}: "
            shown = understood.partition(field)[2].removeprefix("Some(").lstrip('"')
            assert shown.startswith(value), f"{field}{shown[:20]}"
    assert "a-key" not in understood


def test_what_has_no_effect_is_warned_of_once_each() -> None:
    flags = ["--model-path", "m", "--tokenizer-cache-enable-l0", "--history-backend", "none", "--backend", "sglang"]
    arguments, warnings = launch_router.launch_arguments([*flags, "--model-path", "n", "--port", "1"])
    assert arguments == ["--port=1"]
    assert sorted(warning.split()[0] for warning in warnings) == [
        "--backend",
        "--history-backend",
        "--model-path",
        "--tokenizer-cache-enable-l0",
    ]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--pd-disaggregation"], "--pd-disaggregation: prefill and decode workers are not supported yet"),
        (["--prefill", "http://a:1", "9000", "--prefill", "http://b:1", "none"], "--prefill: "),
        (["--service-discovery", "--selector", "a=b"], "--service-discovery: not supported yet; --worker-urls dns+"),
        (["--dp-aware"], "--dp-aware: "),
        (["--tls-cert-path", "a", "--tls-key-path", "b"], "--tls-cert-path: put a TLS proxy before the router"),
        (["--history-backend", "redis"], "--history-backend redis is not supported, only memory and none"),
        (["--backend", "openai"], "--backend openai is not supported, only sglang"),
        (["--jwt-issuer", "a"], "--jwt-issuer: not supported; --admin-api-key "),
        (["--ser"], "ambiguous"),
        (["--port"], "--port"),
    ],
)
def test_what_is_not_supported_ends_the_start(flags: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch_router.launch_arguments(flags)
    assert ended.value.code == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--prometheus-duration-buckets", "0"], "above 0"),
        (["--api-key", "a b"], "visible ASCII"),
        (["--max-concurrent-requests", "0"], "nor -1 for no limit"),
        (["--worker-kv-tokens", "0"], "1..="),
        (["--policy", "bucket"], "round_robin"),
        (["--no-such-flag"], "--no-such-flag"),
        (["stray"], "stray"),
        (["--port", "x"], "--port"),
    ],
)
def test_the_core_judges_the_rest(flags: list[str], found: str) -> None:
    with launched(*flags) as program:
        assert program.end() == 2
        assert found in program.output


def test_help_names_every_flag() -> None:
    with launched("--help") as program:
        assert program.end() == 0
        for flag in ("--worker-urls", "--pd-disaggregation", "--model-path", "--max-tree-size"):
            assert flag in program.output
