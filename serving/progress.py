"""Progress of long steps: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

PLAIN_INTERVAL_S = 5.0


class Step:
    """One step on its way; `update` may be called as often as one likes, from one thread."""

    def update(self, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Says how far the step is; a total of 0 means that nobody knows."""


class _BarStep(Step):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def update(self, done: int = 0, total: int = 0, detail: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total or None, detail=detail)


class _LineStep(Step):
    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._last = time.monotonic()
        self._said = ""

    def update(self, done: int = 0, total: int = 0, detail: str = "") -> None:
        share = f" {100 * done // total} %" if total else ""
        text = f"{self._title}:{share} {detail}".rstrip()
        if text != self._said and time.monotonic() - self._last > PLAIN_INTERVAL_S:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._said, self._last = text, time.monotonic()


class Narrator:
    """Tells a person at a terminal, or a log, which step is running and how long each took."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """Prints a line (or several) as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """A step with a beginning and an end; says so when it is done."""
        start = time.monotonic()
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as progress:
                yield _BarStep(progress, progress.add_task(title, total=None, detail=""))
        else:
            yield _LineStep(self.console, title)
        self.say(f"{title}: done in {time.monotonic() - start:.1f} s")
