"""Text with an exact number of tokens.

The one idea: text is made of words that are one token each, wherever they stand, so that n words are n tokens and texts
can be put together without counting again. Without a tokenizer a token is four bytes, as simulated workers count, and a
word is a space and three letters. With a tokenizer the words come from its vocabulary and are tried in every order.

Text comes in *blocks*. A block is known by its number: the same number is the same text, another number another text
from its first few words on. A block cut short is the beginning of the block.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .options import OptionError

if TYPE_CHECKING:
    import tokenizers

# What a simulated worker takes for one token.
TOKEN_BYTES = 4
# Block numbers are smaller.
MAX_BLOCKS = 2**32

# Words of a tokenizer at most: all pairs of them are tried.
_MOST_WORDS = 256
# Fewer would make blocks differ late.
_FEWEST_WORDS = 16
# Candidates that are tried at once.
_BATCH = 1024
# The words that follow a block's number are cut from a tape of so many random ones.
_TAPE_WORDS = 1 << 16
# Odd, so that neighbouring numbers start far apart on the tape, and no two of that many at the same place.
_TAPE_STEP = 7919

_PLAIN_WORD = re.compile("[Ġ▁]?([a-z]{2,12})")


class Tokenizer:
    """A model's tokenizer. Special tokens are left out: a server may put one (BOS) before the prompt."""

    def __init__(self, path: str) -> None:
        """Reads a ``tokenizer.json``, or the one in a directory.

        Raises:
            OptionError: it cannot be read, or the package ``tokenizers`` is not installed.
        """
        self.path = path
        self._tokenizer = _load(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def count(self, text: str) -> int:
        """The number of tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def vocabulary(self) -> list[str]:
        """Every token as the tokenizer writes it, by id."""
        ids = self._tokenizer.get_vocab(with_added_tokens=False)
        return sorted(ids, key=lambda token: ids[token])


class Words:
    """Words of one token each, in an order drawn by ``draw``, and the blocks of text made of them."""

    def __init__(self, tokenizer: Tokenizer | None, draw: np.random.Generator) -> None:
        """Finds the words.

        Raises:
            OptionError: the tokenizer has too few words that are one token wherever they stand.
        """
        # Some tokenizers put a space before a text themselves; for them the first word goes without.
        words, self._opening = (_four_byte_words(), " ") if tokenizer is None else _words_of(tokenizer)
        self._words = [f" {words[index]}" for index in draw.permutation(len(words))]
        self._digits = 1
        while len(words) ** self._digits < MAX_BLOCKS:
            self._digits += 1
        tape = [self._words[index] for index in draw.integers(len(words), size=_TAPE_WORDS)] * 2
        self._tape = "".join(tape)
        self._starts = [0, *itertools.accumulate(map(len, tape))]

    def write(self, blocks: Iterable[tuple[int, int]]) -> str:
        """The text of blocks one after the other, each given by its number and its length in tokens."""
        text = "".join(self._block(number, tokens) for number, tokens in blocks)
        return text.removeprefix(" ") if self._opening == "" else text

    def _block(self, number: int, tokens: int) -> str:
        start = number * _TAPE_STEP % _TAPE_WORDS
        # The lowest digit first: blocks numbered one after the other differ in their first word.
        head = []
        for _ in range(min(tokens, self._digits)):
            number, digit = divmod(number, len(self._words))
            head.append(self._words[digit])
        rounds, rest = divmod(tokens - len(head), _TAPE_WORDS)
        return "".join(head) + self._cut(start, _TAPE_WORDS) * rounds + self._cut(start, rest)

    def _cut(self, start: int, words: int) -> str:
        return self._tape[self._starts[start] : self._starts[start + words]]


def _four_byte_words() -> list[str]:
    consonants, vowels = "bcdfghjklmnpqrstvwxyz", "aeiou"
    return ["".join(letters) for letters in itertools.product(consonants, vowels, consonants)]


def _words_of(tokenizer: Tokenizer) -> tuple[list[str], str]:
    """Words of the tokenizer, and what stands before the first word of a text: a space or nothing."""
    most: dict[str, int] = {}
    opening = ""
    for before in ("", " "):
        words = dict(itertools.islice(_single_tokens(tokenizer, before), _MOST_WORDS))
        if len(words) > len(most):
            most, opening = words, before
    if len(most) < _FEWEST_WORDS:
        problem = f"has {len(most)} plain words that are one token each, and prompts need {_FEWEST_WORDS} or more"
        raise OptionError("tokenizer", tokenizer.path, problem)
    # Where every pair of words stays two tokens, no merge of a BPE crosses the border of two words in any text of them:
    # the first one to do so would depend on these two words alone.
    order = list(_every_pair(list(most)))
    (ids,) = tokenizer.encode([opening + " ".join(order)])
    if ids[1:] != [most[word] for word in order[1:]]:
        raise OptionError(
            "tokenizer", tokenizer.path, "joins words into one token, so that prompts have no exact length"
        )
    return list(most), opening


def _single_tokens(tokenizer: Tokenizer, before: str) -> Iterator[tuple[str, int]]:
    """Words that are one token both first in a text and later, with the token that they are later."""
    found: set[int] = set()
    matches = map(_PLAIN_WORD.fullmatch, tokenizer.vocabulary())
    candidates = list(dict.fromkeys(match[1] for match in matches if match))
    for first in range(0, len(candidates), _BATCH):
        batch = candidates[first : first + _BATCH]
        for word, ids in zip(batch, tokenizer.encode([f"{before}{word} {word} {word}" for word in batch]), strict=True):
            # A token twice would be the one for unknown words.
            if len(ids) == 3 and ids[1] == ids[2] and ids[1] not in found:
                found.add(ids[1])
                yield word, ids[1]


def _every_pair(words: list[str]) -> Iterator[str]:
    """Every word after every word, once: a de Bruijn sequence of order two, made of Lyndon words."""
    for index, word in enumerate(words):
        yield word
        for later in words[index + 1 :]:
            yield word
            yield later
    yield words[0]


def _load(path: str) -> tokenizers.Tokenizer:
    try:
        from tokenizers import Tokenizer as Loaded  # noqa: PLC0415
    except ImportError as error:
        raise OptionError("tokenizer", path, "needs a package: pip install tokenizers") from error
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        return Loaded.from_str(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("tokenizer", path, f"cannot be read: {error}") from error
    # The package raises nothing narrower.
    except Exception as error:
        raise OptionError("tokenizer", path, f"is no tokenizer.json: {error}") from error
