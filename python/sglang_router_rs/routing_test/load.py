"""The load of a run: which requests are sent, and when; all of it known before the first is sent.

The same options, seed and repeat are the same load, to the byte, on every machine. Nothing is sent here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import arrivals, datasets
from .config import LoadConfig
from .datasets import Entry, Source
from .options import OptionError
from .prompts import Drawn, Prompt
from .words import TOKEN_BYTES, Tokenizer, Words


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send."""

    # Seconds from the first arrival.
    arrival_time: float
    # Tokens as the dataset has it; None where nobody counted.
    input_length: int | None
    # Tokens that are asked for.
    output_length: int
    prompt: Prompt


@dataclass(frozen=True)
class Load:
    """The requests of a run in the order of their arrival, and what comes before them."""

    requests: list[Request]
    # Sent before and not measured: as long as the first of the requests, in other words, all at once.
    warmup: list[Request]
    # What the user should know about the dataset, a sentence each.
    notes: list[str]


def plan(config: LoadConfig, repeat: int = 0) -> Load:
    """The load of these options. Each ``repeat`` is another draw: other words, lengths and times.

    Of a trace and of a custom dataset only the words drawn for it are others, and drawn arrival times.

    Raises:
        OptionError: the dataset, the tokenizer or the arrivals cannot be used as asked.
    """
    tokenizer = None if config.tokenizer is None else Tokenizer(config.tokenizer)
    # Apart, so that another dataset has the same schedule.
    for_words, for_dataset, for_arrivals = map(
        np.random.default_rng, np.random.SeedSequence(config.seed, spawn_key=(repeat,)).spawn(3)
    )
    source = Source(config, Words(tokenizer, for_words), tokenizer, for_dataset, itertools.count())
    entries, notes = datasets.read(source)
    times = _times(config, entries, for_arrivals)
    requests = [
        Request(time, entry.input_length, entry.output_length, entry.prompt)
        for time, entry in zip(times.tolist(), entries, strict=True)
    ]
    warmup = [_warmup(source, entry) for entry in itertools.islice(itertools.cycle(entries), config.warmup)]
    return Load(requests, warmup, notes)


def _times(config: LoadConfig, entries: list[Entry], draw: np.random.Generator) -> arrivals.Times:
    count, rate = len(entries), config.request_rate
    match config.arrivals or ("trace" if config.dataset.startswith("trace:") else "poisson"):
        case "poisson":
            return arrivals.poisson(count, rate, draw)
        case "constant":
            return arrivals.constant(count, rate)
        case "burst":
            return arrivals.bursts(count, rate, config.burst_size, draw)
    times = [entry.time for entry in entries if entry.time is not None]
    if len(times) < count:
        problem = (
            f"{count - len(times)} of the {count} requests of --dataset {config.dataset} have no time of their own"
        )
        raise OptionError("arrivals", "trace", problem)
    return arrivals.recorded(times, config.trace_speed)


def _warmup(source: Source, entry: Entry) -> Request:
    # Where nobody counted there is no tokenizer, and words have four bytes.
    tokens = entry.input_length or -(-len(entry.prompt.text().encode()) // TOKEN_BYTES)
    return Request(0.0, entry.input_length, entry.output_length, Drawn(source.words, (source.block(tokens),)))
