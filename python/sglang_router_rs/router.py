"""The router as a Python object: start, wait, stop, and read its traces without HTTP."""

from __future__ import annotations

import asyncio
import atexit
import enum
import inspect
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from . import _core, own_policy
from .client import Trace, TracingDisabled, listed

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ._options import RouterOptions
    from .own_policy import Choose, Policy

# How long a wait for the end lasts before Python looks for signals again.
_LOOK_EVERY_SECS = 0.1


class Router:
    """Routes requests to SGLang workers and remembers which worker served which request.

    Takes ``worker_urls``, ``policy`` (a ``PolicyType`` or its name; or one of your own: a function
    ``choose(request, workers) -> index``, an object that has it, or ``"FILE.py:NAME"``, see ``Policy``) and every
    other option by keyword; they are listed in ``docs/options.md`` and by ``help(Router)``. ``None`` leaves an
    option at its default. Options are checked here, before anything starts.

    Raises:
        TypeError: an unknown option (the nearest one is named), or a list or map given as something else.
        ValueError: a value out of range; names the option, the value and the range. Also a policy of your own that
            cannot be loaded or called.

    Use ``start()`` to serve until a signal, or a ``with`` block to serve in the background.
    """

    def __init__(
        self,
        worker_urls: Sequence[str] | None = None,
        policy: str | Policy | Choose | None = None,
        **options: Unpack[RouterOptions],
    ) -> None:
        is_option = policy is None or isinstance(policy, str)
        given = {"worker_urls": worker_urls, "policy": policy if is_option else None, **options}
        self._settings = [(name, option_texts(name, value)) for name, value in given.items() if value is not None]
        self._pid = os.getpid()
        self._server: _core.Server | None = None
        if is_option:
            file = _core.Server.policy_file(self._settings)
            self._own = None if file is None else own_policy.load(file)
        else:
            self._own = own_policy.own(policy)
        _core.Server.check(self._settings, self._own)

    def start(self) -> None:
        """Serve until stopped; blocks, with the GIL released.

        On the main thread SIGINT drains and raises ``KeyboardInterrupt``, SIGTERM drains and returns, a second
        signal ends at once, and earlier handlers are restored. Elsewhere, and under a running event loop, no
        signal handler is touched.

        Raises:
            OSError: the port is taken; names it.
            RuntimeError: it is serving already.
        """
        self._check_idle()
        try:
            if _may_handle_signals():
                _serve_until_signalled(self._begin)
            else:
                _wait(self._begin())
        except BaseException:
            if self._server is not None:
                self._server.stop()
                _wait(self._server)
            raise

    def stop(self, grace_secs: float | None = None) -> None:
        """Stop and wait for the end; from any thread, any number of times.

        Requests in flight have ``grace_secs`` to end (default: ``shutdown_grace_period_secs``).
        """
        self._check_process()
        if self._server is not None:
            self._server.drain(grace_secs)
            _wait(self._server)

    def wait_ready(self, timeout: float = 30) -> bool:
        """Wait until a worker can be picked. False after ``timeout`` seconds, or when the router has ended."""
        server = self._serving()
        deadline = time.monotonic() + timeout
        while not server.is_ready:
            left = deadline - time.monotonic()
            if left <= 0 or server.wait(min(0.01, left)):
                return False
        return True

    def __enter__(self) -> Self:
        self._check_idle()
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A forked child that leaves the block has nothing to stop.
        if self._is_own_process():
            self.stop()

    @property
    def is_running(self) -> bool:
        """Whether it serves or drains."""
        self._check_process()
        return self._server is not None and not self._server.wait(0)

    @property
    def port(self) -> int:
        """The port it listens on; with ``port=0`` the one it got."""
        return self._serving().address[1]

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host, port = self._serving().address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def trace(self, request_id: str) -> Trace | None:
        """The trace of one request, the newest with that id; ``None`` if there is none."""
        text = self._tracking().trace(request_id)
        return None if text is None else json.loads(text)

    def traces(self, limit: int | None = 100, **filters: Any) -> list[Trace]:
        """Traces, newest first: at most ``limit`` (``None``: all), filtered as ``GET /v1/traces`` does."""
        return listed(self._tracking(), limit, filters)

    def trace_stats(self) -> dict[str, Any]:
        """The statistics of ``GET /v1/traces/stats``."""
        stats: dict[str, Any] = json.loads(self._tracking().trace_stats())
        return stats

    def _check_idle(self) -> None:
        if self.is_running:
            raise RuntimeError("this router is serving already")

    def _begin(self) -> _core.Server:
        self._server = _core.Server(self._settings, self._own)
        if self._own is not None:
            _with_own_policies.add(self)
        return self._server

    def _serving(self) -> _core.Server:
        self._check_process()
        if self._server is None:
            raise RuntimeError("this router has not been started: call start(), or use it in a with-block")
        return self._server

    def _tracking(self) -> _core.Server:
        server = self._serving()
        if not server.has_tracker:
            raise TracingDisabled
        return server

    def _is_own_process(self) -> bool:
        return os.getpid() == self._pid

    def _check_process(self) -> None:
        if not self._is_own_process():
            raise RuntimeError("this router belongs to the process it was made in; after a fork, make a new Router")


# Routers that were started and call Python.
_with_own_policies: weakref.WeakSet[Router] = weakref.WeakSet()


@atexit.register
def _stop_calling() -> None:
    # An interpreter that is gone cannot be called.
    for router in list(_with_own_policies):
        if router._is_own_process() and router.is_running:
            router.stop(0)


def _signature() -> inspect.Signature:
    """The keywords of ``Router`` as the core declares them."""
    kind = inspect.Parameter.KEYWORD_ONLY
    first = inspect.Parameter.POSITIONAL_OR_KEYWORD
    options = {option["name"]: _default(option) for option in _core.options()}
    leading = ["worker_urls", "policy"]
    rest = [name for name in options if name not in leading]
    parameters = [inspect.Parameter(name, first, default=options[name]) for name in leading]
    parameters += [inspect.Parameter(name, kind, default=options[name]) for name in rest]
    return inspect.Signature(parameters)


def _default(option: _core.Option) -> Any:
    shape, text = option["shape"], option["default"]
    if shape in ("list", "map"):
        return [] if shape == "list" else {}
    if text is None:
        return None
    return {"bool": lambda: text == "true", "int": lambda: int(text), "float": lambda: float(text)}.get(
        shape, lambda: text
    )()


Router.__signature__ = _signature()  # type: ignore[attr-defined]

_SHAPES = {option["name"]: option["shape"] for option in _core.options()}


def option_texts(name: str, value: object) -> list[str]:
    """An option's value as the texts its parser takes."""
    shape = _SHAPES.get(name)
    if shape == "map":
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} takes a dict, not {type(value).__name__} {value!r}")
        return [f"{_text(key)}={_text(item)}" for key, item in value.items()]
    if shape == "list":
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise TypeError(f"{name} takes a list, not {type(value).__name__} {value!r}")
        return [_text(item) for item in value]
    return [_text(value)]


def _text(value: object) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return "true" if value else "false"
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _may_handle_signals() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def _wait(server: _core.Server) -> None:
    while not server.wait(_LOOK_EVERY_SECS):
        pass


def _serve_until_signalled(begin: Callable[[], _core.Server]) -> None:
    received: list[int] = []
    server: _core.Server | None = None

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if server is not None and len(received) > 1:
            server.stop()
        elif server is not None:
            server.drain()

    # Before the port opens: who sees it open may send a signal.
    earlier = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server = begin()
        if received:
            on_signal_before_start = server.stop if len(received) > 1 else server.drain
            on_signal_before_start()
        _wait(server)
    finally:
        for number, handler in earlier.items():
            # None: it was not set from Python, and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if received[:1] == [signal.SIGINT]:
        raise KeyboardInterrupt
