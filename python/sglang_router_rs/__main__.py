"""``python -m sglang_router_rs <launch|sim>``: the command line of the Rust core."""

from __future__ import annotations

import sys

from . import _core


def main() -> int:
    """Run the command line in ``sys.argv``; returns its exit status."""
    return _core.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
