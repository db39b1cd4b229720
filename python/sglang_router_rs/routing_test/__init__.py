"""The routing laboratory: one load, several policies, one true row per request.

``RoutingTest(RoutingConfig(...))`` runs a load through a router and says for each request which worker served it.
The commands ``bench`` and ``compare`` of ``python -m sglang_router_rs`` are built of the same parts.
Needs the extra ``bench``: ``pip install 'sglang_router_rs[bench]'``.

In reading order: ``config`` (what a run is made of), ``arrivals``, ``datasets`` and ``load`` (what is sent when),
``service`` (is it up to that), ``generator`` and ``exchange`` (sending, and reading answers), ``attribution`` (who
served it), ``columns`` and ``results`` (rows, summary, files), ``cluster`` (processes of workers and routers), ``run``
(all of that in turn; ``interruption`` ends it early), ``routing_test``, ``bench``, ``compare`` (the ways in),
``metrics``, ``comparison``, ``side_by_side``, ``findings``, ``plots``, ``report`` (several runs side by side).
"""

from importlib.util import find_spec

for _name in ("matplotlib", "numpy", "pandas", "scipy", "tqdm"):
    if find_spec(_name) is None:
        raise ImportError(f"the routing laboratory needs {_name}: pip install 'sglang_router_rs[bench]'")

from .cluster import RunError  # noqa: E402
from .config import LoadConfig, RoutingConfig  # noqa: E402
from .options import OptionError  # noqa: E402
from .routing_test import RoutingTest  # noqa: E402
from .run import AttributionError  # noqa: E402

__all__ = ["AttributionError", "LoadConfig", "OptionError", "RoutingConfig", "RoutingTest", "RunError"]
