"""Tables on the terminal, JSON in a file, and on which machine it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.checkpoint import CACHE, ROOT
from benchmarks.times import Figures

__all__ = ["FIGURE_COLUMNS", "figure_cells", "machine", "print_table", "write_json"]

RESULTS = CACHE / "results"

FIGURE_COLUMNS = (
    "tokens/s",
    "first token mean s",
    "p50",
    "max",
    "per token s",
)


def figure_cells(figures: Figures) -> tuple[str, ...]:
    """The cells of `FIGURE_COLUMNS`."""
    return (
        f"{figures.tokens_per_second:.1f}",
        f"{figures.first_token_mean_s:.3f}",
        f"{figures.first_token_p50_s:.3f}",
        f"{figures.first_token_max_s:.3f}",
        f"{figures.token_mean_s:.4f}",
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column to the left, numbers to the right."""
    cells = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        first, *others = (
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Writes results with the machine that they hold for, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **document}, indent=2) + "\n")
    print(f"\nwritten to {path}")


def machine() -> dict[str, object]:
    """Date, processor, cores and versions, as far as they decide what is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
