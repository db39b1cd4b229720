"""``compare``: the same load against several policies in turn; a table, a report with plots, CSV and JSON.

For each policy a router is started and stopped, and the workers' caches are emptied after the warm-up. A repeat is
another draw of the same kind of load; within a repeat every policy gets the very same one, in an order that rotates
from repeat to repeat, so that none is always the first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from .. import _core
from ..client import NotThisRouter, TracingDisabled
from . import comparison, report, results, side_by_side
from .about import about
from .cluster import HOST, Cluster, Process, RunError, Worker, free_ports
from .command import check_writable, complain, parser
from .config import LoadConfig, check_policy, check_router_options, tracking_settings
from .interruption import interruptible
from .load import Load, plan
from .metrics import Run
from .options import OptionError, at_least, given, option
from .run import attribute, measure, tell, warnings
from .service import Service, prepare

DESCRIPTION = """\
Send the same load through a router with each policy in turn, and compare what the requests got. Starts and stops the
router itself, and the workers too, simulated (--sim) or real (--gpus), unless they run already (--workers)."""

EXAMPLES = """\
examples:
  %(prog)s --sim 4 --policies random,round_robin,shortest_queue,cache_aware
  %(prog)s --sim 8 --dataset trace:conversation_trace.jsonl --num-requests 3000 --repeats 3
  %(prog)s --workers http://10.0.0.1:30000 http://10.0.0.2:30000 --policies round_robin,cache_aware
  %(prog)s --gpus 2,3 --model-path meta-llama/Llama-2-7b-hf -- --mem-fraction-static 0.8
  %(prog)s --sim 4 --policies cache_aware --tracking on,off --repeats 10    what tracking costs

What follows -- goes to each worker that is started: sim's options, or SGLang's.
"""


@dataclass(kw_only=True)
class CompareConfig(LoadConfig):
    """A load, the policies that are compared on it, and the workers."""

    policies: list[str] = option(
        ["random", "round_robin", "shortest_queue", "cache_aware"],
        "policies, or FILE.py:NAME, in the order of the report",
    )
    workers: list[str] | None = option(None, "workers that run already", metavar="URL")
    sim: int | None = option(None, "start that many simulated workers", at_least(1), metavar="NUMBER")
    gpus: list[int] | None = option(None, "start a real worker on each of these GPUs", metavar="ID")
    model_path: str | None = option(None, "model of the real workers")
    repeats: int = option(1, "draws of the load; from 2 on there are confidence intervals", at_least(1))
    tracking: list[str] = option(["on"], "on, off or on,off: with both, what request tracking costs is compared too")
    router_options: list[str] = option(
        [], "further options of each router, such as cache_threshold=0.5", metavar="NAME=VALUE"
    )
    output_dir: str = option("compare", "where report.html, the tables and the logs go", metavar="DIRECTORY")

    def __post_init__(self) -> None:
        super().__post_init__()
        for policy in self.policies:
            check_policy("policies", policy)
        if not self.policies or len(set(self.policies)) != len(self.policies):
            raise OptionError("policies", self.policies, "must be different ones")
        if not self.tracking or len(set(self.tracking)) != len(self.tracking) or not {*self.tracking} <= {"on", "off"}:
            raise OptionError("tracking", self.tracking, "must be on, off or both")
        ways = [name for name in ("workers", "sim", "gpus") if getattr(self, name)]
        if len(ways) != 1:
            raise OptionError("workers", self.workers, "say which workers: one of --workers, --sim and --gpus")
        if (self.gpus is None) != (self.model_path is None):
            raise OptionError("model_path", self.model_path, "goes with --gpus, and --gpus with it")
        for setting in self.router_options:
            if not setting.partition("=")[1]:
                raise OptionError("router_options", setting, "must be NAME=VALUE")
        check_router_options(self.router_settings)
        check_writable("output_dir", Path(self.output_dir) / "report.html")

    @property
    def runs(self) -> int:
        """How many runs there will be."""
        return len(self.policies) * len(self.tracking) * self.repeats

    @property
    def router_settings(self) -> dict[str, str]:
        """The router_options by name."""
        parts = (setting.partition("=") for setting in self.router_options)
        return {name.replace("-", "_"): value for name, _, value in parts}


def labels(policies: Sequence[str]) -> dict[str, str]:
    """The policies by what they are called in tables.

    That is their name in traces, or what was written where two have the same name there.
    """
    names = [_core.policy_name(policy) for policy in policies]
    return {name if names.count(name) == 1 else policy: policy for name, policy in zip(names, policies, strict=True)}


def file_names(policies: Mapping[str, str]) -> dict[str, str]:
    """What the files of each label begin with: different ones, also where a file system ignores case."""
    made: dict[str, str] = {}
    for label, policy in policies.items():
        plain = _core.policy_name(policy).replace(".py:", ".")
        taken = {name.casefold() for name in made.values()}
        numbered = itertools.chain([plain], (f"{plain}_{number}" for number in itertools.count(2)))
        made[label] = next(name for name in numbered if name.casefold() not in taken)
    return made


class Turn(NamedTuple):
    """Which run it is."""

    # Its label.
    policy: str
    tracking: bool
    # Counted from 0.
    repeat: int


class Comparison:
    """The runs of one comparison; what is done is kept when a later one fails."""

    def __init__(self, config: CompareConfig, worker_args: Sequence[str]) -> None:
        self.config = config
        self.runs: list[Run] = []
        self.warnings: list[str] = []
        self.is_void = False
        self.interrupted = False
        self._policies = labels(config.policies)
        self._file_names = file_names(self._policies)
        self._worker_args = list(worker_args)
        self._directory = Path(config.output_dir)

    async def run(self) -> None:
        """Make every run.

        Raises:
            RunError: a process does not start, or workers cannot be measured.
            OptionError: an option does not fit the data, the model or the router.
        """
        config = self.config
        loads = [plan(config, repeat) for repeat in range(config.repeats)]
        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(Cluster(self._directory / "logs"))
            workers = await self._workers(cluster)
            # Of an earlier comparison.
            shutil.rmtree(self._directory / "runs", ignore_errors=True)
            kinds = list(itertools.product(self._policies, config.tracking))
            for repeat, load in enumerate(loads):
                first = repeat % len(kinds)
                for policy, tracking in kinds[first:] + kinds[:first]:
                    await self._run(cluster, workers, Turn(policy, tracking == "on", repeat), load)
                    if self.interrupted:
                        return

    async def _workers(self, cluster: Cluster) -> list[Worker]:
        config = self.config
        if config.workers is not None:
            return [Worker(url.rstrip("/")) for url in config.workers]
        gpus = config.gpus or list(range(config.sim or 0))
        print(f"starting {len(gpus)} {'real' if config.gpus else 'simulated'} workers", file=sys.stderr)
        return await cluster.start_workers(free_ports(len(gpus)), gpus, config.model_path, self._worker_args)

    async def _run(self, cluster: Cluster, workers: Sequence[Worker], turn: Turn, load: Load) -> None:
        name = self._name(turn)
        print(f"run {len(self.runs) + 1} of {self.config.runs}: {name}", file=sys.stderr)
        port = free_ports(1)[0]
        settings: dict[str, object] = {"policy": self._policies[turn.policy], **self.config.router_settings}
        if turn.tracking:
            settings = {**tracking_settings(load, self.config), **settings}
        router = await cluster.start_router(port, workers, settings)
        try:
            config = self.config
            service = Service(
                f"http://{HOST}:{port}",
                has_traces=turn.tracking,
                api_key=config.api_key,
                admin_api_key=config.admin_api_key,
            )
            target, notes = await prepare(service, config, load)
            tell([line for line in notes if line not in self.warnings])
            self.warnings += [line for line in notes if line not in self.warnings]
            spent = 0.0

            async def before() -> None:
                nonlocal spent
                await service.flush_caches()
                spent = router.cpu_secs

            made, exchanges = await measure(target, load, name, before)
            used = _used(router, spent)
            await attribute(service, made, exchanges)
        finally:
            cluster.stop(router)
        urls = tuple(worker.url for worker in workers)
        names = {worker.url: worker.node_id for worker in workers if worker.node_id is not None}
        run = Run(*turn, made.table, {}, *used, workers=urls, node_ids=names, flaw=_flaw(made))
        self._keep(made, name, run)

    def _name(self, turn: Turn) -> str:
        """As short as it can be told from the others."""
        parts = [self._file_names[turn.policy]]
        if len(self.config.tracking) > 1:
            parts.append("on" if turn.tracking else "off")
        if self.config.repeats > 1:
            parts.append(str(turn.repeat + 1))
        return "-".join(parts)

    def _keep(self, made: results.Results, name: str, run: Run) -> None:
        """Save a run as soon as it is there."""
        made.about = about(self.config, policy=run.policy, tracking=run.tracking, repeat=run.repeat)
        summary = made.summary()
        summary["warnings"] = warnings(made, summary, self.config.max_concurrency)
        self.runs.append(dataclasses.replace(run, summary=summary))
        self.warnings += [f"{name}: {line}" for line in summary["warnings"]]
        self.is_void |= bool(made.disagreements)
        self.interrupted |= made.interrupted
        results.save_csv(run.rows, self._directory / "runs" / f"{name}.csv")
        results.save_json(summary, self._directory / "runs" / f"{name}.summary.json")

    @property
    def planned(self) -> list[Turn]:
        """The runs that there are to be, in the order of the report."""
        config = self.config
        turns = itertools.product(self._policies, config.tracking, range(config.repeats))
        return [Turn(policy, tracking == "on", repeat) for policy, tracking, repeat in turns]

    @property
    def left_out(self) -> list[str]:
        """Which runs are not compared, and why."""
        return comparison.left_out(self.runs, self.planned)

    @property
    def whole(self) -> list[Run]:
        """The runs that are compared."""
        return comparison.whole(self.runs, self.planned)

    def save(self) -> list[Path]:
        """Write the rows of all runs, and tables and report of the whole ones, if any; returns the paths."""
        directory = self._directory
        rows = pd.concat([_labelled(run) for run in self.runs], ignore_index=True)
        files = [results.save_csv(rows, directory / "rows.csv")]
        whole = self.whole
        if not whole:
            return files
        table, cost = comparison.table(whole), comparison.tracking_cost(whole)
        facts = about(self.config, warnings=self.warnings, left_out=self.left_out)
        settings = {name: str(value) for name, value in facts["config"].items() if value is not None}
        page = directory / "report.html"
        words = report.Words(alerts={"Left out": self.left_out, "Warnings": self.warnings})
        return [
            *files,
            results.save_csv(comparison.tidy(table), directory / "summary.csv"),
            results.save_json({**facts, **comparison.as_dict(table, cost)}, directory / "summary.json"),
            report.write(whole, settings, facts["machine"], page, words),
        ]


def _flaw(made: results.Results) -> str:
    """Why a run cannot be compared; empty if it can."""
    flaws = {"interrupted": made.interrupted, "the worker of some requests is not certain": bool(made.disagreements)}
    return " and ".join(flaw for flaw, there in flaws.items() if there)


def _used(router: Process, before: float) -> tuple[float, int]:
    """Processor time since then, in seconds, and memory in bytes."""
    return router.cpu_secs - before, router.resident_bytes


def _labelled(run: Run) -> pd.DataFrame:
    """A run's rows with what run they are of."""
    labels = pd.DataFrame({"policy": run.policy, "tracking": run.tracking, "repeat": run.repeat}, index=run.rows.index)
    return pd.concat([labels, run.rows], axis=1)


def main(argv: list[str]) -> int:
    """Run the command line; the exit status is 0, 1 if a run failed or is void, 130 if interrupted."""
    made = parser("compare", CompareConfig, DESCRIPTION, EXAMPLES)
    ours, worker_args = argv, []
    if "--" in argv:
        ours, worker_args = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    arguments = made.parse_args(ours)
    done: Comparison | None = None
    status = 0
    try:
        config = CompareConfig(**given(arguments, CompareConfig))
        if worker_args and config.workers:
            raise OptionError("workers", config.workers, "run already: nothing can follow --")
        done = Comparison(config, worker_args)
        asyncio.run(interruptible(done.run()))
    except OptionError as error:
        made.error(error.as_flag)
    except (RunError, TracingDisabled, NotThisRouter, OSError, ValueError) as error:
        status = complain(error)
    except KeyboardInterrupt:
        status = 130
    if done is None or not done.runs:
        return status
    try:
        files = done.save()
    except OSError as error:
        return complain(error)
    if done.whole:
        print(side_by_side.text(comparison.table(done.whole)))
    if done.whole and len(config.tracking) > 1:
        print(side_by_side.tracking_text(comparison.tracking_cost(done.whole)))
    for line in done.left_out:
        print(line, file=sys.stderr)
    for line in done.warnings:
        print(f"warning: {line}", file=sys.stderr)
    print("written:", *files)
    return status or int(done.is_void) or (130 if done.interrupted else 0)
