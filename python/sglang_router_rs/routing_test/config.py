"""What a run is made of: the load (``LoadConfig``), and workers and router around it (``RoutingConfig``)."""

from __future__ import annotations

from dataclasses import dataclass

from .options import above, at_least, between, check, one_of, option

ROUTES = ("/generate", "/v1/completions", "/v1/chat/completions")
ARRIVALS = ("poisson", "constant", "burst", "trace")


@dataclass(kw_only=True)
class LoadConfig:
    """Which requests are sent, and when. The same options and the same seed are the same load, to the byte.

    Raises:
        OptionError: (a ValueError) a value out of range; names option and value.
    """

    num_requests: int = option(1000, "requests that are measured", at_least(1))
    request_rate: float = option(
        50.0, "requests per second on average, but for --arrivals trace; inf sends all at once", above(0, infinite=True)
    )
    arrivals: str | None = option(
        None,
        "when requests arrive: poisson (default), constant, burst, or trace (default for trace:FILE: its own times)",
        one_of(*ARRIVALS),
    )
    burst_size: int = option(10, "requests that arrive at once with --arrivals burst", at_least(1))
    trace_speed: float = option(1.0, "the times of --arrivals trace pass that many times faster", above(0))
    dataset: str = option(
        "random", "what is asked: random, shared-prefix, sharegpt:FILE, custom:FILE or trace:FILE", metavar="DATASET"
    )
    input_len: int = option(512, "tokens of a prompt at most (random, shared-prefix)", at_least(1))
    output_len: int = option(128, "tokens of an answer at most; of each answer that a file gives no length", at_least(1))
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

    def __post_init__(self) -> None:
        check(self)


@dataclass(kw_only=True)
class RoutingConfig(LoadConfig):
    """A load, the router it goes through, and the workers behind it.

    Workers are those at ``worker_urls``, which run already; or real SGLang servers of ``model_path``, one for each GPU
    of ``gpu_ids``; or else simulated ones.
    """

    base_port: int = option(30001, "port of the router", between(0, 65535))
    start_router: bool = option(True, "start the router; without it, one runs at base_port")
    policy: str = option("cache_aware", "the router's policy")
    worker_base_port: int = option(30005, "port of the first worker that is started; the others follow it", between(1, 65535))
    num_workers: int | None = option(None, "workers that are started (default: one for each GPU, or 2)", at_least(1))
    gpu_ids: list[int] | None = option(None, "a worker for each of these GPUs, named gpu_ID (default: 0, 1, …)")
    model_path: str | None = option(None, "model of real SGLang servers; without it workers are simulated")
    worker_args: list[str] = option([], "further arguments of each worker that is started")
    worker_urls: list[str] | None = option(None, "workers that run already; none are started")
    router_options: dict[str, object] = option(None, "further options of the router, as keywords of Router")
    output_dir: str = option("results", "where results.csv, summary.json and logs go")
