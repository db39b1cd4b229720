"""What a load is sent to, a router or one worker, and whether it can bear it: asked before any request is sent."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..client import AsyncRouterTraceClient, NotThisRouter, TracingDisabled
from .cluster import RunError
from .config import LoadConfig
from .exchange import ROUTES, error_text
from .generator import Target
from .load import Load
from .options import OptionError

ASK_SECS = 10.0
# Flushing is refused while a request runs; the last one may not have quite ended.
FLUSH_SECS = 10.0


@dataclass(frozen=True)
class Service:
    """A router, with or without request tracking, or one worker."""

    url: str
    is_router: bool = True
    has_traces: bool = True
    api_key: str | None = None
    admin_api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What requests carry."""
        return _bearer(self.api_key)

    def traces(self) -> AsyncRouterTraceClient:
        """A client of its traces."""
        return AsyncRouterTraceClient(self.url, headers=self.admin_headers)

    async def flush_caches(self) -> None:
        """Empty the cache of each worker, so that a run does not profit from what came before it.

        Raises:
            RunError: a worker refuses, for a while: what runs there must end first.
        """
        deadline = time.monotonic() + FLUSH_SECS
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
            while True:
                try:
                    async with session.post(self.url + "/flush_cache", headers=self.admin_headers) as response:
                        if response.status == 200:
                            return
                        said = f"HTTP {response.status}: {error_text(await response.read())}"
                except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
                    said = str(error) or type(error).__name__
                if time.monotonic() > deadline:
                    raise RunError(f"the caches cannot be emptied: {self.url}/flush_cache: {said}")
                await asyncio.sleep(0.1)

    @property
    def admin_headers(self) -> dict[str, str]:
        """What questions about traces and workers carry."""
        return _bearer(self.admin_api_key or self.api_key)


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


async def prepare(
    service: Service, config: LoadConfig, load: Load, decisions: str | None = None
) -> tuple[Target, list[str]]:
    """How the load is to be sent, and what its user should know before, in words.

    Raises:
        RunError: nobody answers there, or no worker is healthy.
        TracingDisabled: the router runs without request tracking.
        NotThisRouter: it is no sglang_router_rs.
        OptionError: the load is longer than the router remembers, or than the model takes.
    """
    timeout = aiohttp.ClientTimeout(total=ASK_SECS)
    async with aiohttp.ClientSession(timeout=timeout, headers=service.headers) as session:
        await _check_ready(service, session)
        notes: list[str] = []
        if service.has_traces:
            kept, notes = await _check_memory(service, config, load)
            if decisions is not None and not kept.get("trace_candidates"):
                raise OptionError(
                    "decisions", decisions, "the router keeps no candidates: start it with --trace-candidates=-1"
                )
        model = await _model(service, session)
        longest = model.get("max_model_len")
        if isinstance(longest, int):
            _check_lengths(config, load, longest)
        name = config.model or model.get("id")
        if ROUTES[config.route].needs_model and name is None:
            raise OptionError("model", None, f"{service.url}/v1/models names none; give its name")
        lacks = await _without_cache_report(service, config, session)
    target = Target(
        url=service.url,
        route=config.route,
        model=name,
        stream=config.stream,
        ignore_eos=config.ignore_eos,
        timeout_secs=config.timeout_secs,
        max_concurrency=config.max_concurrency,
        headers=service.headers,
    )
    return target, [*load.notes, *notes, *lacks]


async def _check_ready(service: Service, session: aiohttp.ClientSession) -> None:
    path = "/readiness" if service.is_router else "/health"
    try:
        async with session.get(service.url + path) as response:
            status = response.status
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        kind = "router" if service.is_router else "worker"
        reason = str(error) or type(error).__name__
        raise RunError(f"cannot reach {service.url}: is the {kind} running there? ({reason})") from None
    if status == 503 and service.is_router:
        raise RunError(f"the router at {service.url} has no healthy worker; GET {service.url}/workers says why")
    # Another server's 404 is told by the question for traces, in better words.
    if status != 200 and not service.has_traces:
        raise RunError(f"{service.url}{path} answers {status}; is it the right URL?")


async def _check_memory(service: Service, config: LoadConfig, load: Load) -> tuple[dict[str, Any], list[str]]:
    """The router's configuration of tracking, if it can remember the load, and a line if it may not."""
    try:
        async with service.traces() as client:
            kept: dict[str, Any] = (await client.get_trace_stats())["config"]
    except (TracingDisabled, NotThisRouter):
        raise
    except RuntimeError as error:
        raise RunError(f"{error}; a router with admin_api_key wants --admin-api-key") from None
    wanted = len(load.requests) + len(load.warmup)
    if wanted > kept["max_trace_entries"]:
        problem = f"with warm-up {wanted} requests, but the router remembers {kept['max_trace_entries']}: "
        raise OptionError("num_requests", config.num_requests, f"{problem}start it with --max-trace-entries {wanted}")
    span, ttl = load.requests[-1].arrival_time, kept["trace_ttl_seconds"]
    enough = int(span + config.timeout_secs) + 1
    if span >= ttl:
        problem = f"they arrive over {span:.0f} s, but the router forgets after {ttl:g} s: "
        raise OptionError("num_requests", config.num_requests, f"{problem}start it with --trace-ttl-seconds {enough}")
    if enough <= ttl:
        return kept, []
    return kept, [
        f"the router forgets traces after {ttl:g} s: the run is void if its last answer takes longer than "
        f"{ttl - span:.0f} s; --trace-ttl-seconds {enough} is enough"
    ]


async def _model(service: Service, session: aiohttp.ClientSession) -> dict[str, Any]:
    """The first model of ``/v1/models``; nothing if it names none."""
    with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError):
        async with session.get(service.url + "/v1/models") as response:
            if response.ok:
                answer = await response.json(content_type=None)
                models = answer.get("data") if isinstance(answer, dict) else None
                if isinstance(models, list) and models and isinstance(models[0], dict):
                    return models[0]
    return {}


def _check_lengths(config: LoadConfig, load: Load, longest: int) -> None:
    for number, request in enumerate(load.requests, 1):
        asked, answer = request.input_length or 0, request.output_length
        if asked + answer <= longest:
            continue
        longer = "input_len" if asked > answer else "output_len"
        name = "dataset" if ":" in config.dataset else longer
        tokens = f"{asked or 'an unknown number of'} + {answer} tokens"
        problem = f"request {number} asks for {tokens}, but the model takes {longest} in all (max_model_len)"
        raise OptionError(name, getattr(config, name), problem)


async def _without_cache_report(service: Service, config: LoadConfig, session: aiohttp.ClientSession) -> list[str]:
    """A line for the workers whose OpenAI answers do not tell cached tokens."""
    if not ROUTES[config.route].needs_model:
        return []
    silent, unknown = [], []
    for url in await _worker_urls(service, session):
        try:
            async with session.get(url + "/get_server_info") as response:
                reports = (await response.json(content_type=None)).get("enable_cache_report")
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError, AttributeError):
            reports = None
        if reports is None:
            unknown.append(url)
        elif not reports:
            silent.append(url)
    lines = []
    if silent:
        lines.append(
            f"cached_tokens will be empty for {', '.join(silent)}: start SGLang with --enable-cache-report, "
            "or use /generate"
        )
    if unknown:
        lines.append(f"whether {', '.join(unknown)} report cached_tokens is not known: /get_server_info does not say")
    return lines


async def _worker_urls(service: Service, session: aiohttp.ClientSession) -> list[str]:
    if not service.is_router:
        return [service.url]
    async with session.get(service.url + "/workers", headers=service.admin_headers) as response:
        if not response.ok:
            return []
        return [worker["url"] for worker in (await response.json())["workers"]]
