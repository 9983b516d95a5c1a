"""What stages say to each other in a step: versioned, bounded, little-endian binary frames.

A *step frame* is a header (which sequences, which positions, which cache blocks, how to sample)
followed by the raw hidden states, row-major `[tokens, hidden_size]`. A *result frame* carries the
sampled token ids back to the head. Neither is trusted: a decoder checks every field against the
limits of the signed plan before anything is allocated or indexed, and raises a `FrameError`.

Step frame:

    u16 magic | u8 version | u8 dtype | u32 hidden_size | u64 step | u32 sequences
    u32 sampled | u32 blocks | u32 zero
    sequences x (u32 slot | u32 start | u32 count | u32 blocks | u32 sampled, 0 or 1)
    sampled   x (f64 temperature | f64 top_p | u32 top_k | u64 seed)
    blocks    x u32 block id
    zero bytes up to a multiple of 64
    tokens x hidden_size x itemsize bytes, native dtype

Result frame:

    u16 magic | u8 version | u8 zero | u32 tokens | u64 step
    tokens x u32 token id
"""

import math
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

from security.errors import SecurityError

__all__ = [
    "ITEM_BYTES",
    "BytesLike",
    "FrameError",
    "FrameLimits",
    "FrameMalformed",
    "FrameOutOfBounds",
    "FrameUnsupported",
    "SamplingParameters",
    "SequenceStep",
    "StepHeader",
    "StepResult",
    "decode_result",
    "decode_step",
    "encode_result",
    "encode_step",
]

BytesLike: TypeAlias = bytes | bytearray | memoryview

VERSION: Final = 1
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}

_STEP_MAGIC: Final = 0x5342
_RESULT_MAGIC: Final = 0x5242
_DTYPE_CODES: Final = {"float32": 1, "bfloat16": 2, "float16": 3}
_DTYPE_NAMES: Final = {code: name for name, code in _DTYPE_CODES.items()}
_STEP: Final = struct.Struct("<HBBIQIIII")
_SEQUENCE: Final = struct.Struct("<IIIII")
_SAMPLE: Final = struct.Struct("<ddIQ")
_RESULT: Final = struct.Struct("<HBBIQ")
_ID_BYTES: Final = 4
# Rows start where vector loads of any width are aligned.
_ALIGNMENT: Final = 64


class FrameError(SecurityError):
    """A frame that must not be acted upon."""

    code: ClassVar[str] = "frame_error"


class FrameMalformed(FrameError):
    """The bytes are not a frame: wrong magic, wrong length, bytes that must be zero are not."""

    code: ClassVar[str] = "frame_malformed"


class FrameUnsupported(FrameError):
    """A frame of a version or dtype that this stage does not speak."""

    code: ClassVar[str] = "frame_unsupported"


class FrameOutOfBounds(FrameError):
    """A field outside the limits of the plan, or in contradiction to another field."""

    code: ClassVar[str] = "frame_out_of_bounds"


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the last stage draws the next token of a sequence.

    `temperature` 0 is greedy; `top_p` is in (0, 1]; `top_k` 0 means no limit, otherwise it is at
    most the vocabulary; `seed` is an unsigned 64-bit number.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """The part of one sequence in a step: positions `[start, start + count)`.

    `slot` names the sequence in every stage. `blocks` is its whole block table, in order of
    position, covering at least `start + count` positions. `sample` is None while more of the
    prompt is still to come; otherwise the last row is sampled, as position `start + count`.

    A block may be in the tables of several sequences where each of them only reads it: where it
    ends at or before the `start` of each. Every other block is in one table of the step.
    """

    slot: int
    start: int
    count: int
    blocks: tuple[int, ...]
    sample: SamplingParameters | None


@dataclass(frozen=True, slots=True)
class StepHeader:
    """One forward pass. Rows of the hidden states follow the order of `sequences`."""

    step: int
    sequences: tuple[SequenceStep, ...]

    @property
    def tokens(self) -> int:
        """Rows of the step's hidden states."""
        return sum(sequence.count for sequence in self.sequences)

    @property
    def sampled(self) -> int:
        """Token ids that the last stage answers with."""
        return sum(sequence.sample is not None for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The token ids drawn in a step: one per sampled sequence, in the order of the header."""

    step: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a frame may ask for, from the signed plan template.

    `max_tokens` bounds the rows of a step, `max_context` the positions of a sequence,
    `cache_blocks` the block ids (0 to `cache_blocks` - 1) of `block_size` positions each.
    """

    max_sequences: int
    max_tokens: int
    max_context: int
    block_size: int
    cache_blocks: int
    hidden_size: int
    dtype: str
    vocabulary: int

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype: expected one of {sorted(ITEM_BYTES)}, found {self.dtype!r}")
        for name in (
            "max_sequences",
            "max_tokens",
            "max_context",
            "block_size",
            "cache_blocks",
            "hidden_size",
            "vocabulary",
        ):
            value = getattr(self, name)
            if not 0 < value < 2**32:
                raise ValueError(f"{name}: expected 1 to 2^32-1, found {value}")

    @property
    def max_table_blocks(self) -> int:
        """Blocks in the table of one sequence; none is in it twice."""
        return min(-(-self.max_context // self.block_size), self.cache_blocks)

    @property
    def max_step_bytes(self) -> int:
        """The longest step frame that these limits allow: the bound for `Link.receive`."""
        # Sequences may share blocks, so that tables together may be longer than the cache.
        table = self.max_table_blocks * _ID_BYTES
        header = _STEP.size + self.max_sequences * (_SEQUENCE.size + _SAMPLE.size + table)
        return _aligned(header) + self.max_tokens * self.hidden_size * ITEM_BYTES[self.dtype]

    @property
    def max_result_bytes(self) -> int:
        """The longest result frame that these limits allow: the bound for `Link.receive`."""
        return _RESULT.size + self.max_sequences * _ID_BYTES


def encode_step(header: StepHeader, dtype: str, hidden_size: int) -> bytes:
    """The bytes before the hidden states; send them and the raw rows as parts of one message.

    Raises FrameOutOfBounds where a field does not fit its width; the plan's limits are the
    receiver's to check.
    """
    if dtype not in _DTYPE_CODES:
        raise FrameUnsupported(f"dtype: expected one of {sorted(_DTYPE_CODES)}, found {dtype!r}")
    sequences = header.sequences
    samples = [sequence.sample for sequence in sequences if sequence.sample is not None]
    blocks = [block for sequence in sequences for block in sequence.blocks]
    try:
        encoded = b"".join(
            [
                _STEP.pack(
                    _STEP_MAGIC,
                    VERSION,
                    _DTYPE_CODES[dtype],
                    hidden_size,
                    header.step,
                    len(sequences),
                    len(samples),
                    len(blocks),
                    0,
                ),
                *(
                    _SEQUENCE.pack(
                        sequence.slot,
                        sequence.start,
                        sequence.count,
                        len(sequence.blocks),
                        sequence.sample is not None,
                    )
                    for sequence in sequences
                ),
                *(
                    _SAMPLE.pack(sample.temperature, sample.top_p, sample.top_k, sample.seed)
                    for sample in samples
                ),
                struct.pack(f"<{len(blocks)}I", *blocks),
            ]
        )
    except struct.error as error:
        raise FrameOutOfBounds(f"step {header.step}: a field does not fit: {error}") from None
    return encoded.ljust(_aligned(len(encoded)), b"\0")


def decode_step(message: BytesLike, limits: FrameLimits) -> tuple[StepHeader, memoryview]:
    """Parse and check a step frame.

    Returns the header and a view (no copy) of the hidden states, exactly
    `tokens * hidden_size * itemsize` bytes, row-major. Raises FrameMalformed, FrameUnsupported or
    FrameOutOfBounds; finiteness of the rows is the stage's to check.
    """
    view = _bytes_of(message)
    if len(view) < _STEP.size:
        raise FrameMalformed(f"step frame: expected at least {_STEP.size} bytes, found {len(view)}")
    (
        magic,
        version,
        dtype_code,
        hidden_size,
        step,
        sequence_count,
        sample_count,
        block_count,
        zero,
    ) = _STEP.unpack_from(view)
    _check_start("step", magic, _STEP_MAGIC, version)
    if zero:
        raise FrameMalformed("step frame: reserved bytes are not zero")
    dtype = _DTYPE_NAMES.get(dtype_code)
    if dtype != limits.dtype:
        raise FrameUnsupported(
            f"step {step}: expected dtype {limits.dtype}, found {dtype or dtype_code}"
        )
    _within("hidden_size", hidden_size, limits.hidden_size, limits.hidden_size)
    _within("sequences", sequence_count, 1, limits.max_sequences)
    _within("sampled sequences", sample_count, 0, sequence_count)
    _within("blocks", block_count, 1, sequence_count * limits.max_table_blocks)

    samples_at = _STEP.size + sequence_count * _SEQUENCE.size
    blocks_at = samples_at + sample_count * _SAMPLE.size
    padding_at = blocks_at + block_count * _ID_BYTES
    rows_at = _aligned(padding_at)
    if len(view) < rows_at:
        raise FrameMalformed(
            f"step {step}: expected a header of {rows_at} bytes, found {len(view)}"
        )
    if any(view[padding_at:rows_at]):
        raise FrameMalformed(f"step {step}: bytes after the header are not zero")

    blocks = struct.unpack_from(f"<{block_count}I", view, blocks_at)
    if max(blocks) >= limits.cache_blocks:
        raise FrameOutOfBounds(
            f"step {step}: expected block ids below {limits.cache_blocks}, found {max(blocks)}"
        )
    samples = iter(
        [
            _checked_sample(fields, limits)
            for fields in _SAMPLE.iter_unpack(view[samples_at:blocks_at])
        ]
    )

    sequences: list[SequenceStep] = []
    slots: set[int] = set()
    used_blocks = used_samples = 0
    for slot, start, count, table_length, sampled in _SEQUENCE.iter_unpack(
        view[_STEP.size : samples_at]
    ):
        _within("slot", slot, 0, limits.max_sequences - 1)
        if slot in slots:
            raise FrameOutOfBounds(f"step {step}: slot {slot} is named twice")
        slots.add(slot)
        _within("count", count, 1, limits.max_tokens)
        _within("start + count", start + count, 1, limits.max_context)
        _within(
            f"blocks of slot {slot}",
            table_length,
            -(-(start + count) // limits.block_size),
            limits.max_table_blocks,
        )
        _within("sampled flag", sampled, 0, 1)
        used_samples += sampled
        if used_blocks + table_length > block_count or used_samples > sample_count:
            raise FrameMalformed(f"step {step}: sequences claim more than the header announces")
        table = blocks[used_blocks : used_blocks + table_length]
        used_blocks += table_length
        sequences.append(
            SequenceStep(slot, start, count, table, next(samples) if sampled else None)
        )
    if used_blocks != block_count or used_samples != sample_count:
        raise FrameMalformed(f"step {step}: sequences claim less than the header announces")

    _check_sharing(step, sequences, limits.block_size)
    header = StepHeader(step, tuple(sequences))
    _within("tokens", header.tokens, 1, limits.max_tokens)
    expected = header.tokens * hidden_size * ITEM_BYTES[limits.dtype]
    rows = view[rows_at:]
    if len(rows) != expected:
        raise FrameMalformed(
            f"step {step}: expected {expected} bytes of hidden states, found {len(rows)}"
        )
    return header, rows


def encode_result(result: StepResult) -> bytes:
    """A result frame. Raises FrameOutOfBounds where a field does not fit its width."""
    try:
        return _RESULT.pack(
            _RESULT_MAGIC, VERSION, 0, len(result.tokens), result.step
        ) + struct.pack(f"<{len(result.tokens)}I", *result.tokens)
    except struct.error as error:
        raise FrameOutOfBounds(f"result {result.step}: a field does not fit: {error}") from None


def decode_result(message: BytesLike, limits: FrameLimits) -> StepResult:
    """Parse and check a result frame.

    Whether the step number and the number of tokens answer a step that was sent is for the caller
    to compare with the header it sent. Raises a FrameError.
    """
    view = _bytes_of(message)
    if len(view) < _RESULT.size:
        raise FrameMalformed(
            f"result frame: expected at least {_RESULT.size} bytes, found {len(view)}"
        )
    magic, version, zero, count, step = _RESULT.unpack_from(view)
    _check_start("result", magic, _RESULT_MAGIC, version)
    if zero:
        raise FrameMalformed("result frame: a reserved byte is not zero")
    _within("tokens", count, 0, limits.max_sequences)
    expected = _RESULT.size + count * _ID_BYTES
    if len(view) != expected:
        raise FrameMalformed(f"result {step}: expected {expected} bytes, found {len(view)}")
    tokens = struct.unpack_from(f"<{count}I", view, _RESULT.size)
    for token in tokens:
        _within("token id", token, 0, limits.vocabulary - 1)
    return StepResult(step, tokens)


def _bytes_of(message: BytesLike) -> memoryview:
    view = memoryview(message)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _within(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise FrameOutOfBounds(f"{name}: expected {least} to {most}, found {value}")


def _check_start(kind: str, magic: int, expected: int, version: int) -> None:
    if magic != expected:
        raise FrameMalformed(f"{kind} frame: expected magic {expected:#06x}, found {magic:#06x}")
    if version != VERSION:
        raise FrameUnsupported(
            f"{kind} frame: expected version {VERSION}, found {version}; run one release everywhere"
        )


def _check_sharing(step: int, sequences: list[SequenceStep], block_size: int) -> None:
    """Refuses a block that one sequence of the step may write and another one names.

    Blocks that end at or before a sequence's start are read by it, the rest of its table is its
    own. This runs for every step: sets, not loops over blocks.
    """
    read: set[int] = set()
    own: set[int] = set()
    own_count = 0
    for sequence in sequences:
        table, full = sequence.blocks, sequence.start // block_size
        if len(set(table)) != len(table):
            raise FrameOutOfBounds(
                f"step {step}: a cache block is named twice for slot {sequence.slot}"
            )
        read.update(table[:full])
        own.update(table[full:])
        own_count += len(table) - min(full, len(table))
    if len(own) != own_count or not own.isdisjoint(read):
        raise FrameOutOfBounds(
            f"step {step}: a cache block that one sequence may write is named twice; expected only "
            "blocks that every sequence naming them has filled before"
        )


def _checked_sample(
    fields: tuple[float, float, int, int], limits: FrameLimits
) -> SamplingParameters:
    temperature, top_p, top_k, seed = fields
    if not (math.isfinite(temperature) and temperature >= 0):
        raise FrameOutOfBounds(f"temperature: expected a finite number >= 0, found {temperature}")
    if not 0 < top_p <= 1:
        raise FrameOutOfBounds(f"top_p: expected a number in (0, 1], found {top_p}")
    _within("top_k", top_k, 0, limits.vocabulary)
    return SamplingParameters(temperature, top_p, top_k, seed)
