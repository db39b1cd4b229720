"""The pages hold what they say: their code blocks run, their twins agree, their tables are complete.

The word after a block's language, which renderers ignore, says what a test can do with it:

    ```bash             run; must succeed, and show neither an error of the router nor a failed step
    ```bash server      started, and left running for the blocks that follow; stops an earlier one on its port
    ```bash elsewhere   not run, as it builds, installs, or needs GPUs: its commands, targets, paths and flags exist
    ```python           run as a program; `python server` as above
    ```python fragment  not run, as it is part of somebody's program: compiles
    ```json             parses; a trace in it has the fields of a trace
    ```yaml             shown only, but the flags and variables in it are options of the router

Blocks run in order in a copy of `examples/`, with the pages' ports replaced by free ones.
"""

import ast
import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from sglang_router_rs import Router, _core

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/guide.md", "docs/laboratory.md", "docs/operations.md", "docs/routing.md", "docs/traces.md"]
TWINS = [("README.md", "README.zh-CN.md"), ("docs/guide.md", "docs/guide.zh-CN.md")]
LINKED = [
    *PAGES,
    *(chinese for _, chinese in TWINS),
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/keys.md",
    "docs/monitoring.md",
    "docs/own-policy.md",
    "docs/performance.md",
    "docs/results.md",
    *(f"docs/decisions/{page.name}" for page in sorted((ROOT / "docs/decisions").iterdir())),
]
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# 29000 is the first port of the free ones, 30000 to 30010 are the next.
PORT = re.compile(r"\b(29000|300(?:0\d|10))\b")
PORTS = 12
# What a command that is not run here needs to exist.
ELSEWHERE = {
    "cargo build": ["Cargo.toml"],
    "cd": [],
    "make": ["Makefile"],
    "maturin build": ["pyproject.toml"],
    "pip install": ["pyproject.toml"],
    "python -m sglang.launch_server": [],
    "python -m venv": [],
    "scp": [],
    "source": [],
    "ssh": [],
}
SGLANG_FLAGS = {"--model-path", "--host", "--port", "--base-gpu-id"}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, what a test can do, code) of each block, in order."""
    return BLOCK.findall(text(page))


def free_ports() -> int:
    """The first of as many free ports in a row as the pages use, below those the system gives to others."""
    while True:
        base = random.randrange(10_000, 32_000)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(base, base + PORTS):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return base


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Page:
    """A page on its way: a directory, ports, and the servers it has started."""

    def __init__(self, directory: Path) -> None:
        self.base = free_ports()
        self.directory = directory
        # By the port each listens on, the last one its block names as such.
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        shutil.copytree(ROOT / "examples", directory / "examples")
        for script in (directory / "examples").glob("*.py"):
            script.write_text(self.moved(script.read_text()))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "no_proxy": "*"}
        self.place: dict[str, Any] = {"cwd": directory, "env": environment, "stdin": subprocess.DEVNULL}

    def port(self, written: int) -> int:
        return self.base if written == 29_000 else self.base + 1 + written - 30_000

    def moved(self, code: str) -> str:
        return PORT.sub(lambda found: str(self.port(int(found[0]))), code)

    def command(self, language: str, code: str) -> list[str]:
        strict = "set -euo pipefail\n"
        return ["bash", "-c", strict + code] if language == "bash" else [sys.executable, "-c", code]

    def run(self, language: str, code: str) -> None:
        command = self.command(language, self.moved(code))
        done = subprocess.run(command, **self.place, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
        assert '"error":{' not in done.stdout, f"{code}\n{done.stdout}"
        assert "❌" not in done.stdout, f"{code}\n{done.stdout}"

    def start(self, language: str, code: str) -> None:
        own = re.findall(r"port(?:s |=| )(\d+)", code)[-1]
        self.stop(own)
        log = self.directory / f"{own}.log"
        with log.open("wb") as output:
            command = self.command(language, self.moved(code))
            server = subprocess.Popen(
                command, **self.place, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.servers[own] = server
        deadline = time.monotonic() + 20
        for port in {self.port(int(found)) for found in PORT.findall(code)}:
            while not is_open(port):
                is_starting = server.poll() is None and time.monotonic() < deadline
                assert is_starting, f"{code}\n{log.read_text()}"
                time.sleep(0.02)

    def stop(self, port: str) -> None:
        if server := self.servers.pop(port, None):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=20)


def check_elsewhere(_language: str, code: str) -> None:
    for line in code.replace("\\\n", " ").strip().splitlines():
        command = next((known for known in ELSEWHERE if line.startswith(known)), None)
        assert command is not None, f"nobody knows whether this command works: {line}"
        assert all((ROOT / path).exists() for path in ELSEWHERE[command]), line
        if command == "make":
            targets = re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE)
            assert line.split()[1] in targets, line
        if command.endswith("launch_server"):
            assert set(re.findall(r"--[\w-]+", line)) <= SGLANG_FLAGS, line


def check_fragment(language: str, code: str) -> None:
    assert language == "python", language
    compile(code, "fragment", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path) -> None:
    page = Page(tmp_path)
    try:
        for language, how, code in blocks(name):
            if language in ("bash", "python"):
                ways = {"": page.run, "server": page.start, "elsewhere": check_elsewhere, "fragment": check_fragment}
                assert how in ways, f"unknown mark: {how}"
                ways[how](language, code)
            else:
                assert language in ("json", "text", "toml", "yaml"), f"unknown language: {language}"
    finally:
        for port in list(page.servers):
            page.stop(port)


def test_manifests_name_options() -> None:
    options = {option["name"] for option in _core.options()}
    manifests = [code for page in LINKED for language, _, code in blocks(page) if language == "yaml"]
    named = [name for code in manifests for name in re.findall(r"--(\w[\w-]*)|SGLANG_ROUTER__(\w+)", code)]
    assert named
    for flag, variable in named:
        assert flag.replace("-", "_") in options or variable.lower() in options, flag or variable


@pytest.mark.parametrize(("english", "chinese"), TWINS)
def test_twins_have_the_same_blocks_and_sections(english: str, chinese: str) -> None:
    assert blocks(english) == blocks(chinese)
    levels = [re.findall(r"^#+(?= )", BLOCK.sub("", text(page)), re.MULTILINE) for page in (english, chinese)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("name", LINKED)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(name)):
        assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"


def test_fields_of_traces_and_statistics_are_those_on_the_page() -> None:
    with Router([], port=0, log_level="off", enable_request_tracking=True) as router:
        with urllib.request.urlopen(f"{router.url}/v1/traces?format=csv") as answer:
            columns = next(csv.reader([answer.read().decode()]))
        stats = list(router.trace_stats())
    _, fields, statistics = re.split(r"^## (?=Fields$|Statistics$)", text("docs/traces.md"), flags=re.MULTILINE)
    row = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \|", re.MULTILINE)
    for section, names in [(fields.split("\n## ")[0], columns), (statistics.split("\n## ")[0], stats)]:
        assert [name for cell in row.findall(section) for name in re.findall(r"\w+", cell)] == names
    shown = [json.loads(code) for page in PAGES for language, _, code in blocks(page) if language == "json"]
    traces = [block for block in shown if "request_id" in block]
    assert traces
    assert all(list(trace) == columns for trace in traces)
