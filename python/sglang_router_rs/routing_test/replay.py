"""``replay --plot``: a replay in virtual time, and its CSV as a page with plots or as a picture.

The replay itself is the Rust core's, with all its options; here its rows become runs of a comparison.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from ..__main__ import run
from . import report
from .about import machine
from .command import Parser, check_writable, complain
from .metrics import Run
from .options import OptionError
from .results import Results

# Pixels per inch of a picture.
DPI = 110

Pixels = np.ndarray[Any, np.dtype[Any]]


def main(argv: list[str]) -> int:
    """Run the command line of ``replay`` with ``--plot FILE`` in it; returns its exit status."""
    parser = Parser(prog="python -m sglang_router_rs replay", add_help=False, allow_abbrev=False)
    parser.add_argument("--plot", required=True, metavar="FILE")
    parser.add_argument("--csv", metavar="FILE")
    parser.add_argument("--workers", type=int, default=0)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.workers:
        rest += ["--workers", str(arguments.workers)]
    plot = Path(arguments.plot)
    try:
        if plot.suffix not in _WRITE:
            raise OptionError("plot", arguments.plot, f"must end in {' or '.join(_WRITE)}")
        check_writable("plot", plot)
        with tempfile.TemporaryDirectory() as directory:
            csv = Path(arguments.csv or Path(directory) / "replay.csv")
            status = run(["replay", *rest, "--csv", str(csv)])
            if status == 0:
                _WRITE[plot.suffix](runs(csv, arguments.workers), plot, " ".join(rest))
            return status
    except OptionError as error:
        parser.error(error.as_flag)
    except OSError as error:
        return complain(error)


def runs(csv: Path, workers: int = 0) -> list[Run]:
    """The runs in the CSV of a replay, one per policy; before so many workers, or those that are in it."""
    rows = pd.read_csv(csv, dtype={"reason": "string", "error": "string", "worker": "Int64", "policy": "string"})
    count = max(workers, int(rows["worker"].max()) + 1 if rows["worker"].notna().any() else 0)
    return [_run(str(policy), part, count) for policy, part in rows.groupby("policy", sort=False)]


def _run(policy: str, rows: pd.DataFrame, workers: int) -> Run:
    success = rows["error"].isna()
    tokens = rows["output_tokens"].where(success)
    worker = "worker " + rows["worker"].astype("string")
    ended = rows["arrival_secs"] + rows["e2e_secs"]
    columns = {
        "req_id": rows["request"].astype("string"),
        "input_length": rows["prompt_tokens"],
        "decode_length": tokens,
        "arrival_time": rows["arrival_secs"],
        "to_server_time": rows["arrival_secs"].where(rows["worker"].notna()),
        "finish_time": ended,
        "server_latency": rows["e2e_secs"],
        "total_latency": rows["e2e_secs"],
        "ttft": rows["ttft_secs"],
        "itl_mean": (rows["e2e_secs"] - rows["ttft_secs"]) / (tokens - 1).replace(0, np.nan),
        "success": success.astype("boolean"),
        "error": rows["error"],
        "prompt_tokens": rows["prompt_tokens"].where(rows["cached_tokens"].notna()),
        "cached_tokens": rows["cached_tokens"],
        "completion_tokens": tokens,
        "worker_url": worker,
        "node_id": worker,
        "routing_policy": rows["policy"],
        "reason": rows["reason"],
        "matched_tokens": rows["matched_tokens"],
        "attempts": rows["attempts"],
    }
    table = pd.DataFrame(columns, index=rows.index).astype(object)
    cells = table.where(table.notna(), None).itertuples(index=False)
    made = Results([dict(zip(columns, row, strict=True)) for row in cells], planned=len(rows))
    names = {f"worker {number}": f"worker {number}" for number in range(workers)}
    return Run(policy, True, 0, made.table, made.summary(), None, None, workers=tuple(names), node_ids=names)


def _page(made: Sequence[Run], path: Path, command: str) -> None:
    report.write(made, {"replay, in virtual time": command}, machine(), path)


def _picture(made: Sequence[Run], path: Path, _: str) -> None:
    pictures = [_pixels(plot.draw(made)) for plot in report.PLOTS]
    imsave(path, np.vstack(pictures))


def _pixels(figure: Figure) -> Pixels:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=DPI)
    written.seek(0)
    return np.asarray(imread(written))


_WRITE = {".html": _page, ".png": _picture}
