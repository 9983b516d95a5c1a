"""Starts a driver, the program that puts one engine under load, and talks to it.

A driver is a process of its own in a session of its own, so that each engine has fresh memory, its
own environment and its own packages, and so that everything it started can be ended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.memory import MemoryWatch
from benchmarks.times import RequestTimes, TimedRequest

__all__ = ["Driver", "DriverEnded", "DriverSpec"]

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 900.0
END_TIMEOUT_S = 15.0
_LOG_SHOWN = 3000


class DriverEnded(Exception):
    """A driver ended or went silent; the text has the last lines of its log."""


@dataclass(frozen=True, slots=True)
class DriverSpec:
    """How to start a driver.

    Attributes:
        name: for tables and log files.
        python: interpreter, of the environment that the engine is installed in.
        module: the driver.
        model: checkpoint directory.
        threads: processor cores to use.
        context: longest sequence, in tokens.
        sequences: most sequences at once.
        environment: additions to this process's environment.
        weights: format of linears and head, for Bulkhead's engine only.
    """

    name: str
    python: Path
    module: str
    model: Path
    threads: int
    context: int
    sequences: int
    environment: Mapping[str, str]
    weights: str = "plain"


class Driver:
    """A running driver; use as a context manager.

    Attributes:
        ready_s: seconds from the start of its process to its first answer.
        memory: resident memory of its processes over time.
    """

    def __init__(self, spec: DriverSpec, log: Path) -> None:
        self.name = spec.name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        answers, theirs = os.pipe()
        self._answers = os.fdopen(answers, "r")
        started = time.perf_counter()
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    [
                        *(str(spec.python), "-m", spec.module),
                        *("--model", str(spec.model)),
                        *("--threads", str(spec.threads)),
                        *("--context", str(spec.context)),
                        *("--sequences", str(spec.sequences)),
                        *("--answers", str(theirs)),
                        *("--weights", spec.weights),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": str(spec.threads), **spec.environment},
                    start_new_session=True,
                )
        finally:
            os.close(theirs)
        self.memory = MemoryWatch([self._process.pid])
        try:
            self._answer(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - started

    def run(self, requests: Sequence[TimedRequest], timeout_s: float = 900.0) -> list[RequestTimes]:
        """Puts the engine under this load; the times of each request, in order.

        Raises:
            DriverEnded: the driver ended, or gave no answer in time.
        """
        rows = [[request.at_s, list(request.prompt), request.tokens] for request in requests]
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"requests": rows}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended("ended") from None
        answer = self._answer(timeout_s)
        return [RequestTimes(submitted, tuple(tokens)) for submitted, tokens in answer["times"]]

    def close(self) -> None:
        """Ends the driver and whatever it started; may be called twice."""
        self.memory.stop()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        # The leader may be gone and its children not: the group still has their name.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self, timeout_s: float) -> dict[str, list[tuple[float, list[float]]]]:
        readable, _, _ = select.select([self._answers], [], [], timeout_s)
        if not readable:
            raise self._ended(f"gave no answer for {timeout_s:.0f} s")
        line = self._answers.readline()
        if not line:
            raise self._ended("ended")
        answer: dict[str, list[tuple[float, list[float]]]] = json.loads(line)
        return answer

    def _ended(self, how: str) -> DriverEnded:
        tail = self._log.read_text(errors="replace")[-_LOG_SHOWN:]
        return DriverEnded(f"{self.name} {how}; the end of {self._log}:\n{tail}")
