"""Policies of your own: what they see, and how they are found.

A policy is a function ``choose(request, workers) -> index``, or an object with that method and, if it wants to learn,
``finished(record)``. See ``docs/own-policy.md``.
"""

from __future__ import annotations

import inspect
import re
import stat
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

# Longest name in traces and metrics, in characters; the core allows as many bytes.
_NAME_MAX = 64


class RequestView(Protocol):
    """A request that is to be sent to a worker."""

    @property
    def request_id(self) -> str | None:
        """The id it is traced by; in a replay its place in the trace."""

    @property
    def tokens(self) -> int:
        """Tokens of its prompt, estimated from its bytes."""

    @property
    def prompt_bytes(self) -> int:
        """Bytes of its prompt, four for each token id."""

    @property
    def route(self) -> str:
        """The path, such as ``/generate``."""

    @property
    def model(self) -> str | None:
        """The model it asks for."""

    @property
    def stream(self) -> bool:
        """Whether it asks for a stream."""

    @property
    def routing_key(self) -> str | None:
        """Its header ``x-smg-routing-key``."""

    @property
    def at_secs(self) -> float:
        """When it is routed, in seconds of a clock that never goes back; in a replay the trace's own."""


class WorkerView(Protocol):
    """A worker that may be chosen now."""

    @property
    def url(self) -> str:
        """Its URL."""

    @property
    def node_id(self) -> str:
        """Its short name, as in traces."""

    @property
    def in_flight(self) -> int:
        """Requests sent to it that have not ended."""

    @property
    def pending_tokens(self) -> int:
        """Tokens of prompts it has still to compute, as the router believes."""

    @property
    def matched_tokens(self) -> int:
        """Tokens of this prompt that are in its cache, as the router believes."""

    @property
    def same_prefix(self) -> int:
        """Requests in flight there for the part of this prompt that is cached at any worker."""

    @property
    def speed(self) -> float | None:
        """Tokens of prompts it computes in a second; ``None`` until one worker's are known."""

    @property
    def weight(self) -> float:
        """Its weight in ``worker_weights``, 1 by default."""

    @property
    def last_ttft_ms(self) -> float | None:
        """Milliseconds to the first token of its latest stream; ``None`` until there is one."""

    @property
    def last_e2e_ms(self) -> float | None:
        """Milliseconds its latest answer took; ``None`` until there is one."""


class Policy(Protocol):
    """A policy of your own, as an object. It may also have ``finished(self, record)``.

    ``finished`` hears of each request that is over, as ``GET /v1/traces`` tells it: a dict. It needs
    ``enable_request_tracking``, and is called by one thread, after the fact.
    """

    def choose(self, request: RequestView, workers: Sequence[WorkerView]) -> int:
        """The place in ``workers`` of the one to send to. Is called by several threads, by turns."""


Choose = Callable[[RequestView, Sequence[WorkerView]], int]
Finished = Callable[[Mapping[str, Any]], object]

# choose, finished if there is one, and what it is called: a name, or FILE.py:NAME.
Own = tuple[Choose, Finished | None, str]


def own(policy: object, name: str | None = None) -> Own:
    """What the core takes for a function or an object with ``choose``.

    Raises:
        ValueError: it is neither, or takes other arguments, or does not answer at once; says which.
    """
    if isinstance(policy, type):
        # A class stands for an object of it.
        name = name or policy.__name__
        _check_call(policy, f"{name}()", 0)
        try:
            policy = policy()
        # Whatever it raises, also an exit, is told and not done.
        except BaseException as error:
            raise ValueError(f"policy: {name}() raised:\n{traceback.format_exc().rstrip()}") from error
    choose = getattr(policy, "choose", policy)
    if not callable(choose):
        # A file can name no policy but its own.
        others = "a PolicyType, nor its name, nor FILE.py:NAME, nor " if name is None else ""
        raise ValueError(
            f"policy: {policy!r} is neither {others}callable, nor an object with choose(request, workers), nor a class "
            "of such objects"
        )
    if name is None:
        name = str(getattr(policy, "__name__", type(policy).__name__))
    _check_call(choose, f"{name}: choose(request, workers)", 2)
    _check_plain(choose, f"{name}: choose(request, workers)")
    finished = getattr(policy, "finished", None)
    if finished is not None:
        if not callable(finished):
            raise ValueError(f"policy: {name}.finished is {finished!r}, which is not callable")
        _check_call(finished, f"{name}: finished(record)", 1)
        _check_plain(finished, f"{name}: finished(record)")
    return cast(Choose, choose), finished, _plain(name)


def load(text: str) -> Own:
    """The policy that ``FILE.py:NAME`` names: a function, an object with ``choose``, or a class of such objects.

    The file is read and run as a module of its own each time, with its folder on the path of imports.

    Raises:
        ValueError: the file does not exist or cannot be imported (its traceback is in the message), has no such
            name, or what it names is no policy.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    flaw = _flaw(path)
    if flaw is not None:
        raise ValueError(f"{text}: {flaw}")
    module = _module(path, text)
    try:
        policy = getattr(module, name)
    except AttributeError:
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        known = f"; it has {', '.join(names)}" if names else ""
        raise ValueError(f"{text}: {path} has no {name}{known}") from None
    try:
        choose, finished, _ = own(policy, name)
        return choose, finished, text
    except ValueError as error:
        raise ValueError(f"{text}: {str(error).removeprefix('policy: ')}") from error


def _flaw(path: Path) -> str | None:
    """Why a file cannot be read, if that is so."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return f"{path} is a folder, not a file"
        if not stat.S_ISREG(mode):
            return f"{path} is not a regular file"
        path.open("rb").close()
    # A null byte, or no characters of the file system, is a ValueError.
    except (FileNotFoundError, ValueError):
        return f"there is no file {path}"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def _module(path: Path, text: str) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{text}: {path} is no Python file")
    module = module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    # Where pickle, dataclasses and the like look for it, unless an import has that name already.
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    # Whatever it raises at import, also an exit, is told and not done.
    except BaseException as error:
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        raise ValueError(f"{text}: cannot be imported:\n{traceback.format_exc().rstrip()}") from error
    return module


def _check_call(function: Callable[..., object], shown: str, count: int) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Not known for some functions written in C.
        return
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        raise ValueError(f"policy: {shown} cannot be called so: {error}; its parameters are {signature}") from None


def _check_plain(function: Callable[..., object], shown: str) -> None:
    """See that a call does what it says, and is no promise to."""
    flaws = {
        "is async: nobody awaits it": (inspect.iscoroutinefunction, inspect.isasyncgenfunction),
        "has a yield: nobody iterates over it": (inspect.isgeneratorfunction,),
    }
    for flaw, has_it in flaws.items():
        # Of an object that can be called it is its __call__ that may be one.
        if any(check(call) for check in has_it for call in (function, type(function).__call__)):
            raise ValueError(f"policy: {shown} {flaw}; make it a plain function that returns its answer")


def _plain(name: str) -> str:
    plain = re.sub(r"\W+", "_", name).strip("_") or "policy"
    plain = f"_{plain}" if plain[0].isdigit() else plain
    return plain.encode()[:_NAME_MAX].decode(errors="ignore")
