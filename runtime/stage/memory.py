"""Memory that this process may still take, and how many cache blocks fit in it.

A plan counts on memory that a node has declared. What is left once the weights are there is another
number: the machine runs other programs, a container has a limit of its own, the estimate was one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from runtime.stage.errors import InsufficientMemory, StageError
from runtime.stage.settings import StageSettings

__all__ = ["RESERVE_BYTES", "affordable_blocks", "available_bytes"]

_log = logging.getLogger(__name__)

_PROC: Final = Path("/proc")

RESERVE_BYTES: Final = 256 << 20
"""What each process of a stage leaves free: for the activations and logits of its steps, for the
tables and buffers that grow with use, and so that the machine is not driven to its last page."""


def affordable_blocks(
    settings: StageSettings, block_bytes: int, available: int | None = None
) -> int:
    """Cache blocks that a loaded stage has memory for, at most as many as are planned.

    Args:
        settings: of the stage.
        block_bytes: one block in all layers of the stage and all its ranks.
        available: bytes; None measures.

    Raises:
        InsufficientMemory: not even one sequence of full length fits.
    """
    planned = settings.cache_blocks
    least = min(planned, -(-settings.max_context // settings.block_size))
    left = available_bytes() if available is None else available
    reserve = settings.tp * RESERVE_BYTES
    fitting = max(0, left - reserve) // block_bytes
    if fitting < least:
        raise InsufficientMemory(
            f"cache: expected memory for {least} blocks ({_mib(least * block_bytes)}), for one "
            f"sequence of {least * settings.block_size} positions, found room for {fitting}: "
            f"{_mib(left)} are left after loading, of which {_mib(reserve)} stay free; "
            "free memory on this machine, or plan with a shorter context or more stages"
        )
    blocks = min(planned, fitting)
    _log.log(
        logging.INFO if blocks == planned else logging.WARNING,
        "cache: %d of %d planned blocks, %s of the %s that are left",
        blocks,
        planned,
        _mib(blocks * block_bytes),
        _mib(left),
    )
    return blocks


def available_bytes(proc: Path = _PROC) -> int:
    """Bytes that this process can take before somebody has to be killed; 0 at least.

    The smallest of what the machine can give without swapping (MemAvailable, proc_meminfo(5)) and
    what each control group around this process still has: its limit less its use, file pages that
    it would give back first not counted (Linux, admin-guide/cgroup-v2.rst and
    admin-guide/cgroup-v1/memory.rst).

    Args:
        proc: where procfs is mounted.

    Raises:
        StageError: procfs does not say.
    """
    rooms = [_machine_bytes(proc)]
    for kind, directory in _control_groups(proc):
        rooms.extend(_room(kind, directory))
    return max(0, min(rooms))


@dataclass(frozen=True, slots=True)
class _Kind:
    """File names of one version of the memory controller."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str


# Beyond memory.high processes are slowed down until they hardly run.
_VERSION_2: Final = _Kind(("memory.max", "memory.high"), "memory.current", "inactive_file")
_VERSION_1: Final = _Kind(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
)


def _machine_bytes(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise StageError(f"{proc}/meminfo: expected a line MemAvailable, found none")


def _control_groups(proc: Path) -> Iterator[tuple[_Kind, Path]]:
    """Directories of the control groups around this process, from its own one outwards."""
    mounts = list(_mounts(proc))
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = _VERSION_1 if controllers else _VERSION_2
        for mounted, root, mount in mounts:
            if mounted is kind:
                yield from ((kind, directory) for directory in _outwards(mount, root, group))


def _mounts(proc: Path) -> Iterator[tuple[_Kind, str, Path]]:
    """Mounted memory controllers: their version, the group at their top, and where they are."""
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        place, _, file_system = line.partition(" - ")
        root, mount = place.split()[3:5]
        name, _, options = file_system.split()[:3]
        if name == "cgroup2":
            yield _VERSION_2, root, Path(mount)
        elif name == "cgroup" and "memory" in options.split(","):
            yield _VERSION_1, root, Path(mount)


def _outwards(mount: Path, root: str, group: str) -> Iterator[Path]:
    path = PurePosixPath(group)
    # A container may see its mount's top only, under the name that it has outside.
    visible = path.is_relative_to(root) and ".." not in path.parts
    inner = path.relative_to(root).parts if visible else ()
    for depth in range(len(inner), -1, -1):
        yield mount.joinpath(*inner[:depth])


def _room(kind: _Kind, directory: Path) -> Iterator[int]:
    for name in kind.limits:
        limit = _text(directory / name)
        usage = _text(directory / kind.usage)
        # The outermost group has no limit, others may have none.
        if limit is None or usage is None or limit == "max":
            continue
        statistics = dict(
            line.split() for line in (_text(directory / "memory.stat") or "").splitlines()
        )
        yield int(limit) - int(usage) + int(statistics.get(kind.reclaimable, "0"))


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
