"""A step as a GPU needs it: all integers in one array, copied to the device at once.

Every copy to a confidential GPU is encrypted and passes a bounce buffer, which costs far more than
its bytes. So token ids, positions, places in the cache, block tables and lengths of a step are
packed into one array of 32-bit integers, after the hidden states where a stage before this one sent
some, and a `Span` says where each of them is.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from security.channel.frame import SequenceStep, StepHeader

__all__ = ["Group", "GroupPlan", "Span", "StepBuffer", "StepPlan", "plan_decodes", "plan_rows"]

_ALIGNMENT = 64
_INT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor of integers is in the packed array."""

    offset: int
    shape: tuple[int, ...]

    def of(self, ints: torch.Tensor) -> torch.Tensor:
        """The tensor, int32, sharing memory with the array."""
        return ints[self.offset : self.offset + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Sequences whose attention is computed together.

    Attributes:
        rows: of the step: a range, or where their indices are.
        tables: block tables [S, B], all as wide as the longest.
        lengths: positions [S] that are in the cache once the step's are.
        first_rows: [S + 1]: the first row of each sequence within the group, and their number.
        most_rows: of one sequence.
        even: all sequences have that many.
    """

    rows: slice | Span
    tables: Span
    lengths: Span
    first_rows: Span
    most_rows: int
    even: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A packed step.

    Attributes:
        ints: everything, for `StepBuffer`.
        rows: T, padding included.
        token_ids: [T], for the first stage.
        positions: [T].
        turns: [T], rows of the rotation tables; `positions` itself in a model without long rows.
        places: [T], where keys and values go: block * block size + offset.
        sampled: rows that are sampled [S]; None where that is all of them, in order.
        groups: every row is in one of them.
    """

    ints: array[int]
    rows: int
    token_ids: Span | None
    positions: Span
    turns: Span
    places: Span
    sampled: Span | None
    groups: tuple[GroupPlan, ...]


@dataclass(slots=True)
class Group:
    """A `GroupPlan` on the device.

    Attributes:
        rows: a range, or indices.
        positions_ST: of the rows; None where sequences differ in their number of rows.
        biases: of `attention.Gathered`, by window: the same for all layers.
    """

    rows: slice | torch.Tensor
    tables_SB: torch.Tensor
    lengths_S: torch.Tensor
    first_rows: torch.Tensor
    most_rows: int
    positions_ST: torch.Tensor | None
    biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def on_device(plan: GroupPlan, ints: torch.Tensor, positions_T: torch.Tensor) -> Group:
        """The group of a plan, of whose step `ints` is the array and `positions_T` a tensor."""
        rows = plan.rows if isinstance(plan.rows, slice) else plan.rows.of(ints)
        tables_SB = plan.tables.of(ints)
        positions_ST = positions_T[rows].view(len(tables_SB), -1) if plan.even else None
        return Group(
            rows,
            tables_SB,
            plan.lengths.of(ints),
            plan.first_rows.of(ints),
            plan.most_rows,
            positions_ST,
        )


class _Ints:
    """The array while it is being packed."""

    def __init__(self) -> None:
        self.array = array("i")

    def add(self, values: Iterable[int], *shape: int) -> Span:
        span = Span(len(self.array), shape)
        self.array.extend(values)
        return span

    def turns(self, positions: Span, sequences: Sequence[SequenceStep], long_offset: int) -> Span:
        """Rows of the rotation tables for `positions`: the sequences', then padding; added last."""
        if not long_offset:
            return positions
        span = Span(len(self.array), positions.shape)
        self.array += self.array[positions.offset :]
        at = span.offset
        for sequence in sequences:
            if sequence.long:
                for place in range(at, at + sequence.count):
                    self.array[place] += long_offset
            at += sequence.count
        return span

    def group(
        self,
        rows: slice | Span,
        sequences: Sequence[SequenceStep],
        *,
        width: int,
        block_size: int,
        spare: int,
        padding: int = 0,
    ) -> GroupPlan:
        """A group of these sequences and so many rows of padding, which see the spare block."""
        count = len(sequences) + padding
        tables = Span(len(self.array), (count, width))
        for sequence in sequences:
            seen = sequence.blocks[: _blocks(sequence, block_size)]
            self.array.extend(seen)
            self.array.extend([spare] * (width - len(seen)))
        self.array.extend([spare] * (width * padding))
        lengths = [sequence.start + sequence.count for sequence in sequences] + [1] * padding
        counts = [sequence.count for sequence in sequences] + [1] * padding
        first_rows = [0]
        for rows_of_one in counts:
            first_rows.append(first_rows[-1] + rows_of_one)
        return GroupPlan(
            rows=rows,
            tables=tables,
            lengths=self.add(lengths, count),
            first_rows=self.add(first_rows, count + 1),
            most_rows=max(counts),
            even=min(counts) == max(counts),
        )


def plan_decodes(
    header: StepHeader,
    token_ids: Sequence[int] | None,
    *,
    batch: int,
    width: int,
    block_size: int,
    spare: int,
    long_offset: int = 0,
) -> StepPlan:
    """Packs a step of single rows; for one batch and width, everything is always in the same place.

    Rows beyond the step's are padding: token 0 at position 0, in a block that no sequence has.

    Args:
        header: of the step; all counts are 1.
        token_ids: for the first stage.
        batch: rows, at least the step's.
        width: of the block tables, at least what the longest sequence needs.
        block_size: P.
        spare: that block.
        long_offset: see `Rotations`.
    """
    sequences = header.sequences
    padding = batch - len(sequences)
    packed = _Ints()
    ids = None
    if token_ids is not None:
        ids = packed.add([*token_ids, *[0] * padding], batch)
    positions = [sequence.start for sequence in sequences]
    places = [_place(sequence, sequence.start, block_size) for sequence in sequences]
    positions_span = packed.add(positions + [0] * padding, batch)
    turns = packed.turns(positions_span, sequences, long_offset)
    places_span = packed.add(places + [spare * block_size] * padding, batch)
    group = packed.group(
        slice(0, batch),
        sequences,
        width=width,
        block_size=block_size,
        spare=spare,
        padding=padding,
    )
    # Last, because their number varies.
    sampled = _sampled(packed, header)
    return StepPlan(packed.array, batch, ids, positions_span, turns, places_span, sampled, (group,))


def plan_rows(
    header: StepHeader,
    token_ids: Sequence[int] | None,
    *,
    block_size: int,
    spare: int,
    together: bool,
    long_offset: int = 0,
) -> StepPlan:
    """Packs any step.

    Args:
        header: of the step.
        token_ids: for the first stage.
        block_size: P.
        spare: a block to fill up block tables with.
        together: all sequences in one group; otherwise the single rows are one, and every
            prompt's chunk is a group of its own.
        long_offset: see `Rotations`.
    """
    packed = _Ints()
    sequences = header.sequences
    rows = header.tokens
    ids = None if token_ids is None else packed.add(token_ids, rows)
    seen = [
        (position, _place(sequence, position, block_size))
        for sequence in sequences
        for position in range(sequence.start, sequence.start + sequence.count)
    ]
    positions = packed.add((position for position, _ in seen), rows)
    turns = packed.turns(positions, sequences, long_offset)
    places = packed.add((place for _, place in seen), rows)
    groups: list[GroupPlan] = []

    def add_group(rows_of_group: slice | Span, members: Sequence[SequenceStep]) -> None:
        width = max(_blocks(sequence, block_size) for sequence in members)
        groups.append(
            packed.group(rows_of_group, members, width=width, block_size=block_size, spare=spare)
        )

    if together:
        add_group(slice(0, rows), sequences)
    else:
        singles: list[tuple[int, SequenceStep]] = []
        row = 0
        for sequence in sequences:
            if sequence.count == 1:
                singles.append((row, sequence))
            else:
                add_group(slice(row, row + sequence.count), (sequence,))
            row += sequence.count
        if singles:
            indices = packed.add((row for row, _ in singles), len(singles))
            add_group(indices, [sequence for _, sequence in singles])
    sampled = _sampled(packed, header)
    return StepPlan(packed.array, rows, ids, positions, turns, places, sampled, tuple(groups))


def _sampled(packed: _Ints, header: StepHeader) -> Span | None:
    rows: list[int] = []
    row = -1
    for sequence in header.sequences:
        row += sequence.count
        if sequence.sampled:
            rows.append(row)
    return None if len(rows) == row + 1 else packed.add(rows, len(rows))


def _blocks(sequence: SequenceStep, block_size: int) -> int:
    """Blocks that a sequence's positions are in."""
    return (sequence.start + sequence.count - 1) // block_size + 1


def _place(sequence: SequenceStep, position: int, block_size: int) -> int:
    return sequence.blocks[position // block_size] * block_size + position % block_size


class StepBuffer:
    """Takes packed steps to the device, each in one copy, always to the same memory.

    Args:
        capacity: bytes.
        hidden_size: D.
        dtype: of the hidden states.
        device: that computes. For a GPU the host's side is pinned: the copy needs no wait.
    """

    def __init__(
        self, capacity: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self._hidden_size = hidden_size
        self._dtype = dtype
        on_gpu = device.type == "cuda"
        self._host = torch.empty(capacity, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None

    @staticmethod
    def bytes_for(ints: int, rows: int, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes of a step with so many integers and rows of hidden states."""
        return _aligned(rows * hidden_size * dtype.itemsize) + ints * _INT_BYTES

    def load(
        self, plan: StepPlan, hidden_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Copies a step; returns its integers and its hidden states [T, D] on the device.

        Rows of padding are zeros. The tensors hold the step until the next one is loaded.

        Args:
            plan: of the step.
            hidden_TD: what the stage before sent, without padding; None for the first stage.
        """
        if self._copied is not None:
            # The step before may still be on its way out of the host's memory.
            self._copied.synchronize()
        first = 0
        if hidden_TD is not None:
            first = _aligned(plan.rows * self._hidden_size * self._dtype.itemsize)
            rows_TD = self._rows(self._host, plan.rows)
            rows_TD[: len(hidden_TD)].copy_(hidden_TD)
            rows_TD[len(hidden_TD) :].zero_()
        end = first + len(plan.ints) * _INT_BYTES
        self._host[first:end].view(torch.int32).copy_(
            torch.frombuffer(plan.ints, dtype=torch.int32)
        )
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        ints = self._device[first:end].view(torch.int32)
        return ints, None if hidden_TD is None else self._rows(self._device, plan.rows)

    def _rows(self, data: torch.Tensor, rows: int) -> torch.Tensor:
        size = rows * self._hidden_size * self._dtype.itemsize
        return data[:size].view(self._dtype).view(rows, self._hidden_size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
