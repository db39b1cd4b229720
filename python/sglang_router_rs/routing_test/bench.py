"""``bench``: a load through a running router, or straight to one worker; one CSV row per request."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ..client import NotThisRouter, TracingDisabled
from . import attribution, results
from .about import about
from .cluster import RunError
from .command import check_writable, complain, parser
from .config import LoadConfig
from .interruption import interruptible
from .load import plan
from .options import OptionError, given, option
from .run import attribute, measure, save, tell, warnings
from .service import Service, prepare

DESCRIPTION = """\
Send a load to a router, each request at its own time whatever the others do, and write one CSV row per request: which
worker served it, why, and how long it took. docs/results.md says what each column means."""

EXAMPLES = """\
examples:
  %(prog)s --num-requests 1000 --request-rate 50 --output results.csv
  %(prog)s --dataset trace:conversation_trace.jsonl --num-requests 3000 --route /v1/completions
  %(prog)s --worker-url http://localhost:30005 --output direct.csv     the same without a router: its overhead is
                                                                       the difference
"""


@dataclass(kw_only=True)
class BenchConfig(LoadConfig):
    """A load, and where it goes."""

    router_url: str | None = option(None, "the router [default: http://localhost:30001]")
    worker_url: str | None = option(None, "send to this worker directly, with no router")
    flush_cache: bool = option(
        False, "empty the workers' caches between warm-up and load: the same load again finds nothing"
    )
    output: str = option("results.csv", "the CSV; the summary and the cumulative figures go beside it", metavar="FILE")
    decisions: str | None = option(
        None, "a CSV of one row per request and candidate; the router needs --trace-candidates", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_url is not None and self.worker_url is not None:
            raise OptionError("worker_url", self.worker_url, "goes without --router-url: it is one or the other")
        if self.worker_url is not None and self.decisions is not None:
            raise OptionError("decisions", self.decisions, "needs a router; there is none with --worker-url")
        for name in ("router_url", "worker_url"):
            url = getattr(self, name)
            if url is not None and not _is_base_url(url):
                raise OptionError(name, url, "is not http://HOST:PORT")
        if self.decisions is not None and Path(self.decisions).absolute() == Path(self.output).absolute():
            raise OptionError("decisions", self.decisions, "is the file of --output")
        for name in ("output", "decisions"):
            if getattr(self, name) is not None:
                check_writable(name, Path(getattr(self, name)))


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_complete and parts.scheme in ("http", "https") and url.rstrip("/") == f"{parts.scheme}://{parts.netloc}"


async def bench(config: BenchConfig) -> results.Results:
    """Run it, and save what came of it, whatever that is.

    Raises:
        RunError: the service cannot be measured; nothing was sent.
        OptionError: an option does not fit the service; nothing was sent.
        OSError: a file cannot be written.
    """
    load = plan(config)
    if config.worker_url is not None:
        service = Service(config.worker_url.rstrip("/"), is_router=False, has_traces=False, api_key=config.api_key)
    else:
        url = (config.router_url or "http://localhost:30001").rstrip("/")
        service = Service(url, api_key=config.api_key, admin_api_key=config.admin_api_key)
    target, notes = await prepare(service, config, load, config.decisions)
    tell(notes)
    before = service.flush_caches if config.flush_cache else None
    made, exchanges = await measure(target, load, before=before)
    made.about = about(config, target=service.url, notes=notes)
    traces = await attribute(service, made, exchanges)
    if config.decisions is not None:
        made.decisions = attribution.decisions(traces)
    return made


def main(argv: list[str]) -> int:
    """Run the command line; returns its exit status.

    0; 1 if it failed, its results are void or no request succeeded; 130 if it was interrupted.
    """
    made = parser("bench", BenchConfig, DESCRIPTION, EXAMPLES)
    arguments = made.parse_args(argv)
    try:
        config = BenchConfig(**given(arguments, BenchConfig))
        outcome = asyncio.run(interruptible(bench(config)))
        return report(outcome, config)
    except OptionError as error:
        made.error(error.as_flag)
    except (RunError, TracingDisabled, NotThisRouter, OSError, ValueError) as error:
        return complain(error)
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return 130


def report(outcome: results.Results, config: BenchConfig) -> int:
    """Save everything, and print what matters of it; the exit status."""
    summary = outcome.summary()
    summary["warnings"] = warnings(outcome, summary, config.max_concurrency)
    save(outcome, summary, Path(config.output))
    if config.decisions is not None:
        print("written:", results.save_csv(results.decisions(outcome.decisions), Path(config.decisions)))
    if outcome.interrupted:
        return 130
    return 1 if outcome.disagreements or not summary["requests"]["succeeded"] else 0
