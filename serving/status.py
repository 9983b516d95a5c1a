"""`bulkhead status` and `bulkhead logs`: what runs, and what it writes."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import httpx
from rich.console import Console
from rich.table import Table

from serving.errors import CommandError, UsageError
from serving.home import RunState

TIMEOUT_S = 15.0
MAX_LINES = 10_000
FOLLOW_S = 0.3
COLUMNS = ("role", "node", "state", "pid", "running", "waiting", "free_blocks", "detail")


def fetch_status(endpoint: str) -> Mapping[str, object]:
    """What the relay says of the deployment.

    Raises:
        CommandError: it does not answer.
    """
    try:
        response = httpx.get(f"{endpoint}/bulkhead/status", timeout=TIMEOUT_S, trust_env=False)
        response.raise_for_status()
        status = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise CommandError(
            f"{endpoint}: expected a deployment's status, found {type(error).__name__}; "
            "is it still starting, or has it been stopped?"
        ) from None
    if not isinstance(status, dict):
        raise CommandError(f"{endpoint}/bulkhead/status: expected an object, found another value")
    return status


def print_status(state: RunState, status: Mapping[str, object], console: Console) -> None:
    """Prints a table of shards, the weaknesses in force, and where things are."""
    console.print(
        f"{state.instance}: {status.get('state')}  model {state.model}  {state.endpoint}/v1",
        highlight=False,
    )

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    shards = status.get("shards")
    if isinstance(shards, list):
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for shard in shards:
            # Only the head schedules; the others have no cache blocks to hand out.
            shown = dict(shard)
            if not shard.get("total_blocks"):
                shown["free_blocks"] = "-"
            table.add_row(*(str(shown.get(name, "")) for name in COLUMNS))
        console.print(table)
    for name in ("error", "restarts"):
        if status.get(name):
            say(f"{name}: {status[name]}")
    plan = status.get("plan_table")
    if plan:
        say(f"\n{plan}")
    warnings = status.get("warnings")
    if isinstance(warnings, list):
        for text in warnings:
            say(f"warning: {text}")


def log_files(state: RunState, role: str | None) -> list[Path]:
    """The log files on this machine of one role, or of all.

    Raises:
        UsageError: there is no such role here.
    """
    directory = Path(state.log_directory) / state.instance
    files = sorted(directory.glob("*.log"))
    if role is None:
        if not files:
            raise UsageError(f"{directory}: expected shard logs, found none on this machine")
        return files
    chosen = [file for file in files if file.stem == role]
    if not chosen:
        known = ", ".join(file.stem for file in files) or "none on this machine"
        raise UsageError(f"role: expected one of {known}, found {role[:64]!r}")
    return chosen


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, min(count, MAX_LINES))]


def follow(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Yields (role, line) for every line that is written from now on; never ends by itself."""
    positions = {path: path.stat().st_size for path in paths}
    while True:
        for path in paths:
            size = path.stat().st_size
            if size < positions[path]:
                positions[path] = 0
            if size == positions[path]:
                continue
            with path.open("rb") as file:
                file.seek(positions[path])
                content = file.read(size - positions[path])
            complete = content.rfind(b"\n") + 1
            positions[path] += complete
            for line in content[:complete].decode(errors="replace").splitlines():
                yield path.stem, line
        time.sleep(FOLLOW_S)


def print_logs(paths: list[Path], count: int) -> None:
    """Prints the last lines of each file."""
    for path in paths:
        for line in last_lines(path, count):
            _print_line(path.stem if len(paths) > 1 else "", line)


def follow_logs(paths: list[Path]) -> NoReturn:
    """Prints lines as they are written, until interrupted."""
    for name, line in follow(paths):
        _print_line(name if len(paths) > 1 else "", line)
    raise AssertionError("following ends only by an interrupt")


def _print_line(name: str, line: str) -> None:
    sys.stdout.write(f"{name}: {line}\n" if name else f"{line}\n")
    sys.stdout.flush()
