"""Options declared once: a field of a dataclass is the keyword, the flag, the help, the default and the range.

``option()`` makes such a field. ``check()`` judges the values of an object, ``add_flags()`` and ``given()`` make a
command line of a class and an object of a command line. Every error names the option and its value.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Any


class OptionError(ValueError):
    """A value that an option does not take: names option, value and what would be right."""

    def __init__(self, name: str, value: object, problem: str) -> None:
        super().__init__(f"{name}={value!r}: {problem}")
        self.name, self.value, self.problem = name, value, problem

    @property
    def as_flag(self) -> str:
        """The message in the words of the command line."""
        value = " ".join(map(str, self.value)) if isinstance(self.value, (list, tuple)) else self.value
        return f"--{self.name.replace('_', '-')} {value}: {self.problem}"


# Says what is wrong with a value, or nothing.
Check = Callable[[Any], "str | None"]


def at_least(lowest: float, infinite: bool = False) -> Check:
    """Numbers from ``lowest`` on, and ``inf`` where that means something; never NaN."""

    def check(value: float) -> str | None:
        fits = value >= lowest and (infinite or value < math.inf)
        return None if fits else f"must be a number from {lowest:g} on{', or inf' if infinite else ''}"

    return check


def above(bound: float) -> Check:
    """Numbers above ``bound``; not NaN, not infinite."""
    return lambda value: None if bound < value < math.inf else f"must be a number above {bound:g}"


def between(lowest: float, highest: float) -> Check:
    """Numbers from ``lowest`` to ``highest``."""
    return lambda value: None if lowest <= value <= highest else f"must be between {lowest:g} and {highest:g}"


def one_of(*choices: str) -> Check:
    """One of these words."""
    return lambda value: None if value in choices else f"must be one of {', '.join(choices)}"


def option(default: Any, meaning: str, check: Check | None = None, metavar: str | None = None) -> Any:
    """A field with its default, its help, and what its values must be; ``None`` is taken if it is the default."""
    metadata = {"help": meaning, "check": check, "metavar": metavar}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(options: Any) -> None:
    """Judge every value of an object of options.

    Raises:
        OptionError: for the first one that is out of range or of another type.
    """
    shapes = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None and field.default is None:
            continue
        wanted = _kinds(shapes[field.name])
        if not _is_a(value, wanted):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise OptionError(field.name, value, f"takes {names}, not {type(value).__name__}")
        if isinstance(value, list):
            _check_items(field.name, value, _item_kind(shapes[field.name]))
        judge = field.metadata.get("check")
        problem = judge(value) if judge else None
        if problem:
            raise OptionError(field.name, value, problem)


def _check_items(name: str, values: list[Any], wanted: type) -> None:
    for value in values:
        if not _is_a(value, (wanted,)):
            raise OptionError(name, values, f"takes a list of {wanted.__name__}, not of {type(value).__name__}")


def add_flags(parser: argparse.ArgumentParser, options: type, leave_out: frozenset[str] = frozenset()) -> None:
    """A flag for each option of the class."""
    shapes = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in leave_out:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        settings: dict[str, Any] = {"dest": field.name, "help": _help(field), "default": argparse.SUPPRESS}
        kinds = _kinds(shapes[field.name])
        if bool in kinds:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
            continue
        if list in kinds:
            items = _item_kind(shapes[field.name])
            settings |= {"action": "extend", "nargs": "+", "type": _list_parser(items)}
        else:
            settings["type"] = _parser(kinds[0])
        parser.add_argument(flag, metavar=field.metadata.get("metavar") or field.name.upper(), **settings)


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The options of the class that the command line holds."""
    names = {field.name for field in dataclasses.fields(options)}
    return {name: _flat(value) for name, value in vars(arguments).items() if name in names}


def _flat(value: Any) -> Any:
    return [item for items in value for item in items] if isinstance(value, list) else value


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    if field.default_factory is not dataclasses.MISSING:
        shown = ",".join(map(str, field.default_factory()))
    elif isinstance(field.default, bool):
        shown = "yes" if field.default else "no"
    else:
        shown = "" if field.default is None else str(field.default)
    return f"{text} [default: {shown}]" if shown else text


def _parser(kind: type) -> Callable[[str], Any]:
    # argparse names the function in its message.
    def number(text: str) -> Any:
        return kind(text)

    number.__name__ = {int: "whole number", float: "number"}.get(kind, kind.__name__)
    return number


def _list_parser(kind: type) -> Callable[[str], list[Any]]:
    """Lists are separated by commas, spaces or both."""
    parse = _parser(kind)

    def several(text: str) -> list[Any]:
        return [parse(item) for item in text.split(",") if item]

    several.__name__ = f"list of {parse.__name__}"
    return several


def _without_none(shape: Any) -> Any:
    if isinstance(shape, types.UnionType) or typing.get_origin(shape) is typing.Union:
        return next(part for part in typing.get_args(shape) if part is not types.NoneType)
    return shape


def _item_kind(shape: Any) -> type:
    kind: type = typing.get_args(_without_none(shape))[0]
    return kind


def _kinds(shape: Any) -> tuple[type, ...]:
    shape = _without_none(shape)
    return (typing.get_origin(shape) or shape,)


def _is_a(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)
