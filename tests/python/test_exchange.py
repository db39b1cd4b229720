"""What is sent to each route, and what is read off its answers, however they are cut into chunks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laboratory import requests
from sglang_router_rs.routing_test.exchange import (
    ERROR_CHARS,
    ROUTES,
    AnswerError,
    Events,
    Exchange,
    Json,
    error_text,
)

GENERATE, COMPLETIONS, CHAT = ROUTES

events = st.lists(st.binary(min_size=1, max_size=20).filter(lambda data: not set(data) & set(b"\r\n")), max_size=8)


@given(events, st.lists(st.integers(1, 7)), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_chunks_may_end_anywhere(wanted: list[bytes], sizes: list[int], line_end: bytes, spaced: bool) -> None:
    start = b"data: " if spaced else b"data:"
    # One space after the colon is not of the data.
    wanted = wanted if spaced else [data for data in wanted if not data.startswith(b" ")]
    stream = b"".join(start + data + line_end * 2 for data in wanted)
    reader, found, sizes = Events(), [], [*sizes, len(stream) + 1]
    while stream:
        size = sizes.pop(0)
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert found == [data for data in wanted if data]
    assert not reader.has_rest


def test_events_are_made_of_their_data_lines_only() -> None:
    reader = Events()
    stream = b": ping\n\nevent: message\ndata: a\n\ndata: b\ndata: c\n\ndata:\n\nretry: 5\n\n\n\ndata: [DONE]\n\n"
    assert reader.feed(stream) == [b"a", b"b\nc", b"[DONE]"]
    assert not reader.has_rest
    assert reader.feed(b"data: half") == []
    assert reader.has_rest


def exchange() -> Exchange:
    return Exchange("r-1", requests(1, output_length=3)[0])


def read(route: str, *answers: Json) -> Exchange:
    """An answer whose frames come at seconds 1, 2, …"""
    made = exchange()
    for second, answer in enumerate(answers, 1):
        ROUTES[route].read(made, answer, float(second))
    return made


def tokens(count: int, **more: Any) -> Json:
    return {"text": "a" * count, "meta_info": {"id": "w", "completion_tokens": count, "prompt_tokens": 5, **more}}


def delta(route: str, text: str | None, **more: Any) -> Json:
    said = {"text": text} if route == COMPLETIONS else {"delta": {"content": text}}
    return {"id": "w", "choices": [{**said, **more}]}


END = {"finish_reason": {"type": "length", "length": 3}}
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def test_generate_repeats_all_tokens_so_far() -> None:
    made = read(GENERATE, tokens(1), tokens(1), tokens(3, cached_tokens=4), tokens(3, cached_tokens=4, **END))
    assert (made.first_content_at, made.last_content_at) == (1.0, 3.0)
    assert made.gaps == [(2.0, 2)]
    assert (made.prompt_tokens, made.cached_tokens, made.completion_tokens, made.tokens_received) == (5, 4, 3, 3)
    assert made.answer_id == "w"


def test_generate_keeps_the_last_count_of_an_answer_that_broke_off() -> None:
    made = read(GENERATE, tokens(1), tokens(2))
    assert (made.tokens_received, made.completion_tokens, made.stamps) == (2, None, {})


def test_generate_without_counts_is_timed_by_its_text() -> None:
    made = read(GENERATE, {"text": ""}, {"text": "a"}, {"text": "ab"}, {"meta_info": None})
    assert (made.first_content_at, made.last_content_at) == (2.0, 3.0)
    assert (made.tokens_received, made.prompt_tokens, made.cached_tokens, made.answer_id) == (None,) * 4


def test_stamps_are_kept_by_the_ends_of_their_names() -> None:
    told = {
        "queue_time": 0.5,
        "prefill_finished_ts": 3,
        "e2e_latency": 1.5,
        "forward_entry_time": None,
        "is_time": True,
        "start_time": "noon",
        "weight_version": 1,
        "decode_throughput": 9.0,
    }
    kept = {"queue_time": 0.5, "prefill_finished_ts": 3.0, "e2e_latency": 1.5, "decode_throughput": 9.0}
    assert read(GENERATE, tokens(3, **told, **END)).stamps == kept
    assert read(GENERATE, tokens(2, **told)).stamps == {}


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_openai_streams_count_their_tokens_at_the_end(route: str) -> None:
    frames = [
        delta(route, ""),
        delta(route, "a"),
        delta(route, "b c"),
        delta(route, None, finish_reason="length"),
        {"id": "w", "choices": [], "usage": USAGE},
    ]
    made = read(route, *frames)
    assert (made.first_content_at, made.last_content_at, made.gaps) == (2.0, 3.0, [(1.0, 1)])
    assert (made.prompt_tokens, made.cached_tokens, made.completion_tokens, made.tokens_received) == (5, 4, 3, 3)
    assert made.answer_id == "w"
    # Without its usage nobody knows.
    cut = read(route, *frames[:-1])
    assert (cut.prompt_tokens, cut.cached_tokens, cut.completion_tokens, cut.tokens_received) == (None,) * 4


def test_openai_answers_may_tell_no_cached_tokens() -> None:
    for details in ({}, {"prompt_tokens_details": None}):
        usage = {"prompt_tokens": 5, "completion_tokens": 3, **details}
        whole = {"id": "w", "choices": [{"message": {"content": "a"}}], "usage": usage}
        made = read(CHAT, whole)
        assert (made.prompt_tokens, made.cached_tokens, made.completion_tokens) == (5, None, 3)


@pytest.mark.parametrize("said", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}, {"content": "a"}])
def test_content_is_what_a_chat_says_thinks_or_calls(said: Json) -> None:
    assert read(CHAT, {"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": said}]}).gaps == []
    assert read(CHAT, {"choices": [{"delta": said}]}).first_content_at == 1.0


@pytest.mark.parametrize(
    ("route", "frame", "message"),
    [
        (GENERATE, tokens(1, finish_reason={"type": "abort", "message": "too\nold"}), "aborted by the worker: too old"),
        (GENERATE, tokens(1, finish_reason={"type": "abort"}), "aborted by the worker: no reason given"),
        (COMPLETIONS, delta(COMPLETIONS, "", finish_reason="abort"), "aborted by the worker"),
        (CHAT, delta(CHAT, None, finish_reason="abort"), "aborted by the worker"),
    ],
)
def test_an_abort_is_no_success(route: str, frame: Json, message: str) -> None:
    with pytest.raises(AnswerError) as error:
        read(route, frame)
    assert str(error.value) == message


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_bodies_ask_for_so_many_tokens(route: str, stream: bool) -> None:
    request = requests(1, output_length=7)[0]
    for ends_early in (True, False):
        body = json.loads(json.dumps(ROUTES[route].body(request, "m", stream, not ends_early)))
        limits = body["sampling_params"] if route == GENERATE else body
        assert limits["ignore_eos"] is not ends_early
        assert limits["temperature"] == 0
        assert limits["max_new_tokens" if route == GENERATE else "max_tokens"] == 7
        assert bool(body.get("stream")) is stream
    if route != GENERATE:
        assert body["model"] == "m"
        assert body.get("stream_options") == ({"include_usage": True} if stream else None)
    asked = {GENERATE: body.get("text"), COMPLETIONS: body.get("prompt")}
    assert asked.get(route) == (None if route == CHAT else "prompt 0")
    assert body.get("messages") == ([{"role": "user", "content": "prompt 0"}] if route == CHAT else None)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "no"}', "no"),
        (b'{"message": "plain"}', "plain"),
        (b'{"object": "error", "code": 1}', '{"object": "error", "code": 1}'),
        (b"[1, 2]", "[1, 2]"),
        (b"<h1>\n  bad   gateway\n</h1>", "<h1> bad gateway </h1>"),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b'"\\ud800"', "\\ud800"),
        (b"[" * 100_000, "[" * ERROR_CHARS),
        (b"x" * 1000, "x" * ERROR_CHARS),
    ],
)
def test_an_error_is_told_in_one_line(body: bytes, text: str) -> None:
    assert error_text(body) == text


names = st.sampled_from(["delta", "text", "completion_tokens", "prompt_tokens", "queue_time", "finish_reason"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner), max_leaves=12)


@given(values, st.sampled_from(sorted(ROUTES)))
def test_an_answer_of_any_shape_is_read_or_refused(value: object, route: str) -> None:
    answer = {"meta_info": value, "choices": value, "usage": value}
    made = exchange()
    try:
        ROUTES[route].read(made, answer, 1.0)
    except (AttributeError, OverflowError, TypeError, ValueError):
        return
    for count in (made.prompt_tokens, made.cached_tokens, made.completion_tokens, made.tokens_received):
        assert count is None or type(count) is int
