"""Admissions on their way from the head to the last stage, where they meet the steps they are for.

Steps come through every stage, admissions directly over the link that carries results in the other
direction; so either may be first. Each step that admits sequences takes the next frame, which must
be its own: nothing that a step did not announce ever reaches the sampler.

A stage between could hide an admission by clearing the flag in the header; the newcomer would then
be drawn with the parameters of whoever had the slot before. So a frame whose step goes by without
it, or has gone by, is a fault as well.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import ClassVar

from security.channel.admission import Admission
from security.channel.frame import StepHeader
from security.errors import SecurityError

__all__ = ["AdmissionQueue", "AdmissionRefused"]


class AdmissionRefused(SecurityError):
    """An admission that no step asked for, that is for another step, that is missing, or is one
    too many in the queue.
    """

    code: ClassVar[str] = "admission_refused"


class AdmissionQueue:
    """Filled by the thread that receives, emptied by the thread that computes.

    Args:
        depth: steps that may be in flight; each has one frame at most.
        deadline_s: longest wait for the frame of a step that is there.
    """

    def __init__(self, depth: int, deadline_s: float) -> None:
        self._depth = depth
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._frames: deque[tuple[int, tuple[Admission, ...]]] = deque()
        self._passed = -1
        self._closed = False

    def put(self, step: int, admissions: tuple[Admission, ...]) -> None:
        """A frame has arrived.

        Raises:
            AdmissionRefused: more are waiting than steps may be in flight, or its step has passed.
        """
        with self._changed:
            if len(self._frames) >= self._depth:
                raise AdmissionRefused(
                    f"admission frames waiting: expected at most {self._depth}, found another"
                )
            if step <= self._passed:
                raise _hidden(step)
            self._frames.append((step, admissions))
            self._changed.notify()

    def close(self) -> None:
        """Wakes whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, header: StepHeader) -> tuple[Admission, ...]:
        """The admissions of a step; none, and no wait, where its header admits nobody.

        Raises:
            AdmissionRefused: the next frame is not of this step or does not name the slots that
                the header admits, or did not come in time, or the queue was closed; or a frame is
                for this step, whose header admits nobody.
        """
        with self._changed:
            admissions = self._next(header) if header.admitted else ()
            if not header.admitted and self._frames and self._frames[0][0] <= header.step:
                raise _hidden(self._frames[0][0])
            self._passed = header.step
        return admissions

    def _next(self, header: StepHeader) -> tuple[Admission, ...]:
        self._changed.wait_for(lambda: self._closed or self._frames, self._deadline_s)
        if self._closed:
            raise AdmissionRefused(f"step {header.step}: the epoch ended")
        if not self._frames:
            raise AdmissionRefused(
                f"step {header.step}: expected its admissions within {self._deadline_s:.1f} s, "
                "found none: the head hangs"
            )
        step, admissions = self._frames.popleft()
        if step != header.step:
            raise AdmissionRefused(
                f"step {header.step}: expected its own admissions, found those of step {step}"
            )
        slots = tuple(admission.slot for admission in admissions)
        if slots != header.admitted:
            raise AdmissionRefused(
                f"step {step}: expected admissions to slots {header.admitted}, found {slots}"
            )
        return admissions


def _hidden(step: int) -> AdmissionRefused:
    return AdmissionRefused(
        f"step {step}: expected a header that admits sequences, as the head says, found one that "
        "admits none; a stage between has changed it"
    )
