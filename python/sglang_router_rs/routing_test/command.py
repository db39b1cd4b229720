"""What the commands share: a command line made of options, errors in one line, outputs that can be written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from .options import OptionError, add_flags


def check_writable(name: str, path: Path) -> None:
    """See that a file can be written, before anything runs.

    Raises:
        OptionError: names the option, the path and the reason.
    """
    try:
        if path.is_dir():
            raise OptionError(name, str(path), "is a directory; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.probe")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OptionError(name, str(path), f"cannot be written: {error.strerror}") from None


class Parser(argparse.ArgumentParser):
    """A command line whose errors fit on one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"error: {message}\n")


def parser(command: str, options: type, description: str, examples: str) -> argparse.ArgumentParser:
    """The command line of ``python -m sglang_router_rs COMMAND``, with a flag for each of the options."""
    made = Parser(
        prog=f"python -m sglang_router_rs {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(made, options)
    return made


def complain(error: BaseException) -> int:
    """Tell what went wrong; the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 1
