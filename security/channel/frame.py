"""What stages say to each other in a step: versioned, bounded, little-endian binary frames.

A *step frame* is a header (which sequences, which positions, which cache blocks) followed by the
raw hidden states, row-major `[tokens, hidden_size]`. A *result frame* carries the sampled token ids
back to the head. A *capacity frame* goes around the ring once, before the first step. How tokens
are drawn is not in the header, which every stage reads: see `security.channel.admission`. No frame
is trusted: a decoder checks every field against the limits of the signed plan before anything is
allocated or indexed, and raises a `FrameError`.

Step frame:

    u16 magic | u8 version | u8 dtype | u32 hidden_size | u64 step | u32 sequences | u32 blocks
    sequences x (u32 slot | u32 start | u32 count | u32 blocks | u32 flags)
    blocks    x u32 block id
    zero bytes up to a multiple of 64
    tokens x hidden_size x itemsize bytes, native dtype

    flags: 1 the sequence is sampled, 2 it is admitted to its slot by this step, 4 its rows are long

Result frame:

    u16 magic | u8 version | u8 zero | u32 tokens | u64 step
    tokens x (u32 token id | u32 logprobs: 0 for none, otherwise 1 + alternatives)
    for each token with logprobs:
        f64 its logprob | alternatives x (u32 token id | f64 logprob), likeliest first

Capacity frame:

    u16 magic | u8 version | u8 zero | u32 cache blocks
"""

import math
import struct
from dataclasses import dataclass, field
from typing import ClassVar, Final, TypeAlias

from security.errors import SecurityError

__all__ = [
    "CAPACITY_BYTES",
    "ITEM_BYTES",
    "MAX_ALTERNATIVES",
    "BytesLike",
    "FrameError",
    "FrameLimits",
    "FrameMalformed",
    "FrameOutOfBounds",
    "FrameUnsupported",
    "SequenceStep",
    "StepHeader",
    "StepResult",
    "TokenLogprobs",
    "decode_capacity",
    "decode_result",
    "decode_step",
    "encode_capacity",
    "encode_result",
    "encode_step",
]

BytesLike: TypeAlias = bytes | bytearray | memoryview

VERSION: Final = 2
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_ALTERNATIVES: Final = 20
"""Most alternatives to a token whose logprobs a result tells, as in OpenAI's `top_logprobs`."""

_STEP_MAGIC: Final = 0x5342
_RESULT_MAGIC: Final = 0x5242
_DTYPE_CODES: Final = {"float32": 1, "bfloat16": 2, "float16": 3}
_DTYPE_NAMES: Final = {code: name for name, code in _DTYPE_CODES.items()}
_CAPACITY_MAGIC: Final = 0x4342
_STEP: Final = struct.Struct("<HBBIQII")
_SEQUENCE: Final = struct.Struct("<IIIII")
_SAMPLED: Final = 1
_ADMITTED: Final = 2
_LONG: Final = 4
_RESULT: Final = struct.Struct("<HBBIQ")
_TOKEN: Final = struct.Struct("<II")
_LOGPROB: Final = struct.Struct("<d")
_ALTERNATIVE: Final = struct.Struct("<Id")
_CAPACITY: Final = struct.Struct("<HBBI")
_ID_BYTES: Final = 4
# Rows start where vector loads of any width are aligned.
_ALIGNMENT: Final = 64

CAPACITY_BYTES: Final = _CAPACITY.size
"""Length of a capacity frame: the bound for `Link.receive`."""


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
class SequenceStep:
    """The part of one sequence in a step: positions `[start, start + count)`.

    `slot` names the sequence in every stage. `blocks` is its whole block table, in order of
    position, covering at least `start + count` positions. `sampled` is False while more of the
    prompt is still to come; otherwise a token is drawn from the last row, for position
    `start + count`. `admitted` marks the first step of a sequence in its slot: whatever the last
    stage knew of that slot is replaced by the `Admission` that comes with the step. `long` rows are
    rotated with the long factors of a longrope model; whether a model has any, its stages know.

    A block may be in the tables of several sequences where each of them only reads it: where it
    ends at or before the `start` of each. Every other block is in one table of the step.
    """

    slot: int
    start: int
    count: int
    blocks: tuple[int, ...]
    sampled: bool
    admitted: bool = False
    long: bool = False


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
        return sum(sequence.sampled for sequence in self.sequences)

    @property
    def admitted(self) -> tuple[int, ...]:
        """Slots of the sequences that the step admits, in the order of the header."""
        return tuple(sequence.slot for sequence in self.sequences if sequence.admitted)


@dataclass(frozen=True, slots=True, repr=False)
class TokenLogprobs:
    """What the model thought of a token: natural logarithms of its raw distribution.

    Raw means before temperature, penalties, bias and limits. `chosen` is of the token that was
    drawn; `alternatives` are the likeliest (token id, logprob), in order, whether drawn or not.
    """

    chosen: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The token ids drawn in a step: one per sampled sequence, in the order of the header.

    `logprobs` has an entry per token, None where its sequence did not ask; it is empty where no
    sequence of the step asked.
    """

    step: int
    tokens: tuple[int, ...] = field(repr=False)
    logprobs: tuple[TokenLogprobs | None, ...] = field(default=(), repr=False)


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
        header = _STEP.size + self.max_sequences * (_SEQUENCE.size + table)
        return _aligned(header) + self.max_tokens * self.hidden_size * ITEM_BYTES[self.dtype]

    @property
    def max_result_bytes(self) -> int:
        """The longest result frame that these limits allow: the bound for `Link.receive`."""
        token = _TOKEN.size + _LOGPROB.size + MAX_ALTERNATIVES * _ALTERNATIVE.size
        return _RESULT.size + self.max_sequences * token


def encode_step(header: StepHeader, dtype: str, hidden_size: int) -> bytes:
    """The bytes before the hidden states; send them and the raw rows as parts of one message.

    Raises FrameOutOfBounds where a field does not fit its width; the plan's limits are the
    receiver's to check.
    """
    if dtype not in _DTYPE_CODES:
        raise FrameUnsupported(f"dtype: expected one of {sorted(_DTYPE_CODES)}, found {dtype!r}")
    sequences = header.sequences
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
                    len(blocks),
                ),
                *(
                    _SEQUENCE.pack(
                        sequence.slot,
                        sequence.start,
                        sequence.count,
                        len(sequence.blocks),
                        _SAMPLED * sequence.sampled
                        | _ADMITTED * sequence.admitted
                        | _LONG * sequence.long,
                    )
                    for sequence in sequences
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
    view = bytes_of(message)
    if len(view) < _STEP.size:
        raise FrameMalformed(f"step frame: expected at least {_STEP.size} bytes, found {len(view)}")
    magic, version, dtype_code, hidden_size, step, sequence_count, block_count = _STEP.unpack_from(
        view
    )
    check_start("step", magic, _STEP_MAGIC, version)
    dtype = _DTYPE_NAMES.get(dtype_code)
    if dtype != limits.dtype:
        raise FrameUnsupported(
            f"step {step}: expected dtype {limits.dtype}, found {dtype or dtype_code}"
        )
    within("hidden_size", hidden_size, limits.hidden_size, limits.hidden_size)
    within("sequences", sequence_count, 1, limits.max_sequences)
    within("blocks", block_count, 1, sequence_count * limits.max_table_blocks)

    blocks_at = _STEP.size + sequence_count * _SEQUENCE.size
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

    sequences: list[SequenceStep] = []
    slots: set[int] = set()
    used_blocks = 0
    for slot, start, count, table_length, flags in _SEQUENCE.iter_unpack(
        view[_STEP.size : blocks_at]
    ):
        within("slot", slot, 0, limits.max_sequences - 1)
        if slot in slots:
            raise FrameOutOfBounds(f"step {step}: slot {slot} is named twice")
        slots.add(slot)
        within("count", count, 1, limits.max_tokens)
        within("start + count", start + count, 1, limits.max_context)
        within(
            f"blocks of slot {slot}",
            table_length,
            -(-(start + count) // limits.block_size),
            limits.max_table_blocks,
        )
        within("flags", flags, 0, _SAMPLED | _ADMITTED | _LONG)
        if used_blocks + table_length > block_count:
            raise FrameMalformed(f"step {step}: sequences claim more than the header announces")
        table = blocks[used_blocks : used_blocks + table_length]
        used_blocks += table_length
        sequences.append(
            SequenceStep(
                slot,
                start,
                count,
                table,
                sampled=bool(flags & _SAMPLED),
                admitted=bool(flags & _ADMITTED),
                long=bool(flags & _LONG),
            )
        )
    if used_blocks != block_count:
        raise FrameMalformed(f"step {step}: sequences claim less than the header announces")

    _check_sharing(step, sequences, limits.block_size)
    header = StepHeader(step, tuple(sequences))
    within("tokens", header.tokens, 1, limits.max_tokens)
    expected = header.tokens * hidden_size * ITEM_BYTES[limits.dtype]
    rows = view[rows_at:]
    if len(rows) != expected:
        raise FrameMalformed(
            f"step {step}: expected {expected} bytes of hidden states, found {len(rows)}"
        )
    return header, rows


def encode_result(result: StepResult) -> bytes:
    """A result frame. Raises FrameOutOfBounds where a field does not fit its width."""
    logprobs = result.logprobs or (None,) * len(result.tokens)
    parts = []
    try:
        parts.append(
            _RESULT.pack(_RESULT_MAGIC, VERSION, 0, len(result.tokens), result.step),
        )
        for token, logged in zip(result.tokens, logprobs, strict=True):
            parts.append(_TOKEN.pack(token, 1 + len(logged.alternatives) if logged else 0))
        for logged in logprobs:
            if logged is not None:
                parts.append(_LOGPROB.pack(logged.chosen))
                parts += [_ALTERNATIVE.pack(*alternative) for alternative in logged.alternatives]
    except struct.error as error:
        raise FrameOutOfBounds(f"result {result.step}: a field does not fit: {error}") from None
    return b"".join(parts)


def decode_result(message: BytesLike, limits: FrameLimits) -> StepResult:
    """Parse and check a result frame.

    Whether the step number, the number of tokens and their logprobs answer a step that was sent is
    for the caller to compare with what it sent. Raises a FrameError.
    """
    view = bytes_of(message)
    if len(view) < _RESULT.size:
        raise FrameMalformed(
            f"result frame: expected at least {_RESULT.size} bytes, found {len(view)}"
        )
    magic, version, zero, count, step = _RESULT.unpack_from(view)
    check_start("result", magic, _RESULT_MAGIC, version)
    if zero:
        raise FrameMalformed("result frame: a reserved byte is not zero")
    within("tokens", count, 0, limits.max_sequences)
    logprobs_at = _RESULT.size + count * _TOKEN.size
    if len(view) < logprobs_at:
        raise FrameMalformed(
            f"result {step}: expected at least {logprobs_at} bytes, found {len(view)}"
        )
    pairs = list(_TOKEN.iter_unpack(view[_RESULT.size : logprobs_at]))
    expected = logprobs_at
    for token, logged in pairs:
        within("token id", token, 0, limits.vocabulary - 1)
        within("logprobs", logged, 0, 1 + MAX_ALTERNATIVES)
        if logged:
            expected += _LOGPROB.size + (logged - 1) * _ALTERNATIVE.size
    if len(view) != expected:
        raise FrameMalformed(f"result {step}: expected {expected} bytes, found {len(view)}")
    tokens = tuple(token for token, _ in pairs)
    if not any(logged for _, logged in pairs):
        return StepResult(step, tokens)
    logprobs: list[TokenLogprobs | None] = []
    at = logprobs_at
    for _, logged in pairs:
        end = at + _LOGPROB.size + (logged - 1) * _ALTERNATIVE.size if logged else at
        logprobs.append(_checked_logprobs(view[at:end], limits) if logged else None)
        at = end
    return StepResult(step, tokens, tuple(logprobs))


def encode_capacity(cache_blocks: int) -> bytes:
    """A capacity frame: the cache blocks that every stage up to here has."""
    return _CAPACITY.pack(_CAPACITY_MAGIC, VERSION, 0, cache_blocks)


def decode_capacity(message: BytesLike, limits: FrameLimits) -> int:
    """The cache blocks of a capacity frame, at most the plan's. Raises a FrameError."""
    view = bytes_of(message)
    if len(view) != _CAPACITY.size:
        raise FrameMalformed(
            f"capacity frame: expected {_CAPACITY.size} bytes, found {len(view)}; it comes once, "
            "before the first step"
        )
    magic, version, zero, cache_blocks = _CAPACITY.unpack(view)
    check_start("capacity", magic, _CAPACITY_MAGIC, version)
    if zero:
        raise FrameMalformed("capacity frame: a reserved byte is not zero")
    within("cache blocks", cache_blocks, 1, limits.cache_blocks)
    return int(cache_blocks)


def bytes_of(message: BytesLike) -> memoryview:
    """The message as a flat view of bytes."""
    view = memoryview(message)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def within(name: str, value: int, least: int, most: int) -> None:
    """Raises FrameOutOfBounds where a field is outside its bounds."""
    if not least <= value <= most:
        raise FrameOutOfBounds(f"{name}: expected {least} to {most}, found {value}")


def check_start(kind: str, magic: int, expected: int, version: int) -> None:
    """Raises FrameMalformed for another frame, FrameUnsupported for another version."""
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


def _checked_logprobs(view: memoryview, limits: FrameLimits) -> TokenLogprobs:
    (chosen,) = _LOGPROB.unpack_from(view)
    alternatives = tuple(_ALTERNATIVE.iter_unpack(view[_LOGPROB.size :]))
    for token, _ in alternatives:
        within("alternative", token, 0, limits.vocabulary - 1)
    if len({token for token, _ in alternatives}) != len(alternatives):
        raise FrameOutOfBounds("alternatives: a token is named twice")
    values = [chosen, *(logprob for _, logprob in alternatives)]
    if not all(math.isfinite(value) and value <= 0 for value in values):
        raise FrameOutOfBounds("logprobs: expected finite numbers of at most 0, found another")
    if sorted(values[1:], reverse=True) != values[1:]:
        raise FrameOutOfBounds("alternatives: expected the likeliest first")
    return TokenLogprobs(chosen, alternatives)
