"""What the engine asks of the pipeline below it, and what happens when that breaks.

Recovery: when a `StepRunner` raises `PipelineBroken`, every cache block in every stage is lost.
The engine drops the steps in flight, puts every running sequence back into the waiting queue with
the tokens that it has produced, and waits for a new epoch. Sequences are then computed again from
prompt and produced tokens: their streams pause, nothing that was sent is sent again or changed.
The rules that bound this are in `Recovery`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from security.channel.admission import Admission
from security.channel.frame import StepHeader, StepResult

__all__ = ["PipelineBroken", "Recovery", "StepRunner", "check_result"]


class PipelineBroken(Exception):
    """The steps in flight are lost: a stage, a link, a deadline or the model's numbers failed."""


class StepRunner(Protocol):
    """Carries steps through the stages, strictly first in, first out. Used by one thread.

    After `submit` or `result` raised `PipelineBroken`, both keep raising it until `wait_ready`
    has returned True.
    """

    @property
    def depth(self) -> int:
        """Steps that may be in flight: the number of stages plus one (at least 1)."""
        ...

    @property
    def cache_blocks(self) -> int:
        """Cache blocks that every stage has in the epoch that `wait_ready` adopted last.

        At least 1, at most what is planned. Asked only after `wait_ready` has returned True.
        """
        ...

    def submit(
        self, header: StepHeader, token_ids: list[int], admissions: Sequence[Admission]
    ) -> None:
        """Starts a step.

        Args:
            header: of the step.
            token_ids: `header.tokens` ids, in the order of the sequences.
            admissions: of the sequences that the header admits, in the order of `header.admitted`.

        Raises:
            PipelineBroken: the step and all others in flight are lost.
        """
        ...

    def result(self, timeout: float) -> StepResult:
        """Waits for the oldest step in flight; every step has a result, sampled or not.

        The runner passes only what `check_result` accepts; anything else is a broken pipeline.

        Raises:
            PipelineBroken: also when nothing came within `timeout` seconds (a peer that hangs
                without dying) and when the model's numbers are not finite.
        """
        ...

    def wait_ready(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds for an epoch to be up, with empty caches.

        Step numbers restart at 0 with it. Returns False, without raising, when there is none yet.
        """
        ...


@dataclass(frozen=True, slots=True)
class Recovery:
    """Bounds on recovering.

    Attributes:
        deadline_s: clients get a retryable error when no step has come back for so long since
            the pipeline broke, or since the start.
        poll_s: how often arrivals and cancellations are looked at while the pipeline is down.
        alone_after: a sequence that was in flight in so many breaks without a token in between is
            run alone, so that a request that breaks the model is told from its neighbours.
        give_up_after: after so many, it gets an error.
    """

    deadline_s: float = 120.0
    poll_s: float = 0.1
    alone_after: int = 2
    give_up_after: int = 4

    def __post_init__(self) -> None:
        if self.deadline_s <= 0 or self.poll_s <= 0:
            raise ValueError("recovery: expected a deadline and a poll interval above 0 s")
        if not 1 <= self.alone_after < self.give_up_after:
            raise ValueError(
                "recovery: expected 1 <= alone_after < give_up_after, found "
                f"{self.alone_after} and {self.give_up_after}"
            )


def check_result(
    header: StepHeader, result: StepResult, vocabulary: int, asked: Sequence[int | None]
) -> None:
    """Checks a result against the oldest step in flight.

    Args:
        header: of that step.
        result: what came back.
        vocabulary: token ids are below this.
        asked: the `SamplingParameters.logprobs` of each sampled sequence.

    Raises:
        PipelineBroken: another step, another number of tokens or of logprobs, or a token that does
            not exist.
    """
    if result.step != header.step:
        raise PipelineBroken(f"result of a step: expected {header.step}, found {result.step}")
    if len(result.tokens) != header.sampled:
        raise PipelineBroken(
            f"step {header.step}: expected {header.sampled} tokens, found {len(result.tokens)}"
        )
    wanted = [None if count is None else min(count, vocabulary) for count in asked]
    found = [None if entry is None else len(entry.alternatives) for entry in result.logprobs]
    if (found or [None] * header.sampled) != wanted:
        # How many alternatives a client asked for is its own affair, and this text is logged.
        raise PipelineBroken(
            f"step {header.step}: expected the logprobs that its sequences asked for, found others"
        )
    for token in result.tokens:
        if not 0 <= token < vocabulary:
            raise PipelineBroken(
                f"step {header.step}: expected token ids below {vocabulary}, found {token}"
            )
