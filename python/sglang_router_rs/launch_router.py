"""``python -m sglang_router_rs.launch_router …``: takes the command lines of ``sglang_router.launch_router`` 0.3.2.

So that a deployment changes one word. Its flags are passed on to ``launch``, with its defaults where they differ from
ours; flags of ``launch`` that it does not have are taken too. A flag that cannot matter here is warned of, one that
would matter ends the start. What an option means is the core's affair, as are its range and its errors.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from . import _core
from .__main__ import run

# How many values a flag takes, in argparse's words.
_ONE, _MANY, _NONE = None, "*", 0

# Names of flags by how many values they take.
_Flags = dict["str | int | None", str]

# Where sglang_router's defaults differ. Weaker than the environment and a --config file.
_DEFAULTS = {"host": "0.0.0.0", "port": "30000", "prometheus_host": "0.0.0.0", "prometheus_port": "29000"}

# The core has an option of that name.
_PASSED_ON: _Flags = {
    _ONE: """
        host port policy cache-threshold balance-abs-threshold balance-rel-threshold eviction-interval-secs
        max-tree-size max-idle-secs assignment-mode max-payload-size worker-startup-timeout-secs
        worker-startup-check-interval api-key log-dir log-level prometheus-port prometheus-host request-timeout-secs
        shutdown-grace-period-secs max-concurrent-requests queue-size queue-timeout-secs rate-limit-tokens-per-second
        retry-max-retries retry-initial-backoff-ms retry-max-backoff-ms retry-backoff-multiplier retry-jitter-factor
        cb-failure-threshold cb-success-threshold cb-timeout-duration-secs cb-window-duration-secs
        health-failure-threshold health-success-threshold health-check-timeout-secs health-check-interval-secs
        health-check-endpoint""",
    _MANY: "worker-urls request-id-headers cors-allowed-origins prometheus-duration-buckets",
    _NONE: "disable-retries disable-circuit-breaker disable-health-check",
}

# Nothing that this router does depends on them: it neither tokenizes nor parses answers nor keeps conversations.
# The last lines only shape what is switched on by a flag in _REFUSED.
_WITHOUT_EFFECT: _Flags = {
    _ONE: """
        model-path tokenizer-path chat-template tokenizer-cache-l0-max-entries tokenizer-cache-l1-max-memory
        reasoning-parser tool-call-parser mcp-config-path backend history-backend
        oracle-wallet-path oracle-tns-alias oracle-connect-descriptor oracle-username oracle-password oracle-pool-min
        oracle-pool-max oracle-pool-timeout-secs postgres-db-url postgres-pool-max redis-url redis-pool-max
        redis-retention-days
        prefill-policy decode-policy bucket-adjust-interval-secs service-discovery-port service-discovery-namespace
        otlp-traces-endpoint""",
    _MANY: "selector prefill-selector decode-selector",
    _NONE: "tokenizer-cache-enable-l0 tokenizer-cache-enable-l1",
}

# Flags in _WITHOUT_EFFECT that are so with these values only.
_HARMLESS_VALUES = {"backend": ["sglang"], "history-backend": ["memory", "none"]}

_PD = "prefill and decode workers are not supported yet; give complete servers to --worker-urls"
_DISCOVERY = "not supported yet; --worker-urls dns+http://NAME:PORT follows a headless Service"
_TLS = "workers are reached by http:// only; put a TLS proxy before them"
_SERVER_TLS = "put a TLS proxy before the router"
_AUTH = "not supported; --admin-api-key is one key for all who manage workers and read traces"
_REFUSED: dict[str, tuple[str | int | None, str]] = {
    "pd-disaggregation": (_NONE, _PD),
    "prefill": (_MANY, _PD),
    "decode": (_MANY, _PD),
    "service-discovery": (_NONE, _DISCOVERY),
    "enable-igw": (_NONE, "one router serves one model; run one for each"),
    "dp-aware": (_NONE, "ranks are not told apart yet; leave it out and let each server balance its own"),
    "mini-lb": (_NONE, "leave it out: this router is as quickly started"),
    "enable-trace": (_NONE, "OpenTelemetry is not supported yet; --enable-request-tracking records each request"),
    "client-cert-path": (_ONE, _TLS),
    "client-key-path": (_ONE, _TLS),
    "ca-cert-paths": (_MANY, _TLS),
    "tls-cert-path": (_ONE, _SERVER_TLS),
    "tls-key-path": (_ONE, _SERVER_TLS),
    "control-plane-api-keys": (_MANY, _AUTH),
    "control-plane-audit-enabled": (_NONE, _AUTH),
    "jwt-issuer": (_ONE, _AUTH),
    "jwt-audience": (_ONE, _AUTH),
    "jwt-jwks-uri": (_ONE, _AUTH),
    "jwt-role-mapping": (_MANY, _AUTH),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without the usage, whose hundred lines would bury it.
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sglang_router_rs.launch_router",
        description="Start the router with the command line of sglang_router.launch_router; flags of "
        "`sglang-router-rs launch` are taken too.",
        argument_default=argparse.SUPPRESS,
    )
    helps = {option["name"].replace("_", "-"): option["help"] for option in _core.options()}
    for takes, names in _PASSED_ON.items():
        for name in names.split():
            _add(parser, name, takes, helps[name])
    for takes, names in _WITHOUT_EFFECT.items():
        for name in names.split():
            _add(parser, name, takes, "without effect here")
    for name, (arity, instead) in _REFUSED.items():
        _add(parser, name, arity, f"not supported: {instead}")
    return parser


def _add(parser: argparse.ArgumentParser, name: str, takes: str | int | None, text: str) -> None:
    kind: dict[str, Any] = {"action": "store_const", "const": []} if takes == _NONE else {"nargs": takes}
    parser.add_argument(f"--{name}", dest=name, help=text.replace("%", "%%"), **kind)


def launch_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The flags for ``launch`` that say what these flags of ``sglang_router`` say, and what to warn of.

    Ends the process with status 2, and a message that names it, for a flag that is not supported.
    """
    parser = _parser()
    # What is not sglang_router's is left for the core to judge.
    given, ours = parser.parse_known_args(argv)
    ignored = {name for names in _WITHOUT_EFFECT.values() for name in names.split()}
    flags, warnings = [], []
    for name, value in vars(given).items():
        values = value if isinstance(value, list) else [value]
        if name in _REFUSED:
            parser.error(f"--{name}: {_REFUSED[name][1]}")
        elif name in ignored:
            harmless = _HARMLESS_VALUES.get(name)
            if harmless is not None and values[0] not in harmless:
                parser.error(f"--{name} {values[0]} is not supported, only {' and '.join(harmless)}")
            warnings.append(f"--{name} has no effect in this router")
        else:
            takes_none = name in _PASSED_ON[_NONE].split()
            flags += [f"--{name}"] if takes_none else [f"--{name}={text}" for text in values]
    return flags + ours, warnings


def main() -> int:
    """Run the command line in ``sys.argv``; returns its exit status."""
    flags, warnings = launch_arguments(sys.argv[1:])
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return run(["launch", *flags], _DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
