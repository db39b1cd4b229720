"""Options are the same by keyword, flag, environment and file. Checked over the core's own table."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang_router_rs import PolicyType, Router, _core, _options
from sglang_router_rs.router import option_texts

OPTIONS = {option["name"]: option for option in _core.options()}

# Both good and bad ones, for any list or map; what none of them is made of is a comma, which separates in the
# environment.
URLS = ["http://a:1", "http://a:1/", "http://b:2/base", "http://[::1]:3", "https://a:1", "a:1", "http://u:p@a:1"]
ITEMS = ["x-request-id", "x-other", "/v1/other", "/v1/other/", "not one", "/v1/traces", *URLS]
WEIGHTS = [0, 1, 2.5, -1, "x", float("nan")]


def values(option: _core.Option) -> st.SearchStrategy[Any]:
    """Values of an option's shape, in and out of its range."""
    default = option["default"]
    match option["shape"]:
        case "bool":
            return st.booleans()
        case "int":
            edges = [-1, 0, 1, 65535, 65536, 2**31, 2**32, 2**63, 2**64, int(default or 7)]
            return st.sampled_from(edges) | st.integers(0, 2**40) | st.integers(0, 100)
        case "float":
            # Short ones: the last bit of a long one may be another in a JSON file.
            edges = [0.0, 1.0, -0.0, 1e300, float(default or 1)]
            return st.floats(width=16) | st.floats(0, 2, width=16) | st.sampled_from(edges)
        case "list":
            return st.lists(st.sampled_from(ITEMS), max_size=3)
        case "map":
            items = st.sampled_from(WEIGHTS if option["name"].endswith("weights") else ["left", "right", "", "a b"])
            maps = st.dictionaries(st.sampled_from(URLS), items, max_size=3)
            # A file's tables are sorted.
            return maps.map(lambda entries: dict(sorted(entries.items())))
    words = ["", "/health", "health", "::1", "INFO", "Warning", "-1", "--port", "a=b", *option["choices"]]
    return st.sampled_from(words) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@st.composite
def keywords(draw: st.DrawFn) -> dict[str, Any]:
    """A few options with values; a file would be read."""
    names = draw(st.lists(st.sampled_from([name for name in OPTIONS if name != "config"]), unique=True, max_size=4))
    return {name: draw(values(OPTIONS[name])) for name in names}


def texts(given_options: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(name, option_texts(name, value)) for name, value in given_options.items()]


def by_keywords(given_options: dict[str, Any]) -> str:
    return _core.Server.check(texts(given_options))


def refusal(read: Any, *arguments: Any) -> str | None:
    try:
        read(*arguments)
    except ValueError as error:
        return str(error)
    return None


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_flags(given_options: dict[str, Any]) -> list[str]:
    """As someone types them: apart where that can be."""
    flags: list[str] = []
    for name, items in texts(given_options):
        if OPTIONS[name]["shape"] == "bool" and items == ["true"]:
            flags.append(flag(name))
        elif OPTIONS[name]["shape"] in ("list", "map") and not any(item.startswith("-") for item in items):
            flags += [flag(name), *items]
        else:
            flags += [f"{flag(name)}={item}" for item in items]
    return flags


@given(keywords())
@settings(max_examples=150)
def test_keywords_equal_flags(given_options: dict[str, Any]) -> None:
    error = refusal(by_keywords, given_options)
    if error is None:
        assert _core.check_flags(as_flags(given_options), {}) == by_keywords(given_options)
        Router(**given_options)
    else:
        other = refusal(_core.check_flags, as_flags(given_options), {})
        assert other is not None
        with pytest.raises(ValueError, match=": "):
            Router(**given_options)
        # Which of several wrong ones is named depends on their order.
        name = error.partition(":")[0]
        assert name in given_options or name == "worker_weights", error
        assert any(flag(name) in other or name in other for name in given_options), other


@given(keywords())
@settings(max_examples=100)
def test_keywords_equal_the_environment(given_options: dict[str, Any]) -> None:
    environment = {f"SGLANG_ROUTER__{name.upper()}": ",".join(items) for name, items in texts(given_options)}
    error = refusal(by_keywords, given_options)
    if error is None:
        assert _core.check_flags([], environment) == by_keywords(given_options)
    elif not any(isinstance(value, (list, dict)) for value in given_options.values()):
        # The parts of a list may lose what is wrong with them at a comma.
        other = refusal(_core.check_flags, [], environment)
        assert other is not None
        # What is wrong with values only together has no one source.
        assert other.startswith("SGLANG_ROUTER__") or other == error, other


@pytest.mark.parametrize("form", ["json", "toml"])
@given(given_options=keywords())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_keywords_equal_a_file(form: str, given_options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / f"options.{form}"
    if form == "json":
        file.write_text(json.dumps(given_options, allow_nan=True), encoding="utf-8")
    else:
        lines = (f"{name} = {toml(value)}" for name, value in given_options.items())
        file.write_text("\n".join(lines), encoding="utf-8")

    def without_file(text: str) -> str:
        return text.replace(f"config: Some({json.dumps(str(file))})", "config: None")

    error = refusal(by_keywords, given_options)
    if error is None:
        expected = by_keywords(given_options)
        assert without_file(by_keywords({"config": file})) == expected
        assert without_file(_core.check_flags(["--config", str(file)], {})) == expected
        assert without_file(_core.check_flags([], {"SGLANG_ROUTER__CONFIG": str(file)})) == expected
    else:
        for read in (
            lambda: by_keywords({"config": file}),
            lambda: _core.check_flags(["--config", str(file)], {}),
        ):
            other = refusal(read)
            assert other is not None
            # What is wrong with values only together has no one source.
            assert str(file) in other or other == error


def toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def test_a_keyword_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("port = 1\nseed = 2\nworker_urls = ['http://a:1', 'http://b:1']\n")
    both = {"config": file, "port": 3, "worker_urls": ["http://c:1"]}
    assert by_keywords(both) == by_keywords({**both, "seed": 2})


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"port": 1, "seed": 1, "host": "file", "worker_urls": ["http://file:1"]}')
    environment = {"SGLANG_ROUTER__CONFIG": str(file), "SGLANG_ROUTER__SEED": "2", "SGLANG_ROUTER__HOST": "environment"}
    flags = ["--host", "flag", "--worker-urls", "http://flag:1"]
    expected = {"config": file, "port": 1, "seed": 2, "host": "flag", "worker_urls": ["http://flag:1"]}
    assert _core.check_flags(flags, environment) == by_keywords(expected)


def test_the_environment_is_read_for_flags_only(monkeypatch: pytest.MonkeyPatch) -> None:
    without = by_keywords({})
    monkeypatch.setenv("SGLANG_ROUTER__PORT", "1")
    assert by_keywords({}) == without


def test_what_kubernetes_sets_is_not_read() -> None:
    kubernetes = {"SGLANG_ROUTER_PORT": "tcp://10.0.0.1:80", "SGLANG_ROUTER_SERVICE_HOST": "10.0.0.1"}
    assert _core.check_flags([], kubernetes) == by_keywords({})


def test_an_unknown_option_is_named_wherever_it_stands(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SGLANG_ROUTER__PROT: there is no such option; did you mean port"):
        _core.check_flags([], {"SGLANG_ROUTER__PROT": "1"})
    file = tmp_path / "options.toml"
    for text, found in (
        ("prot = 1", "prot in .*options.toml: there is no such option; did you mean port"),
        ("port = 99999", "port in .*options.toml.*99999"),
        ("worker_kv_tokens = 0", "worker_kv_tokens in .*options.toml.*in 1\\.\\."),
        ("api_key = 'a b'", r"api_key in .*options.toml: bad value .\(hidden\)"),
        ("cors_allowed_origins = ['a.test']", "cors_allowed_origins in .*options.toml.*not an origin"),
        ("[port]\na = [1]", "port in .*options.toml"),
        ("port", "cannot read the options in .*options.toml"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=found):
            Router(config=str(file))
    with pytest.raises(ValueError, match="cannot read the options in /no/such"):
        Router(config="/no/such")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"polcy": "random"}, TypeError, "polcy: there is no such option; did you mean policy"),
        ({"worker_url": ["http://a:1"]}, TypeError, "did you mean worker_urls"),
        ({"enable_request_tracing": True}, TypeError, "did you mean enable_request_tracking"),
        ({"zzz": 1}, TypeError, "zzz: there is no such option$"),
        ({"worker_kv_tokens": 0}, ValueError, r"worker_kv_tokens: .* in 1\.\."),
        ({"cache_weight": float("nan")}, ValueError, "cache_weight: .*at least 0"),
        ({"api_key": ""}, ValueError, "api_key: .*a key is 1 to 512 visible ASCII characters"),
        ({"admin_api_key": "a b"}, ValueError, r"admin_api_key: bad value .\(hidden\)"),
        ({"cors_allowed_origins": "*"}, TypeError, "cors_allowed_origins takes a list, not str"),
        ({"cors_allowed_origins": ["a.test"]}, ValueError, "cors_allowed_origins: .*such as https://"),
        ({"max_concurrent_requests": 0}, ValueError, 'max_concurrent_requests: bad value "0": .*-1 for no limit'),
        ({"cb_failure_threshold": 0}, ValueError, r'cb_failure_threshold: bad value "0": .*1\.\.'),
        ({"retry_backoff_multiplier": 0.5}, ValueError, "retry_backoff_multiplier: .*0.5.*from 1 to 100"),
        ({"worker_urls": "http://a:1"}, TypeError, "worker_urls takes a list, not str"),
        ({"worker_urls": b"http://a:1"}, TypeError, "worker_urls takes a list, not bytes"),
        ({"worker_urls": 1}, TypeError, "worker_urls takes a list, not int"),
        ({"extra_routes": "/a"}, TypeError, "extra_routes takes a list, not str"),
        ({"node_ids": ["http://a:1=a"]}, TypeError, "node_ids takes a dict, not list"),
        ({"worker_weights": [("http://a:1", 1)]}, TypeError, "worker_weights takes a dict, not list"),
        ({"port": 70000}, ValueError, r'port: bad value "70000": 70000 is not in 0\.\.=65535'),
        ({"port": -1}, ValueError, 'port: bad value "-1"'),
        ({"port": 1.5}, ValueError, 'port: bad value "1.5"'),
        ({"port": True}, ValueError, 'port: bad value "true"'),
        ({"port": "http"}, ValueError, 'port: bad value "http"'),
        ({"enable_request_tracking": "maybe"}, ValueError, "enable_request_tracking: .*maybe"),
        ({"enable_request_tracking": 2}, ValueError, 'enable_request_tracking: bad value "2"'),
        ({"policy": "best"}, ValueError, "policy: .*best.*random, round_robin"),
        ({"policy": ""}, ValueError, "policy: "),
        ({"max_trace_entries": 0}, ValueError, r'max_trace_entries: bad value "0": .*1\.\.'),
        ({"trace_ttl_seconds": 0}, ValueError, r'trace_ttl_seconds: bad value "0": .*1\.\.'),
        ({"cache_threshold": 1.01}, ValueError, "cache_threshold: .*1.01.*0 to 1"),
        ({"cache_threshold": float("nan")}, ValueError, "cache_threshold: .*nan"),
        ({"balance_rel_threshold": 0.5}, ValueError, "balance_rel_threshold: .*0.5"),
        ({"log_level": "loud"}, ValueError, "log_level: .*loud.*trace, debug, info"),
        ({"worker_urls": ["localhost:1"]}, ValueError, "worker_urls: .*localhost:1.*scheme"),
        ({"worker_urls": ["https://a:1"]}, ValueError, "worker_urls: .*https"),
        ({"worker_urls": ["http://user:word@a:1"]}, ValueError, "worker_urls: .*user"),
        ({"worker_urls": ["http://a:1/?a=b"]}, ValueError, "worker_urls: .*query"),
        ({"worker_urls": ["http://"]}, ValueError, "worker_urls: "),
        ({"worker_urls": [""]}, ValueError, "worker_urls: "),
        ({"worker_urls": ["http://a:99999"]}, ValueError, "worker_urls: "),
        ({"worker_urls": [1]}, ValueError, "worker_urls: "),
        ({"worker_urls": ["http://a:1", "http://b:1", "http://a:1/"]}, ValueError, "worker_urls: .*http://a:1"),
        ({"worker_weights": {"http://a:1": -1}}, ValueError, "worker_weights: .*-1.*at least 0"),
        ({"worker_weights": {"http://a:1": "x"}}, ValueError, "worker_weights: .*x"),
        ({"worker_weights": {"http://c:1": 1}}, ValueError, "worker_weights: http://c:1 is not one of worker_urls"),
        (
            {"worker_urls": ["http://a:1", "http://b:1"], "worker_weights": {"http://a:1": 0, "http://b:1": 0.0}},
            ValueError,
            "worker_weights: every worker has weight 0",
        ),
        ({"node_ids": {"a": "b"}}, ValueError, "node_ids: "),
        ({"extra_routes": ["a"]}, ValueError, "extra_routes: "),
        ({"prometheus_duration_buckets": [2, 1]}, ValueError, "prometheus_duration_buckets: 1 does not ascend from 2"),
        ({"request_id_headers": ["no header"]}, ValueError, "request_id_headers: "),
    ],
)
def test_a_wrong_option_is_named_before_anything_starts(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Router(**wrong)


def test_more_than_two_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        Router([], "random", 30001)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "level", ["info", "INFO", "Warning", "WARN", "warn", "Debug", "error", "ERROR", "off", "TRACE"]
)
def test_log_levels_come_in_any_case(level: str) -> None:
    Router(log_level=level)


def test_none_is_the_default() -> None:
    nothing: dict[str, Any] = dict.fromkeys(OPTIONS)
    Router(**nothing)
    assert by_keywords({}) == _core.check_flags([], {})


def test_a_list_is_anything_with_items() -> None:
    for urls in (("http://a:1", "http://b:1"), {"http://a:1": 0, "http://b:1": 0}, iter(["http://a:1", "http://b:1"])):
        expected = by_keywords({"worker_urls": ["http://a:1", "http://b:1"]})
        assert by_keywords({"worker_urls": urls}) == expected


def test_flags_have_other_names() -> None:
    for alias, name in (
        ("--enable-request-tracing", "--enable-request-tracking"),
        ("--trace-ttl=9", "--trace-ttl-seconds=9"),
    ):
        assert _core.check_flags([alias], {}) == _core.check_flags([name], {})


@pytest.mark.parametrize("policy", list(PolicyType))
def test_a_policy_is_a_string(policy: PolicyType) -> None:
    assert isinstance(policy, str)
    assert str(policy) == policy == policy.value == f"{policy}"
    assert pickle.loads(pickle.dumps(policy)) is policy
    assert copy.deepcopy(policy) is policy
    assert json.dumps({"policy": policy}) == f'{{"policy": "{policy.value}"}}'
    assert PolicyType(policy.value) is policy
    same = by_keywords({"policy": policy.value})
    for spelling in (policy, policy.value, policy.value.upper(), policy.value.title()):
        assert by_keywords({"policy": spelling}) == same


def test_every_policy_has_a_member() -> None:
    assert [policy.value for policy in PolicyType] == OPTIONS["policy"]["choices"]
    assert {policy.name: policy.value for policy in PolicyType} == {
        policy["member"]: policy["name"] for policy in _core.policies()
    }


def test_the_signature_is_the_table_of_options() -> None:
    parameters = inspect.signature(Router).parameters
    assert set(parameters) == set(OPTIONS)
    assert list(parameters)[:2] == ["worker_urls", "policy"]
    for name, option in OPTIONS.items():
        default = parameters[name].default
        if option["default"] is not None:
            # The default given is the default meant.
            assert by_keywords({name: default}) == by_keywords({})
        else:
            assert default in (None, [], {})
    assert set(typing.get_type_hints(_options.RouterOptions)) == set(OPTIONS) - {"worker_urls", "policy"}
