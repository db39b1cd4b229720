"""JSON files that are larger than memory: lists and lines, an object at a time, whose errors say where they stand.

Knows nothing of what the objects mean. What is wrong is raised as what ``wrong`` makes of the problem.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

Wrong = Callable[[str], Exception]

# An object is not larger, or the file is of another kind.
_MAX_OBJECT_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20


class Fields:
    """An object of a file. A field that is ``null`` is one that is not there."""

    def __init__(self, where: str, value: object, wrong: Wrong) -> None:
        self.where = where
        self._wrong = wrong
        if not isinstance(value, dict):
            raise self.wrong(f"must be an object, not {_shown(value)}")
        self._values: dict[str, Any] = value

    def wrong(self, problem: str) -> Exception:
        """The error for something wrong with this object."""
        return self._wrong(f"{self.where}: {problem}")

    def any(self, *names: str) -> Any:
        """The first of these fields that is there, or None."""
        return next((self._values[name] for name in names if self._values.get(name) is not None), None)

    def one(self, *names: str) -> str:
        """Which of these fields is there; one of them must be."""
        present = self.present(*names)
        if present is None:
            raise self.wrong(f"has no {' or '.join(names)}")
        return present

    def present(self, *names: str) -> str | None:
        """Which of these fields is there, if one is; two are too many."""
        present = [name for name in names if self._values.get(name) is not None]
        if len(present) > 1:
            raise self.wrong(f"has both {present[0]} and {present[1]}")
        return present[0] if present else None

    def text(self, *names: str) -> str:
        """The text in the one of these fields that is there."""
        name = self.one(*names)
        value = self._values[name]
        if not isinstance(value, str):
            raise self.wrong(f"{name} must be a text, not {_shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(f"{name} has half of a surrogate pair") from None
        return value

    def objects(self, *names: str) -> list[Fields]:
        """The objects listed in the one of these fields that is there."""
        name = self.one(*names)
        value = self._values[name]
        if not isinstance(value, list):
            raise self.wrong(f"{name} must be a list, not {_shown(value)}")
        return [Fields(f"{self.where}, {name}[{index}]", item, self._wrong) for index, item in enumerate(value)]

    def whole(self, name: str, lowest: int) -> int:
        """A whole number from ``lowest`` on."""
        return _whole(self._needed(name), lowest, lambda problem: self.wrong(f"{name} {problem}"))

    def wholes(self, name: str, lowest: int) -> list[int]:
        """A list of whole numbers from ``lowest`` on."""
        value = self._needed(name)
        if not isinstance(value, list):
            raise self.wrong(f"{name} must be a list, not {_shown(value)}")
        return [_whole(item, lowest, lambda problem: self.wrong(f"each of {name} {problem}")) for item in value]

    def number(self, name: str) -> float:
        """A number from 0 on."""
        value = self._needed(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self.wrong(f"{name} must be a number from 0 on, not {_shown(value)}")
        return value

    def as_dict(self) -> dict[str, Any]:
        """The object as it stands in the file."""
        return self._values

    def _needed(self, name: str) -> Any:
        return self._values[self.one(name)]


def lines(file: BinaryIO, wrong: Wrong) -> Iterator[Fields]:
    """The objects of a file with one on each line. Blank lines are passed over."""
    for number in itertools.count(1):
        where = f"line {number}"
        line = file.readline(_MAX_OBJECT_BYTES + 1)
        if not line:
            return
        if number == 1:
            _refuse_gzip(line, wrong)
        if len(line) > _MAX_OBJECT_BYTES:
            raise wrong(f"{where} is longer than {_MAX_OBJECT_BYTES >> 20} MiB")
        if line.isspace():
            continue
        try:
            value = _JSON.decode(line.decode())
        except UnicodeDecodeError:
            raise wrong(f"{where} is not UTF-8") from None
        except json.JSONDecodeError as error:
            raise wrong(f"{where} is no JSON: {error.msg} at character {error.pos + 1}") from None
        except (ValueError, RecursionError) as error:
            raise wrong(f"{where} is no JSON: {error}") from None
        yield Fields(where, value, wrong)


def items(file: BinaryIO, wrong: Wrong, name: str) -> Iterator[Fields]:
    """The objects of a file that is one list; ``name`` is what errors call them, with their number from 1 on."""
    text = _Text(file, wrong)
    if not text.take("["):
        raise wrong("must be a JSON list")
    if text.take("]"):
        return
    for number in itertools.count(1):
        where = f"{name} {number}"
        yield Fields(where, text.value(where), wrong)
        if text.take("]"):
            break
        if not text.take(","):
            raise wrong(f"after {where} must come a comma, or the end of the list")
    if not text.take(""):
        raise wrong("must end with its list")


class _Text:
    """The part of a file that is being read. What was read already is let go."""

    def __init__(self, file: BinaryIO, wrong: Wrong) -> None:
        self._file = file
        self._wrong = wrong
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0

    def take(self, mark: str) -> bool:
        """Whether the next character, spaces aside, is this one (the empty one: the end); then it is passed."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._read(_CHUNK_BYTES):
                break
        is_next = self._text[self._at : self._at + 1] == mark
        self._at += len(mark) if is_next else 0
        return is_next

    def value(self, where: str) -> Any:
        """The value that comes next."""
        self.take("")
        while True:
            try:
                value, self._at = _JSON.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Perhaps the rest was not read yet. Twice as much each time: a long value is not decoded all too often.
                if not self._read(max(_CHUNK_BYTES, len(self._text) - self._at)):
                    raise self._wrong(f"{where} is no JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise self._wrong(f"{where} is no JSON: {error}") from None
            else:
                return value
            if len(self._text) > _MAX_OBJECT_BYTES:
                raise self._wrong(f"{where} is no JSON, or longer than {_MAX_OBJECT_BYTES >> 20} MiB")

    def _read(self, size: int) -> bytes:
        """The next bytes of the file, whose text is added; none at its end."""
        read = self._file.read(size)
        if self._text == "":
            _refuse_gzip(read, self._wrong)
        try:
            more = self._decoder.decode(read, final=not read)
        except UnicodeDecodeError:
            raise self._wrong("is not UTF-8") from None
        self._text = self._text[self._at :] + more
        self._at = 0
        return read


def _refuse_gzip(start: bytes, wrong: Wrong) -> None:
    if start.startswith(b"\x1f\x8b"):
        raise wrong("is compressed: unpack it first, with gunzip")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


# Without NaN and infinity, which Python would take.
_JSON = json.JSONDecoder(parse_constant=_refuse)


def _whole(value: object, lowest: int, wrong: Wrong) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise wrong(f"must be a whole number from {lowest} on, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"
