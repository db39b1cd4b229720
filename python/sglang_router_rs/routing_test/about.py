"""What was run, where and when: what a figure must be printed with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from .config import LoadConfig

# Arguments whose values are nobody's business.
SECRET = re.compile(r"api.?key|secret|password|token$|authorization", re.IGNORECASE)


def about(config: LoadConfig, **more: Any) -> dict[str, Any]:
    """What was run and where, for a summary; without its keys."""
    return {"machine": machine(), "config": _without_secrets(asdict(config)), **more}


def _without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    def shown(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _without_secrets(value)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return _masked(value)
        return "***" if SECRET.search(name) and value is not None else value

    return {name: shown(name, value) for name, value in settings.items()}


def machine() -> dict[str, str]:
    """Versions, machine, date and command line of this process; what is not known is left out.

    Values of arguments that are named like secrets are masked.
    """
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command line": shlex.join(_masked(sys.argv)),
        "CPU": _cpu(),
        "cores": str(os.cpu_count() or ""),
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "sglang_router_rs": __version__,
        **{name: _version(name) for name in ("numpy", "pandas", "scipy", "matplotlib")},
    }
    return {name: value for name, value in found.items() if value}


def _cpu() -> str:
    try:
        described = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor()
    name = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return name[1] if name else platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _masked(arguments: Iterable[str]) -> list[str]:
    masked = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            masked.append("***")
            hide_next = False
            continue
        secret = bool(SECRET.search(name))
        masked.append(f"{name}=***" if secret and equals else argument)
        hide_next = secret and not equals and argument.startswith("-")
    return masked
