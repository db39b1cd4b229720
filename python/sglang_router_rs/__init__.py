"""A router in front of SGLang servers that tells which worker served which request, why, and how long it took.

A router before two workers, until Ctrl-C::

    from sglang_router_rs import Router, PolicyType

    router = Router(
        worker_urls=["http://localhost:30005", "http://localhost:30006"],
        policy=PolicyType.CacheAware,
        port=30001,
        enable_request_tracking=True,
    )
    router.start()
"""

from ._core import __version__
from .client import AsyncRouterTraceClient, NotThisRouter, RouterTraceClient, TracingDisabled
from .own_policy import Policy, RequestView, WorkerView
from .policy_type import PolicyType
from .router import Router

__all__ = [
    "AsyncRouterTraceClient",
    "NotThisRouter",
    "Policy",
    "PolicyType",
    "RequestView",
    "Router",
    "RouterTraceClient",
    "TracingDisabled",
    "WorkerView",
    "__version__",
]
