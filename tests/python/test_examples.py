"""Examples in docstrings run, and generated files are current."""

from __future__ import annotations

import importlib
import pkgutil
import re
import signal
import textwrap

import pytest
import sglang_router_rs
from running import Program

MODULES = [sglang_router_rs] + [
    importlib.import_module(f"sglang_router_rs.{module.name}")
    for module in pkgutil.iter_modules(sglang_router_rs.__path__)
    if module.name != "__main__"
]
EXAMPLES = [
    pytest.param(textwrap.dedent(block), id=module.__name__)
    for module in MODULES
    for block in re.findall(r"(?:^    .*\n|^\n)+", module.__doc__ or "", re.MULTILINE)
    if block.strip()
]


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_until_it_is_told_to_end(example: str) -> None:
    # Its port is for readers; a test takes a free one.
    script = re.sub(r"port=\d+", "port=0", example)
    with Program("-c", script) as program:
        url = program.router_url()
        assert url.startswith("http://127.0.0.1:")
        program.send(signal.SIGTERM)
        assert program.end() == 0, program.output


def test_generated_files_are_current() -> None:
    with Program("tools/generate.py", "--check") as program:
        assert program.end() == 0, program.output


def test_every_public_name_is_documented() -> None:
    for name in sglang_router_rs.__all__:
        value = getattr(sglang_router_rs, name)
        assert name == "__version__" or value.__doc__
