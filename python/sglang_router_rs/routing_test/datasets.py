"""What is asked: the kinds of ``--dataset``, each a function that gives ``num_requests`` of its requests.

=================  ====================================================================================================
``random``         prompts of drawn words; no two share more than their first few words
``shared-prefix``  the same, behind one of ``num_prefixes`` prefixes of ``prefix_len`` tokens
``sharegpt:FILE``  the first question of conversations drawn from a JSON list of them (the format of ShareGPT_V3)
``custom:FILE``    JSON lines in the order of the file: ``prompt``, ``text``, ``messages`` or ``conversations``, and if
                   known ``input_length``, ``output_length`` (or ``max_tokens``) and ``arrival_time`` (seconds)
``trace:FILE``     JSON lines of the Mooncake traces: ``timestamp`` (ms), ``input_length``, ``output_length`` and
                   ``hash_ids``, one for each 512 tokens of the prompt: an equal id is an equal piece of text
=================  ====================================================================================================

Drawn prompts (all but those of ``sharegpt`` and ``custom``) have exactly their length: in tokens of the tokenizer, or
without one in tokens of four bytes. Prompts of a file are counted by the tokenizer; without one their length stays
unknown, and answers get ``output_len``. No count has what a server adds of its own: a BOS, a chat template.

Files are read piece by piece, and only what is asked is kept. What is broken is an ``OptionError`` with its line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from . import json_files
from .config import LoadConfig
from .json_files import Fields
from .options import OptionError
from .prompts import Chat, Drawn, Prompt, Text
from .words import Tokenizer, Words

# Tokens that one of a trace's hash_ids stands for.
BLOCK_TOKENS = 512

# Who asks in a conversation.
_ASKING = ("human", "user")


@dataclass(frozen=True, slots=True)
class Entry:
    """A request as the dataset has it."""

    prompt: Prompt
    # Tokens; None where nobody counted.
    input_length: int | None
    # Tokens that are asked for.
    output_length: int
    # Seconds on the dataset's own clock; None where it has none.
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What a dataset is made from: options, words, the randomness of one draw, and numbers of blocks not used yet."""

    config: LoadConfig
    words: Words
    tokenizer: Tokenizer | None
    draw: np.random.Generator
    numbers: Iterator[int]

    def block(self, tokens: int) -> tuple[int, int]:
        """A block of text like no other."""
        return next(self.numbers), tokens

    def count(self, text: str) -> int | None:
        """The tokens of a text, if there is a tokenizer."""
        return self.tokenizer.count(text) if self.tokenizer else None

    def wrong(self, problem: str) -> OptionError:
        """The error for a dataset that cannot be used."""
        return OptionError("dataset", self.config.dataset, problem)


def read(source: Source) -> tuple[list[Entry], list[str]]:
    """The ``num_requests`` requests of the dataset, and what its user should know about it.

    Raises:
        OptionError: the dataset is unknown, cannot be read, is broken or too small.
    """
    kind, _, path = source.config.dataset.partition(":")
    if kind in _DRAWN:
        if path:
            raise source.wrong(f"{kind} takes no file")
        return _DRAWN[kind](source), []
    if kind not in _READ:
        kinds = (*_DRAWN, *(f"{name}:FILE" for name in _READ))
        raise source.wrong(f"must be one of {', '.join(kinds)}")
    if not path or "\0" in path:
        raise source.wrong(f"needs a file: {kind}:FILE")
    try:
        with open(path, "rb") as file:
            entries, things, notes = _READ[kind](source, file)
    except OSError as error:
        raise source.wrong(f"cannot be read: {error.strerror or error}") from error
    if len(entries) < source.config.num_requests:
        more = f": ask for {len(entries)}" if entries else ""
        raise OptionError(
            "num_requests",
            source.config.num_requests,
            f"{path} has only {len(entries)} {things}{more}",
        )
    return entries, notes


def _random(source: Source) -> list[Entry]:
    return [Entry(Drawn(source.words, (source.block(asked),)), asked, answer) for asked, answer in _lengths(source)]


def _shared_prefix(source: Source) -> list[Entry]:
    config = source.config
    shortest = _shortest(config, config.input_len)
    if config.prefix_len >= shortest:
        problem = f"must be below {shortest}, the length of the shortest prompt (--range-ratio of --input-len)"
        raise OptionError("prefix_len", config.prefix_len, problem)
    prefixes = [source.block(config.prefix_len) for _ in range(config.num_prefixes)]
    chosen = source.draw.integers(config.num_prefixes, size=config.num_requests)
    entries = []
    for prefix, (asked, answer) in zip(chosen, _lengths(source), strict=True):
        blocks = prefixes[prefix], source.block(asked - config.prefix_len)
        entries.append(Entry(Drawn(source.words, blocks), asked, answer))
    return entries


def _lengths(source: Source) -> Iterator[tuple[int, int]]:
    """Tokens of each prompt and of its answer."""
    config = source.config

    def drawn(longest: int) -> list[int]:
        lengths = source.draw.integers(_shortest(config, longest), longest, config.num_requests, endpoint=True)
        return [int(length) for length in lengths]

    return zip(drawn(config.input_len), drawn(config.output_len), strict=True)


def _shortest(config: LoadConfig, longest: int) -> int:
    return max(1, round(config.range_ratio * longest))


# What reading a file gives: the requests, what errors call them, and notes.
_Found = tuple[list[Entry], str, list[str]]


def _sharegpt(source: Source, file: BinaryIO) -> _Found:
    wanted = source.config.num_requests
    kept: list[tuple[str, str]] = []
    usable = passed_over = 0
    for conversation in json_files.items(file, source.wrong, "conversation"):
        found = _question(conversation)
        if not found:
            passed_over += 1
            continue
        # Reservoir sampling (algorithm R): one pass, a bounded number kept, each conversation with equal chances.
        place = usable if usable < wanted else int(source.draw.integers(usable + 1))
        if place < wanted:
            kept[place : place + 1] = [found]
        usable += 1
    entries = [_asked(source, *kept[index]) for index in source.draw.permutation(len(kept))]
    things = "conversations with a question and an answer"
    notes = [f"passed over {passed_over} of {usable + passed_over} conversations: no question with an answer"]
    return entries, things, notes if passed_over else []


def _question(fields: Fields) -> tuple[str, str] | None:
    """The first question of a conversation and its answer, if it has both. A turn of nobody is a question."""
    for question, answer in itertools.pairwise(fields.objects("conversations", "conversation")):
        if question.any("from", "role") in (None, *_ASKING):
            asked, answered = question.text("value", "content"), answer.text("value", "content")
            return (asked, answered) if asked.strip() and answered.strip() else None
    return None


def _asked(source: Source, question: str, answer: str) -> Entry:
    counted = source.count(answer)
    # Nobody can ask for no token, and a tokenizer may know none of the words.
    output_length = source.config.output_len if counted is None else max(1, counted)
    return Entry(Text(question), source.count(question), output_length)


def _custom(source: Source, file: BinaryIO) -> _Found:
    lines = itertools.islice(json_files.lines(file, source.wrong), source.config.num_requests)
    return list(_ascending(((line, _custom_line(source, line)) for line in lines), "arrival_time")), "lines", []


def _custom_line(source: Source, line: Fields) -> Entry:
    kind = line.one("prompt", "text", "messages", "conversations", "conversation")
    entry = _conversation(source, line) if kind.startswith("conversation") else _prompt(source, line, kind)
    answer = line.present("output_length", "max_tokens")
    return replace(
        entry,
        input_length=line.whole("input_length", 1) if line.present("input_length") else entry.input_length,
        output_length=line.whole(answer, 1) if answer else entry.output_length,
        time=line.number("arrival_time") if line.present("arrival_time") else None,
    )


def _conversation(source: Source, line: Fields) -> Entry:
    found = _question(line)
    if not found:
        raise line.wrong("has no question with an answer")
    return _asked(source, *found)


def _prompt(source: Source, line: Fields, kind: str) -> Entry:
    if kind == "messages":
        turns = line.objects(kind)
        for turn in turns:
            turn.text("role")
            turn.text("content")
        prompt: Prompt = Chat(tuple(turn.as_dict() for turn in turns))
    else:
        prompt = Text(line.text(kind))
    if not prompt.text().strip():
        raise line.wrong(f"{kind} is empty")
    return Entry(prompt, source.count(prompt.text()), source.config.output_len)


def _trace(source: Source, file: BinaryIO) -> _Found:
    lines = itertools.islice(json_files.lines(file, source.wrong), source.config.num_requests)
    numbers: dict[int, int] = {}
    return list(_ascending(((line, _trace_line(source, line, numbers)) for line in lines), "timestamp")), "lines", []


def _trace_line(source: Source, line: Fields, numbers: dict[int, int]) -> Entry:
    """A request of a trace; ``numbers`` has the block of each id so far."""
    length = line.whole("input_length", 1)
    ids = line.wholes("hash_ids", 0)
    needed = -(-length // BLOCK_TOKENS)
    if len(ids) < needed:
        raise line.wrong(
            f"has {len(ids)} hash_ids, and input_length {length} needs {needed}: one per {BLOCK_TOKENS} tokens"
        )
    blocks = []
    for start, block in zip(range(0, length, BLOCK_TOKENS), ids, strict=False):
        if block not in numbers:
            numbers[block] = next(source.numbers)
        blocks.append((numbers[block], min(BLOCK_TOKENS, length - start)))
    prompt = Drawn(source.words, tuple(blocks))
    return Entry(prompt, length, line.whole("output_length", 1), line.number("timestamp") / 1000)


def _ascending(entries: Iterator[tuple[Fields, Entry]], field: str) -> Iterator[Entry]:
    latest = 0.0
    for line, entry in entries:
        if entry.time is not None:
            if entry.time < latest:
                raise line.wrong(f"{field} goes back: times must not descend")
            latest = entry.time
        yield entry


_DRAWN: dict[str, Callable[[Source], list[Entry]]] = {"random": _random, "shared-prefix": _shared_prefix}
_READ: dict[str, Callable[[Source, BinaryIO], _Found]] = {"sharegpt": _sharegpt, "custom": _custom, "trace": _trace}
