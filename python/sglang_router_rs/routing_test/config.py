"""What a run is made of: the load (``LoadConfig``), and workers and router around it (``RoutingConfig``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import _core, own_policy
from ..router import option_texts
from .exchange import ROUTES
from .options import OptionError, above, at_least, between, check, one_of, option

if TYPE_CHECKING:
    from .load import Load

ARRIVALS = ("poisson", "constant", "burst", "trace")


@dataclass(kw_only=True)
class LoadConfig:
    """Which requests are sent, and when. The same options and the same seed are the same load, to the byte.

    Raises:
        OptionError: (a ValueError) a value out of range; names option and value.
    """

    num_requests: int = option(1000, "requests that are measured", at_least(1))
    request_rate: float = option(
        50.0,
        "requests per second on average, except with trace arrivals; inf: all at once",
        at_least(1e-6, infinite=True),
    )
    arrivals: str | None = option(
        None,
        "when requests arrive: poisson, constant, burst, or trace, the times of the file [default: poisson, "
        "and trace for trace:FILE]",
        one_of(*ARRIVALS),
    )
    burst_size: int = option(10, "requests that arrive at once with --arrivals burst", at_least(1))
    trace_speed: float = option(1.0, "the times of --arrivals trace pass that many times faster", at_least(1e-6))
    dataset: str = option(
        "random", "what is asked: random, shared-prefix, sharegpt:FILE, custom:FILE or trace:FILE", metavar="DATASET"
    )
    input_len: int = option(512, "tokens of a prompt at most (random, shared-prefix)", at_least(1))
    output_len: int = option(
        128, "tokens of an answer at most; of each answer that a file gives no length", at_least(1)
    )
    range_ratio: float = option(
        1.0, "lengths are drawn evenly from this share of --input-len and --output-len up to them", between(0, 1)
    )
    num_prefixes: int = option(16, "different prefixes (shared-prefix)", at_least(1))
    prefix_len: int = option(256, "tokens of a prefix, of the --input-len of the prompt (shared-prefix)", at_least(1))
    seed: int = option(0, "of every draw: lengths, words and arrival times", at_least(0))
    tokenizer: str | None = option(
        None, "a tokenizer.json, or a directory with one: prompts get exactly so many of its tokens", metavar="PATH"
    )
    route: str = option("/generate", f"where requests go: {', '.join(ROUTES)}", one_of(*ROUTES))
    model: str | None = option(None, "name of the model in OpenAI routes; by default what /v1/models lists first")
    stream: bool = option(True, "ask for streams; without them there is no TTFT and no ITL")
    ignore_eos: bool = option(True, "answers end at their length only")
    max_concurrency: int | None = option(
        None, "requests in flight at most; others wait, which is counted as lateness (default: no limit)", at_least(1)
    )
    warmup: int = option(10, "requests that are sent before, and not measured", at_least(0))
    timeout_secs: float = option(1800.0, "seconds after which a request is given up and counted as failed", above(0))

    api_key: str | None = option(None, "sent as Bearer key with each request")
    admin_api_key: str | None = option(None, "the router's key for traces and workers [default: the --api-key]")

    def __post_init__(self) -> None:
        check(self)
        if self.trace_speed != 1 and (self.arrivals or self.dataset.partition(":")[0]) != "trace":
            raise OptionError("trace_speed", self.trace_speed, "has no effect: arrivals are not those of a trace")


def check_router_options(options: Mapping[str, object]) -> None:
    """See that the router knows these options, and that the run does not set them itself.

    Raises:
        OptionError: names the option, and what would be right.
    """
    instead = {
        "policy": "the policy is an option of the run",
        "enable_request_tracking": "whether requests are tracked is an option of the run",
        **dict.fromkeys(("host", "port", "worker_urls", "node_ids"), "the run sets it"),
    }
    for name, value in options.items():
        if name in instead:
            raise OptionError("router_options", f"{name}={value}", instead[name])
        try:
            # Options of tracking are errors without it.
            _core.Server.check([("enable_request_tracking", ["true"]), (name, option_texts(name, value))])
        except (TypeError, ValueError) as error:
            raise OptionError("router_options", f"{name}={value}", str(error)) from None


def check_policy(name: str, policy: str) -> None:
    """See that the router knows the policy, or that one's own can be loaded.

    Raises:
        OptionError: of the option of that name; names those there are, or what is wrong with the file.
    """
    if ".py:" in policy:
        try:
            _core.policy_name(policy)
            own_policy.load(policy)
        except ValueError as error:
            raise OptionError(name, policy, str(error)) from None
    elif policy not in [known["name"] for known in _core.policies()]:
        names = ", ".join(known["name"] for known in _core.policies())
        raise OptionError(name, policy, f"must be one of {names}, or FILE.py:NAME")


def tracking_settings(load: Load, config: LoadConfig) -> dict[str, object]:
    """What a router needs to remember the whole load until it is asked for it."""
    lasts_secs = load.requests[-1].arrival_time + config.timeout_secs
    return {
        "enable_request_tracking": True,
        "max_trace_entries": len(load.requests) + len(load.warmup),
        # With room for the questions at the end.
        "trace_ttl_seconds": int(lasts_secs) + 3600,
    }


@dataclass(kw_only=True)
class RoutingConfig(LoadConfig):
    """A load, the router it goes through, and the workers behind it.

    Workers are those at ``worker_urls``, which run already; or real SGLang servers of ``model_path``, one for each GPU
    of ``gpu_ids``; or else simulated ones.
    """

    base_port: int = option(30001, "port of the router", between(0, 65535))
    start_router: bool = option(True, "start the router; without it, one runs at base_port")
    policy: str | None = option(None, "policy of the router that is started, or FILE.py:NAME [default: cache_aware]")
    worker_base_port: int = option(
        30005, "port of the first worker that is started; the others follow it", between(1, 65535)
    )
    num_workers: int | None = option(None, "workers that are started (default: one for each GPU, or 2)", at_least(1))
    gpu_ids: list[int] | None = option(None, "a worker for each of these GPUs, named gpu_ID (default: 0, 1, …)")
    model_path: str | None = option(None, "model of real SGLang servers; without it workers are simulated")
    worker_args: list[str] = option([], "further arguments of each worker that is started")
    worker_urls: list[str] | None = option(None, "workers that run already; none are started")
    router_options: dict[str, object] | None = option(None, "further options of the router, as keywords of Router")
    flush_cache: bool = option(True, "empty the workers' caches between warm-up and load")
    output_dir: str = option("results", "where results.csv, summary.json and logs go")

    def __post_init__(self) -> None:
        super().__post_init__()
        for gpu in self.gpu_ids or []:
            if gpu < 0 or self.gpu_ids.count(gpu) > 1:  # type: ignore[union-attr]
                raise OptionError("gpu_ids", self.gpu_ids, "must be different numbers from 0 on")
        if self.gpu_ids == [] or (self.gpu_ids and self.num_workers not in (None, len(self.gpu_ids))):
            raise OptionError("gpu_ids", self.gpu_ids, "must be as many as num_workers, which may be left out")
        if self.worker_urls == []:
            raise OptionError("worker_urls", [], "must name a worker; None starts some")
        last_port = self.worker_base_port + len(self.gpus) - 1
        if last_port > 65535:
            raise OptionError("worker_base_port", self.worker_base_port, f"the last worker would be at {last_port}")
        check_router_options(self.router_options or {})
        if self.policy is not None:
            check_policy("policy", self.policy)
        of_workers = ["num_workers", "gpu_ids", "model_path", "worker_args"]
        if not self.start_router:
            self._refuse(["policy", "router_options", "worker_urls", *of_workers], "the router runs already")
        if self.worker_urls is not None:
            self._refuse(of_workers, "the workers of worker_urls run already")

    def _refuse(self, names: list[str], reason: str) -> None:
        """Refuse options that would have no effect."""
        for name in names:
            if getattr(self, name):
                raise OptionError(name, getattr(self, name), f"has no effect: {reason}")

    @property
    def gpus(self) -> list[int]:
        """The GPU of each worker that is started."""
        return self.gpu_ids or list(range(self.num_workers or 2))
