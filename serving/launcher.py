"""The supervisor of `bulkhead serve`: whatever happens, nothing that it started stays behind.

    launcher (this process, on the terminal)
      └─ child (serving.local, in a session of its own)
           ├─ Ray's processes, daemons among them
           └─ shard processes, in sessions of their own

The launcher and the child are both child subreapers. An orphan goes to the child while it lives,
else to the launcher, so each sees all that is below it:

- Ctrl-C or SIGTERM: the child shuts down in order, within a bound; then everything left is ended.
- The child dies, by SIGKILL too: the launcher ends everything left.
- The launcher dies, by SIGKILL too: the child's standard input closes (its lifeline), and the child
  ends everything below it and itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from serving.errors import UsageError
from serving.processes import become_subreaper, collect_ended, end_descendants

ORDERLY_S = 10.0
SWEEP_GRACE_S = 1.0
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Supervisor:
    """Runs one child and ends everything that came of it.

    Args:
        command: the child's command line; its standard input is the lifeline.
        environment: the child's whole environment.
        scratch: a directory that is removed when all is over.
        orderly_s: seconds that the child has to shut down in order.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        scratch: Path,
        orderly_s: float = ORDERLY_S,
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._scratch = scratch
        self._orderly_s = orderly_s
        self._signals: list[int] = []

    def run(self) -> int:
        """Runs until the child has ended or a signal asks for the end.

        Returns:
            The child's exit code; 130 after Ctrl-C; 0 after SIGTERM or SIGHUP; 1 when a signal
            killed the child or something could not be ended.
        """
        become_subreaper()
        wakeup_read, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
        }
        old_wakeup = signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        try:
            return self._supervise(child, wakeup_read)
        finally:
            if child.stdin is not None:
                child.stdin.close()
            left = end_descendants(os.getpid(), SWEEP_GRACE_S)
            shutil.rmtree(self._scratch, ignore_errors=True)
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(wakeup_read)
            os.close(wakeup_write)
            if left:
                pids = ", ".join(str(process.pid) for process in left)
                print(f"bulkhead: could not end processes {pids}", file=sys.stderr)

    def _supervise(self, child: subprocess.Popen[bytes], wakeup: int) -> int:
        asked = 0
        deadline = float("inf")
        while True:
            select.select([wakeup], [], [], max(0.0, min(1.0, deadline - time.monotonic())))
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup, 4096)
            code = collect_ended().get(child.pid)
            if code is not None:
                # Popen must not wait for a process that is already collected.
                child.returncode = code
                return self._result(asked, code)
            received, self._signals = self._signals, []
            for number in received:
                if asked:
                    print("bulkhead: ending at once", file=sys.stderr)
                    deadline = 0.0
                    break
                asked = number
                deadline = time.monotonic() + self._orderly_s
                child.send_signal(signal.SIGTERM)
            if time.monotonic() >= deadline:
                child.kill()
                deadline = float("inf")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            self._signals.append(number)

    @staticmethod
    def _result(asked: int, code: int) -> int:
        if asked == signal.SIGINT:
            return INTERRUPTED
        if asked:
            return 0
        if code < 0:
            name = signal.Signals(-code).name
            print(f"bulkhead: the serving process was ended by {name}", file=sys.stderr)
            return 1
        return code


def require_free_port(host: str, port: int) -> None:
    """Finds out at once what Ray Serve would say after half a minute, and less clearly.

    Raises:
        UsageError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "choose another with --port (make serve PORT=...)"
        ) from None


def supervise(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs `python -m serving.local` with these arguments under a supervisor.

    Returns:
        The exit code for this process.
    """
    # Ray puts unix sockets below this directory, and a socket's path has at most 107 bytes.
    scratch = Path(tempfile.mkdtemp(prefix="bulkhead-"))
    command = [sys.executable, "-m", "serving.local", "--scratch", str(scratch), *arguments]
    # What shards and libraries leave in their temporary directory goes with it.
    inside = {**environment, "TMPDIR": str(scratch)}
    return Supervisor(command, inside, scratch).run()


def follow_lifeline(scratch: Path | None = None) -> None:
    """In the child: ends everything below this process, and it, when standard input closes."""
    become_subreaper()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        end_descendants(os.getpid(), grace_s=0.0)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
