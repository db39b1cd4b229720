"""``replay --plot``: a replay in virtual time, and its CSV as a page with plots or as a picture.

The replay itself is the Rust core's, with all its options; here its rows become runs of a comparison.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from ..__main__ import run
from . import plots, report, side_by_side
from .about import machine
from .command import Parser, check_writable, complain
from .findings import SEEDS
from .metrics import Run
from .options import OptionError
from .results import Results

# Pixels per inch of a picture.
DPI = 110

Pixels = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Notes:
    """What the core tells of a replay besides its rows."""

    # Above the table.
    header: Sequence[str]
    # How many there were.
    workers: int
    # When one of them was lost: from and to, in seconds; infinite if for good.
    losses: tuple[tuple[float, float], ...]

    @classmethod
    def read(cls, path: Path) -> Notes:
        """The notes in a file that the core wrote."""
        told = json.loads(path.read_text("utf-8"))
        back = [math.inf if loss["back_at_secs"] is None else loss["back_at_secs"] for loss in told["losses"]]
        begins = [loss["at_secs"] for loss in told["losses"]]
        return cls(told["header"], told["workers"], tuple(zip(begins, back, strict=True)))


def main(argv: list[str]) -> int:
    """Run the command line of ``replay`` with ``--plot FILE`` in it; returns its exit status."""
    parser = Parser(prog="python -m sglang_router_rs replay", add_help=False, allow_abbrev=False)
    parser.add_argument("--plot", required=True, metavar="FILE")
    parser.add_argument("--csv", metavar="FILE")
    arguments, rest = parser.parse_known_args(argv)
    plot = Path(arguments.plot)
    try:
        if plot.suffix not in _WRITE:
            raise OptionError("plot", arguments.plot, f"must end in {' or '.join(_WRITE)}")
        check_writable("plot", plot)
        with tempfile.TemporaryDirectory() as directory:
            csv = Path(arguments.csv or Path(directory) / "replay.csv")
            notes = Path(directory) / "notes.json"
            status = run(["replay", *rest, "--csv", str(csv), "--notes", str(notes)])
            # What was not replayed has none.
            if notes.exists():
                told = Notes.read(notes)
                _WRITE[plot.suffix](runs(csv, told), plot, told)
            return status
    except OptionError as error:
        parser.error(error.as_flag)
    except OSError as error:
        return complain(error)


def runs(csv: Path, notes: Notes) -> list[Run]:
    """The runs in the CSV of a replay, one per policy."""
    rows = pd.read_csv(csv, dtype={"reason": "string", "error": "string", "worker": "Int64", "policy": "string"})
    return [_run(str(policy), part, notes) for policy, part in rows.groupby("policy", sort=False)]


def _run(policy: str, rows: pd.DataFrame, notes: Notes) -> Run:
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
    names = {f"worker {number}": f"worker {number}" for number in range(notes.workers)}
    return Run(
        policy,
        True,
        0,
        made.table,
        made.summary(),
        None,
        None,
        workers=tuple(names),
        node_ids=names,
        losses=notes.losses,
    )


def _page(made: Sequence[Run], path: Path, notes: Notes) -> None:
    words = report.Words(["A replay, in virtual time.", *notes.header], more=SEEDS)
    report.write(made, {}, machine(), path, words)


def _picture(made: Sequence[Run], path: Path, notes: Notes) -> None:
    labels = side_by_side.labels(run.policy for run in made)
    short = [replace(run, policy=labels[run.policy]) for run in made]
    figures = [plots.heading(notes.header), *(plot.draw(short) for plot in report.PLOTS)]
    imsave(path, np.vstack([_pixels(figure) for figure in figures]))


def _pixels(figure: Figure) -> Pixels:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=DPI)
    written.seek(0)
    return np.asarray(imread(written))


_WRITE = {".html": _page, ".png": _picture}
