"""The load: arrivals keep their rate, prompts have exactly the length they claim, and a broken dataset is named."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang_router_rs.routing_test import arrivals
from sglang_router_rs.routing_test.config import LoadConfig
from sglang_router_rs.routing_test.load import Load, Request, plan
from sglang_router_rs.routing_test.options import OptionError
from sglang_router_rs.routing_test.words import Tokenizer
from tokenizers import Tokenizer as Built
from tokenizers import models, normalizers, pre_tokenizers, trainers

PLAIN = [f"{first}{second}{third}" for first, second, third in itertools.product("bdfg", "aeiou", "klmnp")]
WRITE = Callable[[str, Any], str]


@pytest.fixture
def write(tmp_path: Path) -> WRITE:
    """Writes a dataset, lines of JSON or text as it is, and gives it as ``KIND:FILE``."""

    def write(kind: str, content: Any) -> str:
        lines = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content)
        path = tmp_path / f"{kind}.file"
        path.write_text(lines, encoding="utf-8")
        return f"{kind}:{path}"

    return write


def refusal(**options: Any) -> str:
    with pytest.raises(OptionError) as refused:
        plan(LoadConfig(**options))
    return str(refused.value)


def texts(requests: Sequence[Request]) -> list[str]:
    return [request.prompt.text() for request in requests]


def shared(one: str, other: str) -> int:
    """Tokens of four bytes that two texts begin with."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))) // 4


# Arrivals.

RATES = st.floats(1e-3, 1e6) | st.just(math.inf)


@given(st.integers(1, 300), RATES, st.integers(1, 20), st.integers(0, 2**40))
def test_arrivals_ascend_from_zero(count: int, rate: float, size: int, seed: int) -> None:
    def draw() -> np.random.Generator:
        return np.random.default_rng(seed)

    kinds = {
        "poisson": arrivals.poisson(count, rate, draw()),
        "constant": arrivals.constant(count, rate),
        "burst": arrivals.bursts(count, rate, size, draw()),
    }
    for times in kinds.values():
        assert len(times) == count
        assert times[0] == 0
        assert (np.diff(times) >= 0).all()
        assert np.isfinite(times).all()
        assert rate < math.inf or not times.any()
    assert arrivals.poisson(count, rate, draw()).tolist() == kinds["poisson"].tolist()


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 2**40))
def test_bursts_arrive_together(count: int, size: int, seed: int) -> None:
    times = arrivals.bursts(count, 10, size, np.random.default_rng(seed)).tolist()
    groups = [len(list(group)) for _, group in itertools.groupby(times)]
    assert groups == [size] * (count // size) + [count % size] * (count % size > 0)


@pytest.mark.parametrize("size", [1, 10])
def test_drawn_arrivals_have_their_rate_and_vary_as_poisson(size: int) -> None:
    moments = 200_000 // size
    times = arrivals.bursts(200_000, 50, size, np.random.default_rng(7))
    gaps = np.diff(times[::size])
    # Four standard errors of the mean of so many exponential gaps.
    assert gaps.mean() == pytest.approx(size / 50, rel=4 / math.sqrt(moments))
    assert gaps.std() == pytest.approx(size / 50, rel=8 / math.sqrt(moments))


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert arrivals.constant(5, 4).tolist() == [0, 0.25, 0.5, 0.75, 1]


@given(st.lists(st.floats(0, 1e6), min_size=1).map(sorted), st.floats(0.1, 100))
def test_recorded_arrivals_start_at_zero_and_pass_faster(times: list[float], speed: float) -> None:
    found = arrivals.recorded(times, speed)
    assert found[0] == 0
    assert found.tolist() == pytest.approx([(time - times[0]) / speed for time in times])


def test_arrivals_do_not_depend_on_the_dataset() -> None:
    one = plan(LoadConfig(num_requests=50, warmup=0))
    other = plan(LoadConfig(num_requests=50, warmup=3, dataset="shared-prefix", input_len=1000))
    assert [each.arrival_time for each in one.requests] == [each.arrival_time for each in other.requests]


# Drawn prompts.


@given(
    st.sampled_from(["random", "shared-prefix"]),
    st.integers(1, 3000),
    st.floats(0, 1),
    st.integers(0, 2**70),
    st.integers(0, 3),
)
def test_drawn_prompts_have_their_length_in_tokens_of_four_bytes(
    dataset: str, longest: int, ratio: float, seed: int, repeat: int
) -> None:
    lowest = max(1, round(ratio * longest))
    if dataset == "shared-prefix" and lowest == 1:
        longest, ratio, lowest = longest + 1, 1.0, longest + 1
    config = LoadConfig(
        num_requests=8,
        dataset=dataset,
        input_len=longest,
        output_len=longest,
        range_ratio=ratio,
        prefix_len=max(1, lowest - 1),
        seed=seed,
        warmup=3,
    )
    load = plan(config, repeat)
    assert (len(load.requests), len(load.warmup)) == (8, 3)
    for request in load.requests + load.warmup:
        assert len(request.prompt.text().encode()) == 4 * (request.input_length or 0)
        assert lowest <= (request.input_length or 0) <= longest
        assert lowest <= request.output_length <= longest
    assert texts(plan(config, repeat).requests) == texts(load.requests)


def test_lengths_are_drawn_from_end_to_end() -> None:
    load = plan(LoadConfig(num_requests=2000, input_len=10, output_len=20, range_ratio=0.5))
    assert {request.input_length for request in load.requests} == set(range(5, 11))
    assert {request.output_length for request in load.requests} == set(range(10, 21))


def test_random_prompts_differ_from_their_first_words_on() -> None:
    load = plan(LoadConfig(num_requests=3000, input_len=20, warmup=300))
    assert len({text[:8] for text in texts(load.requests + load.warmup)}) == 3300


def test_a_prompt_can_be_longer_than_any_tape() -> None:
    (request,) = plan(LoadConfig(num_requests=1, input_len=300_000, warmup=0)).requests
    assert len(request.prompt.text()) == 1_200_000


def test_prompts_share_a_prefix_and_no_more() -> None:
    load = plan(
        LoadConfig(num_requests=200, dataset="shared-prefix", input_len=100, prefix_len=64, num_prefixes=4, warmup=20)
    )
    measured = texts(load.requests)
    prefixes = {text[:256] for text in measured}
    assert len(prefixes) == 4
    for one, other in itertools.combinations(measured, 2):
        assert shared(one, other) < 4 or 64 <= shared(one, other) < 68
    assert all(shared(warm, prefix) < 4 for warm in texts(load.warmup) for prefix in prefixes)


def test_a_prefix_must_leave_room_for_a_suffix() -> None:
    assert refusal(dataset="shared-prefix", input_len=100, range_ratio=0.5, prefix_len=50) == (
        "prefix_len=50: must be below 50, the length of the shortest prompt (--range-ratio of --input-len)"
    )
    plan(LoadConfig(num_requests=5, dataset="shared-prefix", input_len=100, range_ratio=0.5, prefix_len=49))


def test_a_seed_is_a_load_and_a_repeat_is_another() -> None:
    def drawn(repeat: int = 0, **options: Any) -> list[Any]:
        load = plan(LoadConfig(num_requests=20, range_ratio=0.5, **options), repeat)
        return [(each.arrival_time, each.output_length, each.prompt.text()) for each in load.requests + load.warmup]

    assert drawn() == drawn(seed=0)
    different = [drawn(), drawn(1), drawn(2), drawn(seed=1), drawn(1, seed=1), drawn(seed=2**32)]
    assert all(one != other for one, other in itertools.combinations(different, 2))


def test_the_load_is_the_same_on_every_machine() -> None:
    (first, *_, last) = plan(LoadConfig(num_requests=3, input_len=6, range_ratio=0.5, seed=5)).requests
    assert first.prompt.text() == " riq riq riq kal giz pel"
    assert (last.input_length, last.output_length) == (6, 125)
    assert last.arrival_time == pytest.approx(0.01669829689394451)


def test_text_is_one_message_of_the_user_in_a_chat() -> None:
    (request,) = plan(LoadConfig(num_requests=1, warmup=0)).requests
    assert request.prompt.messages() == [{"role": "user", "content": request.prompt.text()}]


# Tokenizers.


def byte_level() -> Built:
    """As GPT, Llama 3 and Qwen: a space belongs to the word behind it."""
    built = Built(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = [" ".join(random.Random(seed).sample(PLAIN, 30)) for seed in range(200)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    return built


def sentence_pieces() -> Built:
    """As Llama 2: a space is put before the text, and nothing but merges keeps words apart."""
    marked = [f"▁{word}" for word in PLAIN]
    merges: dict[tuple[str, str], None] = {}
    for word in marked:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    pieces = dict.fromkeys(["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", *map("".join, merges)])
    built = Built(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(merges), unk_token="<unk>"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return built


def whole_words(words: Sequence[str] = PLAIN) -> Built:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[BOS]", *words])}
    built = Built(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    # Neither may count.
    built.enable_padding(length=7)
    built.enable_truncation(5)
    return built


def joining() -> Built:
    """Its merges go across words."""
    vocabulary = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = []
    for word in PLAIN[:40]:
        merges += [("▁", word[0]), (f"▁{word[0]}", word[1]), (f"▁{word[:2]}", word[2])]
    merges = [*dict.fromkeys(merges), (f"▁{PLAIN[0]}", f"▁{PLAIN[1]}")]
    pieces = dict.fromkeys([*vocabulary, *map("".join, merges)])
    built = Built(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return built


def saved(built: Built, path: Path) -> str:
    built.save(str(path))
    return str(path)


@pytest.mark.parametrize("build", [byte_level, sentence_pieces, whole_words])
@pytest.mark.parametrize("dataset", ["random", "shared-prefix", "trace"])
def test_drawn_prompts_have_their_length_in_tokens_of_the_tokenizer(
    build: Callable[[], Built], dataset: str, tmp_path: Path, write: WRITE
) -> None:
    saved(build(), tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(str(tmp_path / "tokenizer.json"))
    options: dict[str, Any] = {"input_len": 300, "range_ratio": 0.1, "prefix_len": 20, "num_requests": 40}
    if dataset == "trace":
        dataset = write("trace", made_trace(40))
    load = plan(LoadConfig(dataset=dataset, tokenizer=str(tmp_path), **options))
    for request in load.requests + load.warmup:
        assert tokenizer.count(request.prompt.text()) == request.input_length
    assert plan(LoadConfig(dataset=dataset, tokenizer=str(tmp_path), **options)).requests[7].prompt.text() == (
        load.requests[7].prompt.text()
    )


def test_prompts_of_files_are_counted(tmp_path: Path, write: WRITE) -> None:
    path = saved(whole_words(), tmp_path / "words.json")
    turns = [{"from": "human", "value": "bak bal bam"}, {"from": "gpt", "value": "dak dal"}]
    load = plan(
        LoadConfig(num_requests=1, dataset=write("sharegpt", json.dumps([{"conversations": turns}])), tokenizer=path)
    )
    assert (load.requests[0].input_length, load.requests[0].output_length) == (3, 2)
    messages = [{"role": "system", "content": "bak"}, {"role": "user", "content": "bal bam"}]
    lines = [{"prompt": "bak bal"}, {"prompt": "bak bal", "input_length": 9}, {"messages": messages}]
    load = plan(LoadConfig(num_requests=3, dataset=write("custom", lines), tokenizer=path))
    assert [request.input_length for request in load.requests] == [2, 9, 3]


def test_a_tokenizer_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "none.json")
    assert refusal(tokenizer=missing).startswith(f"tokenizer={missing!r}: cannot be read: ")
    assert "cannot be read: " in refusal(tokenizer=str(tmp_path))
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    assert "is no tokenizer.json: " in refusal(tokenizer=str(other))
    few = saved(whole_words(PLAIN[:15]), tmp_path / "few.json")
    assert refusal(tokenizer=few).endswith("has 15 plain words that are one token each, and prompts need 16 or more")
    joined = saved(joining(), tmp_path / "joined.json")
    assert refusal(tokenizer=joined).endswith("joins words into one token, so that prompts have no exact length")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert refusal(tokenizer=few).endswith("needs a package: pip install tokenizers")


# Traces.


def made_trace(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Chats whose turns begin with the whole blocks of the turn before."""
    draw = random.Random(seed)
    ids = itertools.count(1)
    chats: list[list[int]] = [[0]]
    lines, now = [], 100
    for _ in range(count):
        history = draw.choice(chats)
        length = 512 * len(history) + draw.randint(1, 2000)
        blocks = history + [next(ids) for _ in range(-(-length // 512) - len(history))]
        chats.append(blocks[: length // 512])
        lines.append(
            {"timestamp": now, "input_length": length, "output_length": draw.randint(1, 500), "hash_ids": blocks}
        )
        now += draw.choice([0, 3, 2500])
    return lines


def test_a_trace_keeps_times_lengths_and_shared_blocks(write: WRITE) -> None:
    lines = made_trace(60)
    load = plan(LoadConfig(num_requests=50, dataset=write("trace", lines), trace_speed=4, warmup=5))
    for request, line in zip(load.requests, lines, strict=False):
        assert request.arrival_time == pytest.approx((line["timestamp"] - 100) / 4000)
        assert (request.input_length, request.output_length) == (line["input_length"], line["output_length"])
        assert len(request.prompt.text()) == 4 * line["input_length"]
    for (one, first), (other, second) in itertools.combinations(
        list(zip(texts(load.requests), lines, strict=False)), 2
    ):
        ids = zip(first["hash_ids"], second["hash_ids"], strict=False)
        blocks = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ids))
        expected = min(512 * blocks, first["input_length"], second["input_length"])
        assert expected <= shared(one, other) < expected + 2
    assert all(shared(warm, text) < 4 for warm in texts(load.warmup) for text in texts(load.requests))


def test_every_block_is_known_by_its_first_two_words(write: WRITE) -> None:
    lines = [
        {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [7 * index]} for index in range(20_000)
    ]
    load = plan(LoadConfig(num_requests=20_000, dataset=write("trace", lines)))
    assert len({text[:8] for text in texts(load.requests)}) == 20_000


def test_a_repeat_of_a_trace_has_the_same_lines(write: WRITE) -> None:
    config = LoadConfig(num_requests=20, dataset=write("trace", made_trace(20)))
    one, other = plan(config), plan(config, 1)

    def lines(load: Load) -> list[tuple[Any, ...]]:
        return [(each.arrival_time, each.input_length, each.output_length) for each in load.requests]

    assert lines(one) == lines(other)
    assert texts(one.requests) != texts(other.requests)


def test_a_trace_can_arrive_otherwise(write: WRITE) -> None:
    load = plan(LoadConfig(num_requests=5, dataset=write("trace", made_trace(5)), arrivals="constant", request_rate=2))
    assert [request.arrival_time for request in load.requests] == [0, 0.5, 1, 1.5, 2]


LINE = {"timestamp": 5, "input_length": 513, "output_length": 4, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"timestamp": None}, "has no timestamp"),
        ({"timestamp": -1}, "timestamp must be a number from 0 on, not -1"),
        ({"timestamp": True}, "timestamp must be a number from 0 on, not true"),
        ({"timestamp": float("nan")}, "is no JSON: NaN is no number"),
        ({"timestamp": 4}, "timestamp goes back: times must not descend"),
        ({"input_length": 0}, "input_length must be a whole number from 1 on, not 0"),
        ({"input_length": 5.5}, "input_length must be a whole number from 1 on, not 5.5"),
        ({"output_length": "3"}, 'output_length must be a whole number from 1 on, not "3"'),
        ({"output_length": False}, "output_length must be a whole number from 1 on, not false"),
        ({"hash_ids": None}, "has no hash_ids"),
        ({"hash_ids": 3}, "hash_ids must be a list, not 3"),
        ({"hash_ids": [1, "2"]}, 'each of hash_ids must be a whole number from 0 on, not "2"'),
        ({"hash_ids": [1]}, "has 1 hash_ids, and input_length 513 needs 2: one per 512 tokens"),
    ],
)
def test_a_broken_line_of_a_trace_is_named(broken: dict[str, Any], problem: str, write: WRITE) -> None:
    dataset = write("trace", [LINE, LINE | broken, LINE])
    separator = " " if problem.startswith("is no JSON") else ": "
    assert refusal(num_requests=3, dataset=dataset) == f"dataset={dataset!r}: line 2{separator}{problem}"


# Files.


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]", ": must be an object, not [1]"),
        ("{", " is no JSON: Expecting property name enclosed in double quotes at character"),
        ("[" * 200_000, " is no JSON: "),
        ('{"prompt": 7}', ": prompt must be a text, not 7"),
        ('{"prompt": " "}', ": prompt is empty"),
        (r'{"prompt": "\ud800"}', ": prompt has half of a surrogate pair"),
        ('{"prompt": "a", "text": "b"}', ": has both prompt and text"),
        ('{"question": "a"}', ": has no prompt or text or messages or conversations or conversation"),
        ('{"prompt": "a", "output_length": 0}', ": output_length must be a whole number from 1 on, not 0"),
        ('{"prompt": "a", "output_length": 1, "max_tokens": 1}', ": has both output_length and max_tokens"),
        ('{"prompt": "a", "arrival_time": -1}', ": arrival_time must be a number from 0 on, not -1"),
        ('{"prompt": "a", "arrival_time": 1e999}', ": arrival_time must be a number from 0 on, not Infinity"),
        ('{"messages": "a"}', ': messages must be a list, not "a"'),
        ('{"messages": []}', ": messages is empty"),
        ('{"messages": [{"role": "user"}]}', ", messages[0]: has no content"),
        ('{"conversations": [{"content": "a"}]}', ": has no question with an answer"),
    ],
)
def test_a_broken_line_of_a_custom_dataset_is_named(line: str, problem: str, write: WRITE) -> None:
    dataset = write("custom", '{"prompt": "good"}\n\n' + line + "\n")
    assert refusal(num_requests=2, dataset=dataset).startswith(f"dataset={dataset!r}: line 3{problem}")


def test_a_custom_dataset_is_sent_in_its_order(write: WRITE) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?", "name": "me"}]
    lines = [
        {"prompt": "one", "max_tokens": 3, "input_length": 1, "arrival_time": 2},
        {"text": "two", "output_length": 4, "arrival_time": 2.5},
        {"messages": messages, "arrival_time": 4},
        {"conversations": [{"content": "four"}, {"content": "an answer"}], "arrival_time": 4},
        {"prompt": "not asked for"},
    ]
    load = plan(
        LoadConfig(num_requests=4, dataset=write("custom", lines), arrivals="trace", trace_speed=2, output_len=9)
    )
    assert texts(load.requests) == ["one", "two", "be brief\n\nwhy?", "four"]
    assert load.requests[2].prompt.messages() == messages
    assert [request.input_length for request in load.requests] == [1, None, None, None]
    assert [request.output_length for request in load.requests] == [3, 4, 9, 9]
    assert [request.arrival_time for request in load.requests] == [0, 0.25, 1, 1]
    assert not set(texts(load.warmup)) & set(texts(load.requests))


def test_arrivals_of_a_trace_need_times(write: WRITE) -> None:
    dataset = write("custom", [{"prompt": "a", "arrival_time": 1}, {"prompt": "b"}])
    problem = f"1 of the 2 requests of --dataset {dataset} have no time of their own"
    assert refusal(num_requests=2, dataset=dataset, arrivals="trace") == f"arrivals='trace': {problem}"
    assert refusal(arrivals="trace").startswith("arrivals='trace': 1000 of the 1000 requests of --dataset random")


def conversation(index: int) -> dict[str, Any]:
    turns = [("system", "be brief"), ("human", f"question {index}"), ("gpt", f"answer {index}"), ("human", "thanks")]
    return {"id": index, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def test_conversations_are_drawn_without_repetition(write: WRITE) -> None:
    dataset = write("sharegpt", json.dumps([conversation(index) for index in range(50)], indent=1))
    config = LoadConfig(num_requests=30, dataset=dataset, output_len=77)
    one, other = plan(config), plan(config, 1)
    asked = texts(one.requests)
    assert len(set(asked)) == 30
    assert set(asked) < {f"question {index}" for index in range(50)}
    assert {(each.input_length, each.output_length) for each in one.requests} == {(None, 77)}
    assert asked != texts(other.requests)
    assert asked == texts(plan(config).requests)
    assert one.notes == []
    everything = plan(LoadConfig(num_requests=50, dataset=dataset))
    assert sorted(texts(everything.requests)) == sorted(f"question {index}" for index in range(50))


def test_every_conversation_is_as_likely(write: WRITE) -> None:
    dataset = write("sharegpt", json.dumps([conversation(index) for index in range(4)]))
    drawn = [plan(LoadConfig(num_requests=1, dataset=dataset, warmup=0), repeat) for repeat in range(200)]
    counts = [sum(load.requests[0].prompt.text() == f"question {index}" for load in drawn) for index in range(4)]
    # Five standard deviations of the binomial distribution around 50.
    assert all(abs(count - 50) < 31 for count in counts)


def test_conversations_without_an_answer_are_passed_over_and_told(write: WRITE) -> None:
    useless = [
        {"conversations": []},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": "what?"}]},
        {"conversations": [{"from": "gpt", "value": "hello"}, {"from": "gpt", "value": "again"}]},
    ]
    other = {"conversation": [{"role": "user", "content": "other names"}, {"role": "assistant", "content": "yes"}]}
    dataset = write("sharegpt", json.dumps([*useless, conversation(1), other]))
    load = plan(LoadConfig(num_requests=2, dataset=dataset))
    assert set(texts(load.requests)) == {"question 1", "other names"}
    assert load.notes == ["passed over 4 of 6 conversations: no question with an answer"]
    assert refusal(num_requests=3, dataset=dataset) == (
        f"num_requests=3: {dataset.partition(':')[2]} has only 2 conversations with a question and an answer: ask for 2"
    )


def test_a_large_list_is_read_piece_by_piece(write: WRITE) -> None:
    many = [conversation(index) for index in range(400)]
    for index, each in enumerate(many):
        each["conversations"][1]["value"] = f"question {index} " + 'ä€😀\\"' * 2000
    dataset = write("sharegpt", json.dumps(many, ensure_ascii=False))
    load = plan(LoadConfig(num_requests=400, dataset=dataset))
    assert sorted(texts(load.requests)) == sorted(each["conversations"][1]["value"] for each in many)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "must be a JSON list"),
        ('{"conversations": []}', "must be a JSON list"),
        ("[7]", "conversation 1: must be an object, not 7"),
        ("[{},", "conversation 1: has no conversations or conversation"),
        ('[{"conversations": []}', "after conversation 1 must come a comma, or the end of the list"),
        ('[{"conversations": []}, {"conv', "conversation 2 is no JSON: Unterminated string starting at"),
        ('[{"conversations": []}] []', "must end with its list"),
        (
            '[{"conversations": [{"value": 1}, {"value": "b"}]}]',
            "conversation 1, conversations[0]: value must be a text, not 1",
        ),
        ('[{"conversations": NaN}]', "conversation 1 is no JSON: NaN is no number"),
        ("[" * 200_000, "conversation 1 is no JSON: "),
    ],
)
def test_a_broken_list_is_named(content: str, problem: str, write: WRITE) -> None:
    dataset = write("sharegpt", content)
    assert refusal(num_requests=1, dataset=dataset).startswith(f"dataset={dataset!r}: {problem}")


def test_a_dataset_must_be_a_kind_with_its_file(tmp_path: Path) -> None:
    kinds = "random, shared-prefix, sharegpt:FILE, custom:FILE, trace:FILE"
    for unknown in ("", "conversations.jsonl", "Random", "mooncake:x"):
        assert refusal(dataset=unknown) == f"dataset={unknown!r}: must be one of {kinds}"
    assert refusal(dataset="random:x") == "dataset='random:x': random takes no file"
    for missing in ("trace", "trace:", "trace:a\0b"):
        assert refusal(dataset=missing) == f"dataset={missing!r}: needs a file: trace:FILE"
    assert refusal(dataset=f"trace:{tmp_path / 'none'}").endswith(": cannot be read: No such file or directory")
    assert refusal(dataset=f"custom:{tmp_path}").endswith(": cannot be read: Is a directory")


@pytest.mark.parametrize("kind", ["sharegpt", "custom", "trace"])
def test_a_file_must_be_text(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(gzip.compress(b"{}"))
    assert refusal(dataset=f"{kind}:{file}").endswith("is compressed: unpack it first, with gunzip")
    file.write_bytes(b'{"prompt": "\xff"}')
    assert refusal(dataset=f"{kind}:{file}").endswith("is not UTF-8")


@pytest.mark.parametrize("kind", ["custom", "trace"])
def test_a_file_must_have_as_many_requests(kind: str, write: WRITE) -> None:
    dataset = write(kind, [LINE | {"prompt": "a"}] * 3)
    path = dataset.partition(":")[2]
    assert refusal(num_requests=4, dataset=dataset) == f"num_requests=4: {path} has only 3 lines: ask for 3"
    assert len(plan(LoadConfig(num_requests=3, dataset=dataset)).requests) == 3
    write(kind, "")
    assert refusal(num_requests=4, dataset=dataset) == f"num_requests=4: {path} has only 0 lines"
