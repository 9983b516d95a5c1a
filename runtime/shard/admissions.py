"""Admissions on their way from the head to the last stage, where they meet the steps they are for.

Steps come through every stage, admissions directly over the link that carries results in the other
direction; so either may be first. Each step that admits sequences takes the next frame, which must
be its own: nothing that a step did not announce ever reaches the sampler.
"""

from __future__ import annotations

import queue
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
        self._frames: queue.SimpleQueue[tuple[int, tuple[Admission, ...]] | None] = (
            queue.SimpleQueue()
        )

    def put(self, step: int, admissions: tuple[Admission, ...]) -> None:
        """A frame has arrived.

        Raises:
            AdmissionRefused: more are waiting than steps may be in flight.
        """
        if self._frames.qsize() >= self._depth:
            raise AdmissionRefused(
                f"admission frames waiting: expected at most {self._depth}, found another"
            )
        self._frames.put((step, admissions))

    def close(self) -> None:
        """Wakes whoever waits."""
        self._frames.put(None)

    def take(self, header: StepHeader) -> tuple[Admission, ...]:
        """The admissions of a step; none, and no wait, where its header admits nobody.

        Raises:
            AdmissionRefused: the next frame is not of this step or does not name the slots that
                the header admits, or did not come in time, or the queue was closed.
        """
        if not header.admitted:
            return ()
        try:
            frame = self._frames.get(timeout=self._deadline_s)
        except queue.Empty:
            raise AdmissionRefused(
                f"step {header.step}: expected its admissions within {self._deadline_s:.1f} s, "
                "found none: the head hangs"
            ) from None
        if frame is None:
            raise AdmissionRefused(f"step {header.step}: the epoch ended")
        step, admissions = frame
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
