"""Frames survive a round trip, and nothing else survives the decoder."""

import contextlib
import dataclasses
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security.channel.frame import (
    CAPACITY_BYTES,
    FrameError,
    FrameLimits,
    FrameMalformed,
    FrameOutOfBounds,
    FrameUnsupported,
    SequenceStep,
    StepHeader,
    StepResult,
    TokenLogprobs,
    decode_capacity,
    decode_result,
    decode_step,
    encode_capacity,
    encode_result,
    encode_step,
)

LIMITS = FrameLimits(
    max_sequences=4,
    max_tokens=40,
    max_context=64,
    block_size=16,
    cache_blocks=12,
    hidden_size=3,
    dtype="bfloat16",
    vocabulary=100,
)
HEADER = StepHeader(
    7,
    (
        SequenceStep(slot=2, start=15, count=3, blocks=(5, 0), sampled=False, admitted=True),
        SequenceStep(slot=0, start=32, count=1, blocks=(1, 11, 3), sampled=True, long=True),
    ),
)


def _sharing(*others: SequenceStep) -> StepHeader:
    """Slot 1 writes block 3 and reads blocks 5 and 0; the others come before it."""
    return StepHeader(7, (*others, SequenceStep(1, 33, 2, (5, 0, 3), True)))


def _message(header: StepHeader, limits: FrameLimits = LIMITS) -> bytes:
    rows = bytes(range(256)) * 10
    return (
        encode_step(header, limits.dtype, limits.hidden_size)
        + rows[: header.tokens * limits.hidden_size * 2]
    )


@st.composite
def headers(draw: st.DrawFn) -> StepHeader:
    common, *blocks = draw(st.permutations(range(LIMITS.cache_blocks)))
    slots = draw(st.permutations(range(LIMITS.max_sequences)))
    sequences = []
    for slot in slots[: draw(st.integers(1, 4))]:
        count = draw(st.integers(1, 10))
        start = draw(st.integers(0, 32 - count))
        shared = [common] if start >= 16 and draw(st.booleans()) else []
        own = -(-(start + count) // 16) - len(shared)
        table, blocks = shared + blocks[:own], blocks[own:]
        flags = [draw(st.booleans()) for _ in range(3)]
        sequences.append(SequenceStep(slot, start, count, tuple(table), *flags))
    return StepHeader(draw(st.integers(0, 2**64 - 1)), tuple(sequences))


@given(headers())
def test_steps_round_trip(header: StepHeader) -> None:
    message = _message(header)
    decoded, rows = decode_step(message, LIMITS)
    assert decoded == header
    assert rows == message[len(message) - len(rows) :]
    assert len(rows) == header.tokens * 6
    assert len(message) <= LIMITS.max_step_bytes


@pytest.mark.parametrize(
    "header",
    [
        _sharing(SequenceStep(0, 32, 1, (5, 0, 7), False)),
        _sharing(SequenceStep(0, 16, 20, (5, 1, 2), True)),
        _sharing(SequenceStep(0, 40, 1, (0, 5, 1), False), SequenceStep(2, 16, 1, (5, 2), False)),
    ],
)
def test_full_blocks_may_be_read_by_several_sequences(header: StepHeader) -> None:
    assert decode_step(_message(header), LIMITS)[0] == header


def test_shared_tables_longer_than_the_cache_fit_the_longest_frame() -> None:
    tables = [SequenceStep(slot, 48, 10, (0, 1, 2, 3 + slot), True) for slot in range(4)]
    header = StepHeader(2**64 - 1, tuple(tables))
    assert sum(len(table.blocks) for table in tables) > LIMITS.cache_blocks
    message = _message(header)
    assert decode_step(message, LIMITS)[0] == header
    assert len(message) <= LIMITS.max_step_bytes


def test_checking_a_usual_step_takes_well_under_a_millisecond() -> None:
    limits = dataclasses.replace(
        LIMITS, max_sequences=32, max_context=1024, cache_blocks=2048, hidden_size=1
    )
    prefix = tuple(range(32))
    header = StepHeader(
        1,
        tuple(
            SequenceStep(slot, 1023, 1, prefix + tuple(range(at, at + 32)), True)
            for slot, at in enumerate(range(32, 32 + 32 * 32, 32))
        ),
    )
    message = _message(header, limits)
    durations = []
    for _ in range(20):
        began = time.perf_counter()
        decode_step(message, limits)
        durations.append(time.perf_counter() - began)
    assert min(durations) < 0.001


def test_rows_are_a_writable_aligned_view() -> None:
    message = bytearray(_message(HEADER))
    _, rows = decode_step(memoryview(message), LIMITS)
    rows[0] ^= 0xFF
    assert message[len(message) - len(rows)] == rows[0]
    assert (len(message) - len(rows)) % 64 == 0


def test_a_header_counts_what_it_samples_and_admits() -> None:
    assert (HEADER.tokens, HEADER.sampled, HEADER.admitted) == (4, 1, (2,))


@st.composite
def results(draw: st.DrawFn) -> StepResult:
    tokens = draw(st.lists(st.integers(0, 99), max_size=4))
    logprobs: list[TokenLogprobs | None] = []
    for _ in tokens:
        ids = draw(st.lists(st.integers(0, 99), max_size=20, unique=True))
        values = draw(st.lists(st.floats(-1e9, 0), min_size=len(ids), max_size=len(ids)))
        ranked = tuple(zip(ids, sorted(values, reverse=True), strict=True))
        logprobs.append(draw(st.none() | st.just(TokenLogprobs(draw(st.floats(-99, 0)), ranked))))
    asked = any(entry is not None for entry in logprobs)
    return StepResult(
        draw(st.integers(0, 2**64 - 1)), tuple(tokens), tuple(logprobs) if asked else ()
    )


@given(results())
def test_results_round_trip(result: StepResult) -> None:
    assert decode_result(encode_result(result), LIMITS) == result
    assert len(encode_result(result)) <= LIMITS.max_result_bytes


def _sequence(**changes: object) -> StepHeader:
    return StepHeader(7, (dataclasses.replace(HEADER.sequences[1], **changes),))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (StepHeader(7, ()), "sequences"),
        (StepHeader(7, HEADER.sequences + HEADER.sequences), "twice"),
        (StepHeader(7, (HEADER.sequences[0],) * 5), "sequences"),
        (
            StepHeader(7, (HEADER.sequences[0], dataclasses.replace(HEADER.sequences[1], slot=2))),
            "slot 2 is named twice",
        ),
        (_sequence(slot=4), "slot"),
        (_sequence(count=0), "count"),
        (_sequence(count=41, start=0), "count"),
        (_sequence(start=64, blocks=(0, 1, 2, 3)), "start"),
        (_sequence(start=2**32 - 1, count=1), "start"),
        (_sequence(blocks=(1, 2)), "blocks of slot 0"),
        (_sequence(blocks=(0, 1, 2, 3, 4)), "blocks"),
        (
            StepHeader(
                7,
                (
                    SequenceStep(1, 0, 1, (5,), False),
                    dataclasses.replace(HEADER.sequences[1], blocks=(0, 1, 2, 3, 4)),
                ),
            ),
            "blocks of slot 0",
        ),
        (_sequence(blocks=()), "blocks"),
        (_sequence(blocks=(1, 2, 12)), "block ids below 12"),
        (_sequence(blocks=(1, 2, 1)), "named twice for slot 0"),
        (_sequence(blocks=(1, 1, 2)), "named twice for slot 0"),
        # Slot 1 reads blocks 5 and 0; each of the others may write one of them.
        (_sharing(SequenceStep(0, 15, 1, (5,), False)), "may write is named twice"),
        (_sharing(SequenceStep(0, 16, 1, (1, 5), False)), "may write is named twice"),
        (_sharing(SequenceStep(0, 31, 2, (5, 0, 1), False)), "may write is named twice"),
        # A table longer than its positions: what is not full is the sequence's own.
        (_sharing(SequenceStep(0, 16, 1, (5, 1, 0), False)), "may write is named twice"),
        # Two writers.
        (_sharing(SequenceStep(0, 32, 1, (5, 0, 3), False)), "may write is named twice"),
        (
            StepHeader(
                7,
                tuple(SequenceStep(slot, 0, 15, (slot,), sampled=False) for slot in range(3)),
            ),
            "tokens",
        ),
    ],
)
def test_out_of_bounds(header: StepHeader, reason: str) -> None:
    with pytest.raises(FrameOutOfBounds, match=reason):
        decode_step(_message(header), LIMITS)


@pytest.mark.parametrize(
    "changes", [{"slot": -1}, {"start": 2**32}, {"blocks": (-1,)}, {"blocks": (2**32,)}]
)
def test_what_does_not_fit_is_not_encoded(changes: dict[str, object]) -> None:
    with pytest.raises(FrameOutOfBounds):
        encode_step(_sequence(**changes), "bfloat16", 3)
    with pytest.raises(FrameOutOfBounds):
        encode_result(StepResult(0, (-1,)))


def test_length_must_match_exactly() -> None:
    message = _message(HEADER)
    for wrong in (message[:-1], message + b"\0"):
        with pytest.raises(FrameMalformed, match="hidden states"):
            decode_step(wrong, LIMITS)
    result = encode_result(StepResult(1, (1, 2)))
    for wrong in (result[:-1], result + b"\0"):
        with pytest.raises(FrameMalformed):
            decode_result(wrong, LIMITS)


def test_every_truncation_is_refused() -> None:
    message, result = _message(HEADER), encode_result(StepResult(1, (1, 2)))
    for length in range(len(message)):
        with pytest.raises(FrameError):
            decode_step(message[:length], LIMITS)
    for length in range(len(result)):
        with pytest.raises(FrameError):
            decode_result(result[:length], LIMITS)


def test_other_version_dtype_size_and_kind_are_refused() -> None:
    message = bytearray(_message(HEADER))
    message[2] = 1
    with pytest.raises(FrameUnsupported, match="version 2, found 1"):
        decode_step(message, LIMITS)
    with pytest.raises(FrameUnsupported, match="dtype float16, found bfloat16"):
        decode_step(_message(HEADER), dataclasses.replace(LIMITS, dtype="float16"))
    with pytest.raises(FrameOutOfBounds, match="hidden_size"):
        decode_step(_message(HEADER), dataclasses.replace(LIMITS, hidden_size=4))
    with pytest.raises(FrameMalformed, match="magic"):
        decode_result(_message(HEADER), LIMITS)
    with pytest.raises(FrameMalformed):
        decode_step(encode_result(StepResult(1, (1,))) + bytes(64), LIMITS)
    with pytest.raises(FrameUnsupported):
        encode_step(HEADER, "int8", 3)
    with pytest.raises(ValueError, match="int8"):
        dataclasses.replace(LIMITS, dtype="int8")


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(FrameOutOfBounds, match="token id"):
        decode_result(encode_result(StepResult(1, (100,))), LIMITS)
    with pytest.raises(FrameOutOfBounds, match="tokens"):
        decode_result(encode_result(StepResult(1, (1,) * 5)), LIMITS)


def test_counts_that_contradict_each_other_are_refused() -> None:
    message = bytearray(_message(HEADER))
    # The first sequence's table length, more and less, and a flag that is none.
    for offset, value in ((24 + 12, 3), (24 + 12, 1), (24 + 16, 8)):
        changed = bytearray(message)
        struct.pack_into("<I", changed, offset, value)
        with pytest.raises(FrameError):
            decode_step(changed, LIMITS)


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_only_raise_frame_errors(noise: bytes) -> None:
    for start in (b"", _message(HEADER)[:4], _message(HEADER)[:24]):
        with pytest.raises(FrameError):
            decode_step(start + noise, LIMITS)
    with contextlib.suppress(FrameError):
        decode_result(encode_result(StepResult(1, ()))[:4] + noise, LIMITS)


@settings(max_examples=500)
@given(headers(), st.data())
def test_mutations_are_refused_or_stay_within_limits(
    header: StepHeader, data: st.DataObject
) -> None:
    message = bytearray(_message(header))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(message) - 1, 200)))
        message[at] = data.draw(st.integers(0, 255))
    try:
        decoded, rows = decode_step(message, LIMITS)
    except FrameError:
        return
    assert 0 < decoded.tokens <= LIMITS.max_tokens
    assert len(rows) == decoded.tokens * 6
    blocks = [block for sequence in decoded.sequences for block in sequence.blocks]
    assert all(block < LIMITS.cache_blocks for block in blocks)
    for sequence in decoded.sequences:
        for place, block in enumerate(sequence.blocks):
            if (place + 1) * LIMITS.block_size > sequence.start:
                assert blocks.count(block) == 1, "a block that may be written has one owner"
        assert len(set(sequence.blocks)) == len(sequence.blocks)
        assert sequence.slot < LIMITS.max_sequences
        assert sequence.start + sequence.count <= min(64, 16 * len(sequence.blocks))


LOGGED = StepResult(1, (5, 6), (None, TokenLogprobs(-1.0, ((6, -0.5), (7, -0.5), (2, -3.0)))))


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (16 + 12, 22, "logprobs: expected 0 to 21"),
        (16 + 8, 100, "token id"),
        (32, float("nan"), "at most 0"),
        (32, 0.1, "at most 0"),
        (32, float("-inf"), "at most 0"),
        (40, 100, "alternative"),
        (40, 7, "named twice"),
        (44, -0.6, "likeliest first"),
        (44, float("nan"), "at most 0"),
    ],
)
def test_logprobs_that_cannot_be_are_refused(offset: int, value: float, reason: str) -> None:
    message = bytearray(encode_result(LOGGED))
    assert decode_result(message, LIMITS) == LOGGED
    struct.pack_into("<d" if isinstance(value, float) else "<I", message, offset, value)
    with pytest.raises(FrameOutOfBounds, match=reason):
        decode_result(message, LIMITS)


def test_results_that_announce_other_logprobs_than_they_hold_are_refused() -> None:
    whole = encode_result(LOGGED)
    for announced in (0, 1, 3, 5):
        message = bytearray(whole)
        struct.pack_into("<I", message, 16 + 12, announced)
        with pytest.raises(FrameMalformed):
            decode_result(message, LIMITS)
    for length in range(len(whole)):
        with pytest.raises(FrameError):
            decode_result(whole[:length], LIMITS)


def test_capacity_frames() -> None:
    for blocks in (1, 12):
        message = encode_capacity(blocks)
        assert len(message) == CAPACITY_BYTES
        assert decode_capacity(message, LIMITS) == blocks
    for blocks in (0, 13):
        with pytest.raises(FrameOutOfBounds, match="cache blocks: expected 1 to 12"):
            decode_capacity(encode_capacity(blocks), LIMITS)
    message = bytearray(encode_capacity(3))
    for wrong in (message[:-1], message + b"\0", b""):
        with pytest.raises(FrameMalformed, match="once, before the first step"):
            decode_capacity(wrong, LIMITS)
    for at, error in ((0, FrameMalformed), (2, FrameUnsupported), (3, FrameMalformed)):
        changed = bytearray(message)
        changed[at] ^= 1
        with pytest.raises(error):
            decode_capacity(changed, LIMITS)


def test_a_capacity_frame_in_another_place_is_refused() -> None:
    with pytest.raises(FrameMalformed):
        decode_step(encode_capacity(3), LIMITS)
    with pytest.raises(FrameMalformed):
        decode_result(encode_capacity(3), LIMITS)
    with pytest.raises(FrameMalformed, match="before the first step"):
        decode_capacity(_message(HEADER), LIMITS)
