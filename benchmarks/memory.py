"""Resident memory of processes and their descendants over time, from /proc (proc(5))."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MemoryWatch", "slope"]

_INTERVAL_S = 1.0
_PROC = Path("/proc")


class MemoryWatch:
    """Samples once a second in a thread until `stop`.

    Attributes:
        samples: (seconds since the start, bytes). Pages that two processes share count twice.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self.samples: list[tuple[float, int]] = []
        self._pids = tuple(pids)
        self._begin = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    @property
    def peak_bytes(self) -> int:
        """The most that was seen."""
        return max((size for _, size in self.samples), default=0)

    def now(self) -> float:
        """The time on the samples' clock."""
        return time.monotonic() - self._begin

    def stop(self) -> None:
        """Ends the sampling; may be called twice."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            if size := sum(_resident(pid) for pid in _family(self._pids)):
                self.samples.append((self.now(), size))
            if self._stopped.wait(_INTERVAL_S):
                return


def slope(samples: Sequence[tuple[float, int]]) -> float:
    """Growth in bytes a second: the least-squares line through the samples; 0 below two."""
    if len(samples) < 2:
        return 0.0
    mean_s = sum(at for at, _ in samples) / len(samples)
    mean_size = sum(size for _, size in samples) / len(samples)
    spread = sum((at - mean_s) ** 2 for at, _ in samples)
    return sum((at - mean_s) * (size - mean_size) for at, size in samples) / spread


def _family(roots: Sequence[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            # A process may end between two looks.
            with contextlib.suppress(OSError):
                # The command's name, in parentheses, may hold anything; the parent is 2 after it.
                after = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(after[1]), []).append(int(entry.name))
    found: set[int] = set()
    left = list(roots)
    while left:
        pid = left.pop()
        found.add(pid)
        left += children.get(pid, [])
    return found


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
