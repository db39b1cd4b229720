"""``RoutingTest``: a load through a router, from Python, and who served each request."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from ..client import Trace
from . import attribution
from .about import about
from .attribution import Row
from .cluster import Cluster, Worker, free_ports
from .command import check_writable
from .config import RoutingConfig, tracking_settings
from .interruption import interruptible
from .load import Load, plan
from .results import Results
from .run import AttributionError, attribute, measure, save, tell, warnings
from .service import Service, prepare


class RoutingTest:
    """One load through one router, in front of workers that run already or that it starts.

    ::

        test = RoutingTest(RoutingConfig(num_workers=4, policy="cache_aware", num_requests=1000, request_rate=100))
        results = asyncio.run(test.run())
        print(results.table.groupby("gpu_id").ttft.mean())

    Override ``analyze_results`` to add to the rows before they are saved, and ``fetch_request_traces`` to read traces
    in another way; the worker of each row is checked in any case.
    """

    def __init__(self, config: RoutingConfig) -> None:
        self.config = config
        self._service = self._at(config.base_port)
        # Of the last run: they have ended, and need not be read again.
        self._traces: dict[str, Trace] = {}

    async def run(self) -> Results:
        """Start what is to be started, send the load, attribute each request to its worker, and save everything.

        Files in ``output_dir``: ``results.csv`` (a row per request), ``results.summary.json``,
        ``results.cumulative.csv``, and the logs of what was started.

        Raises:
            RunError: a process does not start, a port is taken, or the router cannot be measured.
            TracingDisabled, NotThisRouter: of a router that runs already.
            OptionError: an option does not fit the data, the model or the router, or output_dir cannot be written.
            AttributionError: after everything was saved, if the worker of a request is not certain.
            KeyboardInterrupt: likewise, if SIGINT or SIGTERM ended the run.
        """
        return await interruptible(self._run())

    async def fetch_request_traces(self, request_ids: Sequence[str]) -> dict[str, Trace]:
        """The router's traces of these requests by id, asked for in pages of 1,000; unknown ids are left out.

        Traces that have not ended are waited for, for up to ten seconds.
        """
        missing = [name for name in request_ids if name not in self._traces]
        async with self._service.traces() as client:
            found = self._traces | await attribution.fetch(client, missing)
        return {name: found[name] for name in request_ids if name in found}

    async def analyze_results(self, results: list[Row], request_ids: Sequence[str]) -> list[Row]:
        """Write what the traces say into rows that have a ``req_id``: worker, node, reason and the router's times.

        Rows whose request the router does not know stay as they are.
        """
        traces = await self.fetch_request_traces(request_ids)
        for row in results:
            if row["req_id"] in traces:
                attribution.fill(row, traces[row["req_id"]])
        return results

    async def _run(self) -> Results:
        config = self.config
        load = plan(config)
        output = Path(config.output_dir) / "results.csv"
        check_writable("output_dir", output)
        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(Cluster(output.parent / "logs"))
            if config.start_router:
                await self._start(cluster, load)
            target, notes = await prepare(self._service, config, load)
            tell(notes)
            before = self._service.flush_caches if config.flush_cache else None
            made, exchanges = await measure(target, load, before=before)
            made.about = about(config, target=self._service.url, notes=notes)
            self._traces = await attribute(self._service, made, exchanges)
            try:
                await self.analyze_results(list(made.rows), [exchange.request_id for exchange in exchanges])
            finally:
                made.disagreements += attribution.restore(exchanges, made.rows, self._traces)
                summary = made.summary()
                lines = warnings(made, summary, config.max_concurrency)
                save(made, summary | {"warnings": lines}, output)
        if made.disagreements:
            raise AttributionError("\n".join([*lines, f"saved nevertheless: {output}"]))
        if made.interrupted:
            raise KeyboardInterrupt
        return made

    def _at(self, port: int) -> Service:
        config = self.config
        return Service(f"http://localhost:{port}", api_key=config.api_key, admin_api_key=config.admin_api_key)

    async def _start(self, cluster: Cluster, load: Load) -> None:
        config = self.config
        if config.base_port == 0:
            config.base_port = free_ports(1)[0]
            self._service = self._at(config.base_port)
        if config.worker_urls is not None:
            workers = [Worker(url) for url in config.worker_urls]
        else:
            gpus = config.gpus
            ports = [config.worker_base_port + index for index in range(len(gpus))]
            workers = await cluster.start_workers(ports, gpus, config.model_path, config.worker_args)
        settings = {"policy": config.policy, **tracking_settings(load, config), **(config.router_options or {})}
        await cluster.start_router(config.base_port, workers, settings)
