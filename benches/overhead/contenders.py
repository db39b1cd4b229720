"""The contenders of the overhead bench and the workers behind them: how each is started, and what it has used.

A contender runs on a core of its own; its workers and its clients share the other. HAProxy and nginx are set up as
proxies that read of a request no more than they must, with connections to the workers that stay open.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from trial import START_SECS, Failure, Processes, free_ports, resident_kib, their_command, until_open

CONTENDER_CORE, LOAD_CORE = "0", "1"
WORKERS = 4
TICKS_PER_SEC = os.sysconf("SC_CLK_TCK")
# Programs of the system may be where only its administrator looks.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
ANSWER = {
    "text": " a b c d e f g h",
    "meta_info": {
        "id": "0123456789abcdef0123456789abcdef",
        "finish_reason": {"type": "length", "length": 8},
        "prompt_tokens": 605,
        "completion_tokens": 8,
        "cached_tokens": 512,
    },
}
# One process, so that what is killed is all of it.
NGINX = """
daemon off; master_process off; pid {name}.pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off; default_type application/json; client_body_buffer_size 64k;
  keepalive_requests 100000000; keepalive_timeout 3600s;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  {http}
}}
"""
NGINX_WORKERS = """
  server {{
    {listen}
    location = /generate {{ return 200 '{answer}'; }}
    location = /health {{ return 200 ''; }}
    location / {{ return 404 ''; }}
  }}
"""
NGINX_PROXY = """
  upstream workers {{ {servers} keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://workers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
"""
HAPROXY_CONFIG = """
global
  nbthread 1
  maxconn 8000
defaults
  mode http
  option http-keep-alive
  http-reuse always
  # Without it chunks of a stream are held back to be sent together.
  option http-no-delay
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend clients
  bind 127.0.0.1:{port}
  default_backend workers
backend workers
  balance roundrobin
{servers}
"""


@dataclass(frozen=True)
class Contender:
    """A program between clients and workers, and how it is set."""

    name: str
    policy: str = ""
    is_tracking: bool = True
    # The cores it runs on, as taskset has them.
    cores: str = CONTENDER_CORE

    def __str__(self) -> str:
        cores = "" if self.cores == CONTENDER_CORE else f" on cores {self.cores}"
        parts = [self.name, *([self.policy] if self.policy else []), *([] if self.is_tracking else ["untracked"])]
        return ":".join(parts) + cores

    @property
    def stem(self) -> str:
        """The name of its files."""
        return str(self).replace(":", "-").replace(" ", "-").replace(",", "-")


HAPROXY = Contender("haproxy")
THEIRS = Contender("sglang-router", "cache_aware")
OURS = Contender("ours", "cache_aware")
OURS_TTFT = Contender("ours", "least_ttft")
OURS_UNTRACKED = Contender("ours", "cache_aware", is_tracking=False)
ALL = (HAPROXY, Contender("nginx"), THEIRS, OURS, OURS_TTFT, OURS_UNTRACKED)


def contender(text: str) -> Contender:
    """A contender of the command line."""
    name, *rest = text.split(":")
    if name in ("haproxy", "nginx") and not rest:
        return Contender(name)
    if name == "sglang-router" and len(rest) == 1 and rest[0]:
        return Contender(name, rest[0])
    if name == "ours" and rest and rest[0] and rest[1:] in ([], ["untracked"]):
        return Contender(name, rest[0], is_tracking=len(rest) == 1)
    raise argparse.ArgumentTypeError(
        f"{text} is not haproxy, nginx, sglang-router:POLICY, ours:POLICY or ours:POLICY:untracked"
    )


@dataclass(frozen=True)
class Target:
    """What clients send to: a running contender, or a worker without one."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None = None

    def cpu_secs(self) -> float:
        """Time of processors it has used, all threads together."""
        if self.process is None:
            return 0.0
        if self.process.poll() is not None:
            raise Failure(f"{self.name} ended with exit status {self.process.returncode}")
        # The name in the second field may have spaces in it.
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SEC

    def rss_mb(self) -> float:
        """Its resident memory now, in 10^6 bytes."""
        kib = resident_kib(self.process.pid) if self.process else None
        return 0.0 if kib is None else kib * 1024 / 1e6


def found(program: str) -> str | None:
    """Where a program of the system is."""
    return shutil.which(program, path=PATH)


def check_installed(programs: Sequence[str]) -> None:
    """Say how to get what is missing."""
    if missing := sorted({it for it in programs if found(it) is None}):
        raise Failure(f"there is no {', '.join(missing)} here; on Debian: apt-get install {' '.join(missing)}")


def pinned(core: str, command: Sequence[str]) -> list[str]:
    """A command on these cores only."""
    return ["taskset", "-c", core, found(command[0]) or command[0], *command[1:]]


def start_nginx(processes: Processes, name: str, core: str, http: str) -> subprocess.Popen[bytes]:
    """An nginx with these servers."""
    path = processes.directory / f"{name}.conf"
    path.write_text(NGINX.format(name=name, http=http))
    return processes.start(name, pinned(core, ["nginx", "-p", str(path.parent), "-c", str(path)]))


async def start_workers(processes: Processes, run: str) -> list[int]:
    """Workers that answer /generate at once and always with the same; returns their ports."""
    ports = free_ports(WORKERS)
    listen = " ".join(f"listen 127.0.0.1:{port};" for port in ports)
    http = NGINX_WORKERS.format(listen=listen, answer=json.dumps(ANSWER, separators=(",", ":")))
    process = start_nginx(processes, f"{run}-workers", LOAD_CORE, http)
    await until_open(ports[-1], process)
    return ports


async def start_stream_workers(processes: Processes, run: str, load: str, gap_ms: float) -> list[int]:
    """Workers that answer /v1/completions with a chunk every so often; returns their ports."""
    ports = free_ports(WORKERS)
    command = [load, "worker", "--gap-ms", str(gap_ms), "--ports", *map(str, ports)]
    process = processes.start(f"{run}-workers", pinned(LOAD_CORE, command))
    await until_open(ports[-1], process)
    return ports


def our_command(program: str, who: Contender, port: int, workers: Sequence[int]) -> list[str]:
    """The command line of ours."""
    flags = [f"--port={port}", f"--policy={who.policy}", "--shutdown-grace-period-secs=1"]
    flags += ["--enable-request-tracking"] if who.is_tracking else []
    return [program, "launch", *flags, "--worker-urls", *urls(workers)]


def urls(ports: Sequence[int]) -> list[str]:
    """The workers' URLs."""
    return [f"http://127.0.0.1:{port}" for port in ports]


async def start(processes: Processes, run: str, who: Contender, program: str, workers: Sequence[int]) -> Target:
    """A contender, ready for requests."""
    port, name = free_ports(1)[0], f"{run}-{who.stem}"
    if who.name == "nginx":
        servers = " ".join(f"server 127.0.0.1:{it};" for it in workers)
        process = start_nginx(processes, name, who.cores, NGINX_PROXY.format(servers=servers, port=port))
    elif who.name == "haproxy":
        path = processes.directory / f"{name}.cfg"
        servers = "\n".join(f"  server worker{it} 127.0.0.1:{it}" for it in workers)
        path.write_text(HAPROXY_CONFIG.format(servers=servers, port=port))
        process = processes.start(name, pinned(who.cores, ["haproxy", "-db", "-f", str(path)]))
    else:
        is_ours = who.name == "ours"
        command = (
            our_command(program, who, port, workers)
            if is_ours
            else await their_command(port, who.policy, urls(workers))
        )
        process = processes.start(name, pinned(who.cores, command))
    await until_open(port, process)
    if who.name in ("ours", "sglang-router"):
        await until_ready(port, name)
    return Target(str(who), port, process)


async def until_ready(port: int, name: str) -> None:
    """Wait until a router finds all workers healthy."""
    deadline = time.monotonic() + START_SECS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{port}/readiness") as response:
                    if response.status == 200 and (await response.json())["healthy_workers"] == WORKERS:
                        return
            await asyncio.sleep(0.05)
    raise Failure(f"{name} does not find its {WORKERS} workers healthy; its log says why")
