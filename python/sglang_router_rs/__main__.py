"""``python -m sglang_router_rs <launch|sim>``: the command line of the Rust core."""

from __future__ import annotations

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


def main() -> int:
    """Run the command line in ``sys.argv``; returns its exit status."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
