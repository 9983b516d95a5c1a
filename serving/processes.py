"""Finding and ending the descendants of a process, through /proc (Linux).

Daemons leave their process group and session, so signalling a group does not reach them. A process
that is a *child subreaper* (prctl(2), PR_SET_CHILD_SUBREAPER) becomes the parent of every orphan
below it, so that its descendants in /proc are all that was ever started below it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
POLL_S = 0.05


def become_subreaper() -> None:
    """Makes this process adopt every orphan among its descendants.

    Raises:
        OSError: the kernel refuses (Linux before 3.4).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(code)}")


@dataclass(frozen=True, slots=True)
class Process:
    """One process as /proc shows it; pid and start time together are never used twice.

    Attributes:
        pid: process id.
        parent: process id of its parent.
        started: start time in clock ticks since boot.
        state: one letter, "Z" for one that has ended and waits to be collected.
    """

    pid: int
    parent: int
    started: int
    state: str


def read_process(pid: int) -> Process | None:
    """The process of that id, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, spaces and parentheses included (proc_pid_stat(5)).
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[19]), fields[0])


def descendants(root: int) -> list[Process]:
    """All living descendants of a process, nearest first; ended ones are left out."""
    children: dict[int, list[Process]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := read_process(int(entry))) is not None:
            children[process.parent].append(process)
    found: list[Process] = []
    parents = [root]
    while parents:
        below = [process for parent in parents for process in children[parent]]
        found.extend(below)
        parents = [process.pid for process in below]
    return [process for process in found if process.state != "Z"]


def send_signal(process: Process, number: signal.Signals) -> None:
    """Signals a process unless it has ended; never one that took over its id."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # The descriptor pins the process; only now can the start time be compared without a race.
        current = read_process(process.pid)
        if current is not None and current.started == process.started:
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def collect_ended() -> dict[int, int]:
    """Collects children that have ended: exit code (negative: signal) by process id."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def end_descendants(root: int, grace_s: float, kill_s: float = 10.0) -> list[Process]:
    """Ends every descendant: SIGTERM, after the grace period SIGKILL, until none is left.

    New processes that appear meanwhile are ended too.

    Args:
        root: the process whose descendants are ended; usually this one.
        grace_s: seconds between SIGTERM and SIGKILL; 0 kills at once.
        kill_s: seconds to go on killing; what cannot be killed by then (a process in an
            uninterruptible system call) is returned.

    Returns:
        The descendants that are still there.
    """
    start = time.monotonic()
    asked: set[tuple[int, int]] = set()
    while left := descendants(root):
        elapsed = time.monotonic() - start
        if elapsed >= grace_s + kill_s:
            break
        for process in left:
            identity = (process.pid, process.started)
            if elapsed >= grace_s:
                send_signal(process, signal.SIGKILL)
            elif identity not in asked:
                asked.add(identity)
                send_signal(process, signal.SIGTERM)
        if root == os.getpid():
            collect_ended()
        time.sleep(POLL_S)
    if root == os.getpid():
        collect_ended()
    return left
