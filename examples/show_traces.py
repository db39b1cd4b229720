"""Shows the newest traces of a router as a table: which worker served which request, and why.

python examples/show_traces.py http://127.0.0.1:30001
"""

import sys

from sglang_router_rs import RouterTraceClient

COLUMNS = [
    ("request", "request_id"),
    ("worker", "worker_url"),
    ("node", "node_id"),
    ("why", "reason"),
    ("status", "status"),
    ("prompt", "prompt_tokens"),
    ("cached", "cached_tokens"),
    ("out", "completion_tokens"),
    ("ms", "latency_ms"),
]


def main() -> None:
    """Print the traces of the router at the URL in the command line, oldest first."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/show_traces.py http://127.0.0.1:30001")
    traces = RouterTraceClient(sys.argv[1]).list_recent_traces(limit=20)[::-1]
    rows = [[title for title, _ in COLUMNS]]
    rows += [["-" if trace[field] is None else str(trace[field]) for _, field in COLUMNS] for trace in traces]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
