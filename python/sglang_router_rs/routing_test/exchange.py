"""One request and its answer: what is sent to each route, and what is read off the answer as it comes.

A route is a row of ``ROUTES``: how its body is written, and how a frame of its stream, or its whole answer, is read.
What an answer does not say stays ``None``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .columns import STAMP_ENDS

if TYPE_CHECKING:
    from .load import Request

Json = dict[str, Any]

# How much of an error message is kept.
ERROR_CHARS = 300
# What a column of whole numbers holds.
COUNT_MAX = 2**63 - 1


@dataclass(slots=True)
class Exchange:
    """A request on its way, and what is known of its answer so far. Times are of the run's clock, in seconds."""

    request_id: str
    request: Request
    # If it was written before its time, and has not left.
    body: bytes | None = None
    sent_at: float | None = None
    finished_at: float | None = None
    http_status: int | None = None
    # None until it has ended; then empty for a success.
    error: str | None = None
    # Of the router's headers.
    header_worker: str | None = None
    header_node: str | None = None
    # Of the answer itself.
    answer_id: str | None = None
    answer_port: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    # The last count, also of an answer that broke off.
    tokens_received: int | None = None
    stamps: dict[str, float] = field(default_factory=dict)
    first_content_at: float | None = None
    last_content_at: float | None = None
    # Seconds between two frames with content, and the tokens that the second one brought.
    gaps: list[tuple[float, int]] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """Whether the answer was a 2xx and came whole."""
        return self.error == ""

    def content(self, now: float, tokens: int = 1) -> None:
        """Content has come."""
        if self.first_content_at is None:
            self.first_content_at = now
        elif self.last_content_at is not None:
            self.gaps.append((now - self.last_content_at, tokens))
        self.last_content_at = now


class AnswerError(Exception):
    """What an answer says went wrong, in one line that any file can hold."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


@dataclass(frozen=True)
class Route:
    """A path, the body that asks for so many tokens there, and what its answers mean."""

    path: str
    # (request, model, whether the answer is a stream, whether it ends at its length only) -> body
    body: Callable[[Request, str | None, bool, bool], Json]
    # Takes what an answer, or one frame of it, says. Raises AnswerError if that is an error.
    read: Callable[[Exchange, Json, float], None]
    needs_model: bool


def _generate_body(request: Request, _model: str | None, stream: bool, ignore_eos: bool) -> Json:
    sampling = {"temperature": 0, "max_new_tokens": request.output_length, "ignore_eos": ignore_eos}
    return {"text": request.prompt.text(), "sampling_params": sampling, "stream": stream}


def _openai_body(request: Request, model: str | None, stream: bool, ignore_eos: bool) -> Json:
    body = {"model": model, "temperature": 0, "max_tokens": request.output_length, "ignore_eos": ignore_eos}
    return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body


def _completions_body(request: Request, model: str | None, stream: bool, ignore_eos: bool) -> Json:
    return {"prompt": request.prompt.text(), **_openai_body(request, model, stream, ignore_eos)}


def _chat_body(request: Request, model: str | None, stream: bool, ignore_eos: bool) -> Json:
    return {"messages": request.prompt.messages(), **_openai_body(request, model, stream, ignore_eos)}


def _read_generate(exchange: Exchange, answer: Json, now: float) -> None:
    meta = answer.get("meta_info") or {}
    before = exchange.tokens_received or 0
    count = _count(meta, "completion_tokens")
    if count is not None:
        exchange.tokens_received = count
    exchange.answer_id = meta.get("id", exchange.answer_id)
    exchange.answer_port = meta.get("worker_port", exchange.answer_port)
    exchange.prompt_tokens, exchange.cached_tokens = _count(meta, "prompt_tokens"), _count(meta, "cached_tokens")
    if count is not None and count > before:
        exchange.content(now, count - before)
    elif count is None and answer.get("text"):
        exchange.content(now)
    reason = meta.get("finish_reason")
    if reason is None:
        return
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise AnswerError(f"aborted by the worker: {reason.get('message') or 'no reason given'}")
    exchange.completion_tokens = count
    exchange.stamps = {name: float(value) for name, value in meta.items() if _is_stamp(name, value)}


def _read_openai(exchange: Exchange, answer: Json, now: float) -> None:
    exchange.answer_id = answer.get("id", exchange.answer_id)
    exchange.answer_port = answer.get("worker_port", exchange.answer_port)
    has_content = aborted = False
    for choice in answer.get("choices") or []:
        has_content = has_content or _has_content(choice)
        aborted = aborted or choice.get("finish_reason") == "abort"
    if has_content:
        exchange.content(now)
    if aborted:
        raise AnswerError("aborted by the worker")
    usage = answer.get("usage")
    if usage:
        exchange.prompt_tokens = _count(usage, "prompt_tokens")
        exchange.completion_tokens = exchange.tokens_received = _count(usage, "completion_tokens")
        exchange.cached_tokens = _count(usage.get("prompt_tokens_details") or {}, "cached_tokens")


def _count(said: Json, name: str) -> int | None:
    """A number of tokens; ``None`` if it is not told."""
    value = said.get(name)
    if value is not None and (type(value) is not int or not 0 <= value <= COUNT_MAX):
        raise ValueError(f"{name} is no number of tokens")
    return value


def _has_content(choice: Json) -> bool:
    said = choice.get("delta") or choice.get("message") or choice
    return bool(said.get("text") or said.get("content") or said.get("reasoning_content") or said.get("tool_calls"))


def _is_stamp(name: str, value: object) -> bool:
    return name.endswith(STAMP_ENDS) and isinstance(value, (int, float)) and not isinstance(value, bool)


ROUTES = {
    route.path: route
    for route in (
        Route("/generate", _generate_body, _read_generate, needs_model=False),
        Route("/v1/completions", _completions_body, _read_openai, needs_model=True),
        Route("/v1/chat/completions", _chat_body, _read_openai, needs_model=True),
    )
}


class Events:
    """The data of a stream of events, from chunks that end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that is whole now."""
        text = self._rest + chunk
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *events, self._rest = text.split(b"\n\n")
        return [data for data in map(self._data, events) if data]

    @property
    def has_rest(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._rest.strip())

    @staticmethod
    def _data(event: bytes) -> bytes:
        # Nearly all are of one line.
        if event.startswith(b"data:") and b"\n" not in event:
            return event[5:].removeprefix(b" ")
        lines = (line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))
        return b"\n".join(lines)


def error_text(body: bytes) -> str:
    """What the body of an error says, in one line."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        said = body.decode(errors="replace")
    if isinstance(said, dict):
        inner = said.get("error", said)
        said = inner.get("message", inner) if isinstance(inner, dict) else inner
    return _one_line(said if isinstance(said, str) else json.dumps(said))


def _one_line(text: str) -> str:
    # JSON may hold halves of characters, which no file takes.
    whole = text.encode(errors="backslashreplace").decode()
    return re.sub(r"\s+", " ", whole)[:ERROR_CHARS]
