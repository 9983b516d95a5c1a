"""Decides what the next step computes: continuous batching over a paged cache.

Each step first carries one token for sequences that are decoding, then, within the same budget of
tokens, chunks of prompts (Orca, OSDI '22; Sarathi-Serve, OSDI '24). Sequences are admitted first
come, first served. When no block is left, the youngest sequence gives its blocks back and is
computed again later, prompt and output in one go (vLLM, SOSP '23).

Steps in flight never share a sequence, so a pipeline is kept busy by several groups of sequences
taking turns: one group per stage, that is `depth` - 1. The last place in flight is for prompts.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from runtime.engine.blocks import BlockAllocator
from runtime.engine.request import Sequence, Status
from runtime.engine.runner import Recovery
from security.channel.admission import Admission
from security.channel.frame import SequenceStep, StepHeader

__all__ = ["EngineLimits", "Scheduler", "Step"]

_ARRIVAL = attrgetter("arrival")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the signed plan template allows, and how long the queue may get.

    Attributes:
        max_sequences: sequences running at once.
        max_step_tokens: tokens a step may carry; where it is smaller than `max_sequences`, it
            bounds the sequences running at once, too.
        max_context: positions of one sequence.
        block_size: positions of a cache block.
        cache_blocks: blocks in every stage.
        vocabulary: token ids are below this.
        max_waiting: sequences that may wait for a place; more are refused.
    """

    max_sequences: int
    max_step_tokens: int
    max_context: int
    block_size: int
    cache_blocks: int
    vocabulary: int
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in (
            "max_sequences",
            "max_step_tokens",
            "max_context",
            "block_size",
            "cache_blocks",
            "vocabulary",
            "max_waiting",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")

    @property
    def max_running(self) -> int:
        """Sequences running at once; every one can then be in any step."""
        return min(self.max_sequences, self.max_step_tokens)

    @property
    def max_length(self) -> int:
        """Prompt and output tokens of one sequence: what context and cache both hold."""
        return min(self.max_context, self.cache_blocks * self.block_size)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what goes to the stages, and whose it is.

    Attributes:
        header: for the stages.
        token_ids: `header.tokens` ids.
        parts: the sequences in the header's order, each with its number of positions.
        sampled: those that get a token from the result, in order.
        admissions: for the last stage, of those that the header admits, in order.
    """

    header: StepHeader
    token_ids: list[int]
    parts: tuple[tuple[Sequence, int], ...]
    sampled: tuple[Sequence, ...]
    admissions: tuple[Admission, ...]


class Scheduler:
    """Owns every sequence that has not ended, their slots and the cache blocks.

    Invariant: a block is free or owned by exactly one running sequence.
    """

    def __init__(self, limits: EngineLimits, depth: int, recovery: Recovery) -> None:
        if depth < 1:
            raise ValueError(f"depth: expected at least one step in flight, found {depth}")
        self.limits = limits
        self.blocks = BlockAllocator(limits.cache_blocks, limits.block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._groups = max(1, depth - 1)
        self._alone_after = recovery.alone_after
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._steps = 0

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence into the queue, in order of arrival."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_ARRIVAL)

    def schedule(self, in_flight: int) -> Step | None:
        """The next step, given the number of steps in flight; None when nothing can start."""
        if in_flight >= self._groups and not self._prompts_ready():
            return None
        decoding = sum(sequence.decoding for sequence in self.running)
        share = -(-decoding // self._groups)
        chosen = [(sequence, 1) for sequence in self._pick_decoding(share)]
        budget = self.limits.max_step_tokens - len(chosen)
        for sequence in self._pick_prompts():
            if budget == 0:
                break
            count = min(sequence.remaining, budget)
            budget -= count
            chosen.append((sequence, count))
        return self._make_step(chosen) if chosen else None

    def complete(self, step: Step) -> None:
        """The stages have computed the step: its positions are in the cache."""
        for sequence, count in step.parts:
            sequence.in_flight = False
            sequence.computed += count

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence that is not in flight and frees what it holds."""
        assert not sequence.in_flight, "its step still writes to its blocks"
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        sequence.status = Status.ENDED

    def reset(self) -> None:
        """The caches and the steps in flight are lost: everything running waits again."""
        for sequence in list(self.running):
            sequence.in_flight = False
            self._preempt(sequence)
        self._steps = 0

    def _prompts_ready(self) -> bool:
        waiting = any(not s.in_flight and not s.decoding for s in self.running)
        return waiting or (bool(self.waiting) and self._admissible(self.waiting[0]))

    def _pick_decoding(self, share: int) -> Iterator[Sequence]:
        """Up to `share` decoding sequences, oldest first, each with a block for its token."""
        for sequence in list(self.running):
            if share == 0:
                return
            # An older sequence may have taken this one's blocks a moment ago.
            ready = sequence.status is Status.RUNNING and sequence.decoding
            if ready and not sequence.in_flight and self._grow(sequence):
                share -= 1
                yield sequence

    def _pick_prompts(self) -> Iterator[Sequence]:
        """Sequences with more than a token to compute: the running ones, then new ones."""
        for sequence in list(self.running):
            if not sequence.in_flight and not sequence.decoding:
                yield sequence
        while self.waiting and self._admissible(self.waiting[0]):
            sequence = self.waiting.pop(0)
            sequence.blocks = self.blocks.allocate(self.blocks.needed(sequence.length))
            sequence.slot = self._slots.pop()
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=_ARRIVAL)
            yield sequence

    def _admissible(self, sequence: Sequence) -> bool:
        if not self.running:
            return True
        if not self._slots:
            return False
        suspects = (*self.running, sequence)
        if any(suspect.breaks >= self._alone_after for suspect in suspects):
            return False
        # A block to spare for each running sequence, lest the newcomer is thrown out at once.
        spare = len(self.running)
        return self.blocks.needed(sequence.length) + spare <= self.blocks.free

    def _grow(self, sequence: Sequence) -> bool:
        """Sees that there is a block for the last token, at the expense of younger sequences.

        False when the blocks are held by older sequences or by steps in flight. Then the sequence
        waits; the oldest is always served in the end, because one sequence alone always fits.
        """
        missing = self.blocks.needed(sequence.length) - len(sequence.blocks)
        while self.blocks.free < missing:
            younger = (
                other
                for other in reversed(self.running)
                if other.arrival > sequence.arrival and not other.in_flight
            )
            victim = next(younger, None)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.blocks += self.blocks.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self.add(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "a running sequence has a slot"
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        self._slots.append(sequence.slot)
        sequence.slot = None
        sequence.admitted = False
        sequence.computed = 0

    def _make_step(self, chosen: list[tuple[Sequence, int]]) -> Step:
        parts: list[SequenceStep] = []
        token_ids: list[int] = []
        sampled: list[Sequence] = []
        admissions: list[Admission] = []
        for sequence, count in chosen:
            assert sequence.slot is not None, "a running sequence has a slot"
            start = sequence.computed
            last = count == sequence.remaining
            if last:
                sampled.append(sequence)
            admitted = not sequence.admitted
            if admitted:
                admissions.append(sequence.admission())
                sequence.admitted = True
            sequence.in_flight = True
            token_ids += sequence.tokens(start, count)
            parts.append(
                SequenceStep(
                    slot=sequence.slot,
                    start=start,
                    count=count,
                    blocks=tuple(sequence.blocks[: self.blocks.needed(start + count)]),
                    sampled=last,
                    admitted=admitted,
                )
            )
        header = StepHeader(step=self._steps, sequences=tuple(parts))
        self._steps += 1
        return Step(header, token_ids, tuple(chosen), tuple(sampled), tuple(admissions))
