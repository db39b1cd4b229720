"""``python -m sglang_router_rs <launch|sim|replay|bench|compare>``: the command line.

The first three commands are the Rust core's, the others the routing laboratory's, as are the plots of ``replay``.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Mapping

from . import _core


def run(arguments: list[str], defaults: Mapping[str, str] | None = None) -> int:
    """Run a command line, with these defaults of options; returns its exit status. For the main thread."""
    # The core handles signals itself. Python's own handler would raise KeyboardInterrupt when all is done.
    earlier = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return _core.run(arguments, dict(defaults or {}))
    finally:
        signal.signal(signal.SIGINT, earlier)


# Commands in Python, by the module that has their ``main``.
LABORATORY = ("bench", "compare")


def main() -> int:
    """Run the command line in ``sys.argv``; returns its exit status."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    is_plotted = name == "replay" and any(argument.split("=")[0] == "--plot" for argument in rest)
    if name not in LABORATORY and not is_plotted:
        return run(sys.argv[1:])
    try:
        command = importlib.import_module(f"sglang_router_rs.routing_test.{name}")
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    status: int = command.main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
