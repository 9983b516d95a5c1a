"""Decides what the next step computes: continuous batching over a paged cache.

Each step first carries one token for sequences that are decoding, then, within the same budget of
tokens, chunks of prompts (Orca, OSDI '22; Sarathi-Serve, OSDI '24). When no block is left, the
sequence that is last in line gives its blocks back and is computed again later, prompt and output
in one go (vLLM, SOSP '23); what of its blocks has not been taken meanwhile it finds again.

Who comes first: within a tenant, who arrived first. Among tenants, turns: a tenant's next sequence
comes one turn after its last, and a tenant with nothing waiting joins at the next turn
(start-time fair queueing, Goyal et al., SIGCOMM '96), so that a tenant with many requests delays
another by no more than a turn. Turns only grow, so nobody waits for ever. The order is total and
fixed, for admission as for preemption: the first in line always gets on.

Steps in flight never share a decode, so a pipeline is kept busy by several groups of sequences
taking turns: one group per stage, that is `depth` - 1. A prompt's chunks follow each other without
waiting for results, since every stage takes steps in order. The last place in flight is for
prompts alone and is used while nothing decodes: a step without decodes would delay all streams by
the reading of the weights once more, where the same rows ride in a decode step.

How much of a prompt rides along: see `_Allowance`.

Longrope models (see `RotaryBorder`): an output that outgrows the border of a family that recomputes
goes the way of a preempted sequence and waits for room as one. All of it is then long, so that none
of its blocks is of use to it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from runtime.engine.blocks import BlockAllocator, PrefixNames
from runtime.engine.pace import StepPace
from runtime.engine.request import Sequence, Status
from runtime.engine.runner import Recovery
from runtime.stage.border import RotaryBorder
from security.channel.admission import Admission
from security.channel.frame import SequenceStep, StepHeader

__all__ = ["EngineLimits", "Part", "Scheduler", "Step"]

_RANK = attrgetter("rank")
_SETTLED = 4
"""Tokens after which a stream has a pace that others must keep."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the signed plan template allows, and how long the queue may get.

    Attributes:
        max_sequences: sequences running at once.
        max_step_tokens: tokens a step may carry; where it is smaller than `max_sequences`, it
            bounds the sequences running at once, too.
        max_context: positions of one sequence.
        block_size: positions of a cache block.
        cache_blocks: blocks in every stage, as planned; an epoch may have fewer.
        vocabulary: token ids are below this.
        max_waiting: sequences that may wait for a place; more are refused. One tenant may take
            seven eighths of the places.
        rotary_border: of a longrope model; None for any other.
    """

    max_sequences: int
    max_step_tokens: int
    max_context: int
    block_size: int
    cache_blocks: int
    vocabulary: int
    max_waiting: int = 1024
    rotary_border: RotaryBorder | None = None

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
    def max_live(self) -> int:
        """Sequences running and waiting at once."""
        return self.max_running + self.max_waiting

    @property
    def max_live_of_tenant(self) -> int:
        """Those of one tenant: an eighth of the queue is kept for others."""
        return self.max_live - self.max_waiting // 8

    @property
    def max_length(self) -> int:
        """Prompt and output tokens of one sequence: what context and planned cache both hold."""
        return min(self.max_context, self.cache_blocks * self.block_size)


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence's part of a step.

    Attributes:
        sequence: whose.
        run: the sequence's run when the step was made.
        count: positions.
        sampled: whether it gets a token from the result.
    """

    sequence: Sequence
    run: int
    count: int
    sampled: bool

    @property
    def current(self) -> bool:
        """Whether the sequence still wants what the step brings: not ended or preempted since."""
        return self.sequence.run == self.run


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what goes to the stages, and whose it is.

    Attributes:
        header: for the stages.
        token_ids: `header.tokens` ids.
        parts: in the header's order.
        decodes: sequences in it whose last token alone is computed.
        admissions: for the last stage, of those that the header admits, in order.
    """

    header: StepHeader
    token_ids: list[int] = field(repr=False)
    parts: tuple[Part, ...]
    decodes: int
    admissions: tuple[Admission, ...]

    @property
    def prompt_tokens(self) -> int:
        """Positions that are not decodes."""
        return len(self.token_ids) - self.decodes


@dataclass(frozen=True, slots=True)
class _Allowance:
    """Prompt tokens that a step may carry, for the sake of the streams that wait for it.

    A prompt that came after a stream had settled may make a step take not quite twice the usual
    time. Prompts that came in one burst with all the streams take what a step holds: otherwise the
    first of a burst would finish before the last has a token. A burst takes a moment to come in
    over a network; the first of it may have a token by then.

    Attributes:
        settled: newest arrival when the oldest stream settled.
        most: tokens up to and with those of a prompt that came no later.
        late: the same for a prompt that came after it.
    """

    settled: int
    most: int
    late: int

    def of(self, sequence: Sequence) -> int:
        """Tokens of the step up to and with this sequence's."""
        return self.late if sequence.arrival > self.settled else self.most


@dataclass(slots=True)
class _Turns:
    """A tenant's place: sequences that have not ended, and the turn of its newest."""

    live: int = 0
    newest: int = 0


class Scheduler:
    """Owns every sequence that has not ended, their slots and the cache blocks.

    Invariants: a block has as many holders as running sequences have it in their table; it is in
    several tables only once it is full, and was computed for the tenant of every one of them.
    """

    def __init__(self, limits: EngineLimits, depth: int, recovery: Recovery) -> None:
        if depth < 1:
            raise ValueError(f"depth: expected at least one step in flight, found {depth}")
        self.limits = limits
        self.blocks = BlockAllocator(limits.cache_blocks, limits.block_size)
        self.pace = StepPace()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._names = PrefixNames(limits.block_size)
        self._groups = max(1, depth - 1)
        self._alone_after = recovery.alone_after
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._steps = 0
        self._turn = 0
        self._tenants: dict[bytes, _Turns] = {}
        self._newest = 0

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence into the queue, at its place in line."""
        if sequence.rank is None:
            turns = self._tenants.setdefault(sequence.tenant, _Turns())
            turns.live += 1
            turns.newest = max(turns.newest, self._turn) + 1
            sequence.rank = (turns.newest, sequence.arrival)
            self._newest = max(self._newest, sequence.arrival)
        if self._is_long(sequence) != sequence.long:
            sequence.long = not sequence.long
            sequence.names.clear()
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_RANK)

    def schedule(self, in_flight: int) -> Step | None:
        """The next step, given the number of steps in flight; None when nothing can start."""
        if self.limits.rotary_border is not None:
            self._preempt_outgrown()
        streams = [sequence for sequence in self.running if sequence.decoding]
        if in_flight >= self._groups and (streams or not self._prompts_ready()):
            return None
        share = -(-len(streams) // self._groups)
        chosen = [(sequence, 1) for sequence in self._pick_decoding(share)]
        decodes = len(chosen)
        budget = self.limits.max_step_tokens - decodes
        allowance = self._allowance(streams, share)
        measures = decodes and self._newest > allowance.settled and self._prompts_ready()
        if measures and self.pace.wants_decodes_alone(decodes):
            return self._make_step(chosen, decodes)
        used = 0
        prompts = self._pick_prompts()
        while used < budget and (sequence := next(prompts, None)):
            allowed = min(budget, allowance.of(sequence))
            count = self._rows_alike(sequence, min(sequence.remaining, allowed - used))
            if count <= 0:
                break
            used += count
            chosen.append((sequence, count))
        return self._make_step(chosen, decodes) if chosen else None

    def complete(self, step: Step) -> None:
        """The stages have computed the step: its positions are in the cache."""
        for part in step.parts:
            sequence = part.sequence
            if not part.current:
                continue
            sequence.in_flight -= 1
            sequence.computed += part.count
            # The token of this step is appended after this.
            if part.sampled and len(sequence.output) + 1 == _SETTLED:
                sequence.settled = self._newest
            self._publish(sequence)

    def end(self, sequence: Sequence) -> None:
        """Forgets a sequence and frees what it holds, at once: steps pass the stages in order.

        A step of it that is in flight computes for nothing.
        """
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        sequence.status = Status.ENDED
        turns = self._tenants[sequence.tenant]
        turns.live -= 1
        if turns.live == 0:
            del self._tenants[sequence.tenant]

    def reset(self) -> None:
        """The caches and the steps in flight are lost: everything running waits again."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.resize(self.blocks.blocks)
        self._steps = 0

    def resize(self, cache_blocks: int) -> None:
        """Starts with an empty cache of so many blocks; nothing may be running."""
        assert not self.running, "what runs holds blocks of the old cache"
        self.blocks = BlockAllocator(cache_blocks, self.limits.block_size)

    def _is_long(self, sequence: Sequence) -> bool:
        border = self.limits.rotary_border
        prompt = len(sequence.request.prompt)
        return border is not None and border.makes_long(prompt, sequence.length)

    def _preempt_outgrown(self) -> None:
        """Takes off the stages what has grown past the border and is to be computed anew."""
        for sequence in [it for it in self.running if self._is_long(it) != it.long]:
            self._preempt(sequence)

    def _rows_alike(self, sequence: Sequence, count: int) -> int:
        """So many of the sequence's next rows, or as many of them as are all long or all not."""
        border = self.limits.rotary_border
        if border is None or sequence.long or sequence.planned >= border.positions:
            return count
        return min(count, border.positions - sequence.planned)

    def _prompts_ready(self) -> bool:
        waiting = any(s.remaining > 0 and not s.decoding for s in self.running)
        return waiting or (bool(self.waiting) and self._admissible(self.waiting[0]))

    def _pick_decoding(self, share: int) -> Iterator[Sequence]:
        """Up to `share` decoding sequences, in line, each with a block for its token."""
        for sequence in list(self.running):
            if share == 0:
                return
            # One before it may have taken its blocks a moment ago.
            ready = sequence.status is Status.RUNNING and sequence.decoding
            if ready and not sequence.in_flight and self._grow(sequence):
                share -= 1
                yield sequence

    def _pick_prompts(self) -> Iterator[Sequence]:
        """Sequences with more than a token to compute: the running ones, then new ones."""
        for sequence in list(self.running):
            if sequence.remaining > 0 and not sequence.decoding:
                yield sequence
        while self.waiting and self._admissible(self.waiting[0]):
            yield self._admit(self.waiting.pop(0))

    def _allowance(self, streams: list[Sequence], share: int) -> _Allowance:
        """What prompts may take of the next step, which has `share` decodes of the streams."""
        most = self.limits.max_step_tokens
        settled = min((s.settled for s in streams if s.settled is not None), default=self._newest)
        late = self.pace.prompt_tokens(share) if streams else None
        return _Allowance(settled, most, most if late is None else late)

    def _admit(self, sequence: Sequence) -> Sequence:
        """Takes the first in line onto the stages, with what is cached of its prefix."""
        found = self._find(sequence)
        sequence.blocks = self.blocks.share(found)
        missing = self.blocks.needed(sequence.length) - len(found)
        sequence.blocks += self.blocks.allocate(missing)
        sequence.computed = sequence.planned = len(found) * self.limits.block_size
        sequence.published = len(found)
        sequence.slot = self._slots.pop()
        sequence.run += 1
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_RANK)
        assert sequence.rank is not None, "it was in the queue"
        self._turn = max(self._turn, sequence.rank[0])
        return sequence

    def _find(self, sequence: Sequence) -> list[int]:
        """Cached blocks of its prefix. The last token is always computed: its logits are needed."""
        full = (sequence.length - 1) // self.limits.block_size
        self._name(sequence, full)
        return self.blocks.find(sequence.names[:full])

    def _name(self, sequence: Sequence, full: int) -> None:
        self._names.extend(
            sequence.names, full, sequence.tenant, sequence.tokens, long=sequence.long
        )

    def _publish(self, sequence: Sequence) -> None:
        full = sequence.computed // self.limits.block_size
        if full > sequence.published:
            self._name(sequence, full)
            for place in range(sequence.published, full):
                self.blocks.publish(sequence.blocks[place], sequence.names[place])
            sequence.published = full

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
        needed = self.blocks.needed(sequence.length) + spare
        if needed <= self.blocks.free:
            return True
        found = self._find(sequence)
        return needed - len(found) <= self.blocks.free_besides(found)

    def _grow(self, sequence: Sequence) -> bool:
        """Sees that there is a block for the last token, at the expense of those behind it in line.

        False when the blocks are held by those before it, or by decodes in flight. Then the
        sequence waits; the first in line is always served in the end, because one sequence alone
        always fits.
        """
        missing = self.blocks.needed(sequence.length) - len(sequence.blocks)
        if not missing:
            return True
        while self.blocks.free < missing:
            # A decode in flight brings a token, which is too good to lose; a chunk does not.
            victim = self.running[-1]
            for other in reversed(self.running):
                victim = other
                if other is sequence or not other.in_flight or other.remaining:
                    break
            if victim is sequence:
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
        sequence.run += 1
        sequence.in_flight = 0
        sequence.admitted = False
        sequence.computed = sequence.planned = sequence.published = 0

    def _make_step(self, chosen: list[tuple[Sequence, int]], decodes: int) -> Step:
        entries: list[SequenceStep] = []
        token_ids: list[int] = []
        parts: list[Part] = []
        admissions: list[Admission] = []
        border = self.limits.rotary_border
        for sequence, count in chosen:
            assert sequence.slot is not None, "a running sequence has a slot"
            start = sequence.planned
            last = count == sequence.remaining
            parts.append(Part(sequence, sequence.run, count, last))
            admitted = not sequence.admitted
            if admitted:
                admissions.append(sequence.admission())
                sequence.admitted = True
            token_ids += sequence.tokens(start, count)
            entries.append(
                SequenceStep(
                    slot=sequence.slot,
                    start=start,
                    count=count,
                    blocks=tuple(sequence.blocks[: self.blocks.needed(start + count)]),
                    sampled=last,
                    admitted=admitted,
                    long=sequence.long or (border is not None and start >= border.positions),
                )
            )
            sequence.in_flight += 1
            sequence.planned += count
        header = StepHeader(step=self._steps, sequences=tuple(entries))
        self._steps += 1
        return Step(header, token_ids, tuple(parts), decodes, tuple(admissions))
