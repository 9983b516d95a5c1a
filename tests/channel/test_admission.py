"""Admissions survive a round trip, and nothing else survives the decoder."""

import contextlib
import dataclasses
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security.channel.admission import (
    MAX_BIASES,
    MAX_END_TOKENS,
    Admission,
    SamplingParameters,
    decode_admissions,
    encode_admissions,
    max_admission_bytes,
)
from security.channel.frame import (
    FrameError,
    FrameLimits,
    FrameMalformed,
    FrameOutOfBounds,
    FrameUnsupported,
    StepResult,
    decode_result,
    encode_result,
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
GREEDY = SamplingParameters(0.0, 1.0, 0, 0)
PENALISED = SamplingParameters(
    0.5,
    0.9,
    7,
    2**64 - 1,
    min_p=0.1,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    repetition_penalty=1.5,
    min_tokens=3,
    end_tokens=(4, 5),
    logit_bias=((1, -100.0), (99, 0.25)),
    logprobs=20,
)
ADMISSIONS = (
    Admission(2, PENALISED, 3, (9, 9, 8), (1,)),
    Admission(0, GREEDY, 60),
)


ids = st.integers(0, LIMITS.vocabulary - 1)


@st.composite
def admissions(draw: st.DrawFn) -> tuple[Admission, ...]:
    found = []
    for slot in draw(st.permutations(range(4)))[: draw(st.integers(1, 4))]:
        wanted = draw(
            st.builds(
                SamplingParameters,
                temperature=st.floats(0, 100),
                top_p=st.floats(0, 1, exclude_min=True),
                top_k=st.integers(0, LIMITS.vocabulary),
                seed=st.integers(0, 2**64 - 1),
                min_p=st.floats(0, 1),
                presence_penalty=st.floats(-2, 2),
                frequency_penalty=st.floats(-2, 2),
                repetition_penalty=st.just(1.0) | st.floats(0.01, 100),
                min_tokens=st.integers(0, 64),
                end_tokens=st.lists(ids, max_size=9, unique=True).map(tuple),
                logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=9).map(
                    lambda biases: tuple(biases.items())
                ),
                logprobs=st.none() | st.integers(0, 20),
            )
        )
        first = draw(st.integers(1, 40))
        exactly = {"min_size": first, "max_size": first}
        prompt = draw(st.lists(ids, **exactly)) if wanted.counts_prompt else ()
        output = draw(st.lists(ids, max_size=20)) if wanted.counts_output else ()
        found.append(Admission(slot, wanted, first, tuple(prompt), tuple(output)))
    return tuple(found)


@given(st.integers(0, 2**64 - 1), admissions())
def test_admissions_round_trip(step: int, admitted: tuple[Admission, ...]) -> None:
    message = encode_admissions(step, admitted)
    assert decode_admissions(message, LIMITS) == (step, admitted)
    assert len(message) <= max_admission_bytes(LIMITS)


def test_the_longest_frame_is_within_its_bound() -> None:
    limits = dataclasses.replace(LIMITS, vocabulary=5000)
    wanted = dataclasses.replace(
        PENALISED,
        end_tokens=tuple(range(MAX_END_TOKENS)),
        logit_bias=tuple((token, 1.0) for token in range(MAX_BIASES)),
    )
    whole = [Admission(slot, wanted, 60, (1,) * 60, (2,) * 4) for slot in range(4)]
    message = encode_admissions(1, whole)
    assert len(message) == max_admission_bytes(limits)
    decode_admissions(message, limits)


def _changed(**changes: object) -> tuple[Admission, ...]:
    return (dataclasses.replace(ADMISSIONS[0], **changes),)


def _wanted(**changes: object) -> tuple[Admission, ...]:
    return _changed(parameters=dataclasses.replace(PENALISED, **changes))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("admitted", "reason"),
    [
        ((), "admissions"),
        (ADMISSIONS * 3, "admissions"),
        (ADMISSIONS * 2, "slot is named twice"),
        (_changed(slot=4), "slot"),
        (_changed(first=0, prompt=()), "first"),
        (_changed(first=64, prompt=()), "first"),
        (_changed(prompt=(9, 9)), "prompt tokens: expected 3"),
        (_changed(prompt=(9, 9, 9, 9)), "prompt tokens: expected 3"),
        (_changed(output=(1,) * 62), "prompt and output tokens"),
        (_changed(prompt=(9, 9, 100)), "token ids below 100"),
        (_changed(output=(2**32 - 1,)), "token ids below 100"),
        ((Admission(0, GREEDY, 3, (1, 2, 3)),), "prompt tokens: expected 0"),
        ((Admission(0, GREEDY, 3, (), (1,)),), "output tokens: expected 0"),
        *(
            (_wanted(temperature=value), "temperature")
            for value in (-0.1, 100.1, 1e300, NAN, INFINITY)
        ),
        *((_wanted(top_p=value), "top_p") for value in (0.0, 1.1, NAN)),
        *((_wanted(min_p=value), "min_p") for value in (-0.1, 1.1, NAN)),
        *((_wanted(presence_penalty=value), "presence") for value in (-2.1, 2.1, NAN, INFINITY)),
        *((_wanted(frequency_penalty=value), "frequency") for value in (-2.1, 2.1, NAN)),
        *((_wanted(repetition_penalty=value), "repetition") for value in (0.0, 101.0, NAN)),
        (_wanted(top_k=101), "top_k"),
        (_wanted(min_tokens=65), "min_tokens"),
        (_wanted(logprobs=21), "logprobs"),
        (_wanted(end_tokens=(100,)), "end tokens: expected token ids below 100"),
        (_wanted(end_tokens=(4, 4)), "end tokens: a token is named twice"),
        (_wanted(end_tokens=tuple(range(100))), "end tokens: expected 0 to 99"),
        (_wanted(logit_bias=((100, 1.0),)), "logit_bias: expected token ids below 100"),
        (_wanted(logit_bias=((4, 1.0), (4, 1.0))), "logit_bias: a token is named twice"),
        *((_wanted(logit_bias=((4, value),)), "logit_bias") for value in (-100.1, 100.1, NAN)),
        (_wanted(logit_bias=((4, 1.0),) * (MAX_BIASES + 1)), "biases"),
    ],
)
def test_out_of_bounds(admitted: tuple[Admission, ...], reason: str) -> None:
    with pytest.raises(FrameOutOfBounds, match=reason):
        decode_admissions(encode_admissions(7, admitted), LIMITS)


@pytest.mark.parametrize(
    "admitted", [_changed(slot=-1), _changed(output=(2**32,)), _wanted(seed=-1)]
)
def test_what_does_not_fit_is_not_encoded(admitted: tuple[Admission, ...]) -> None:
    with pytest.raises(FrameOutOfBounds, match="does not fit"):
        encode_admissions(7, admitted)


def test_every_other_length_is_refused() -> None:
    message = encode_admissions(7, ADMISSIONS)
    for length in range(len(message)):
        with pytest.raises(FrameMalformed):
            decode_admissions(message[:length], LIMITS)
    with pytest.raises(FrameMalformed, match=f"expected {len(message)} bytes"):
        decode_admissions(message + b"\0", LIMITS)


def test_other_versions_and_kinds_are_refused() -> None:
    message = bytearray(encode_admissions(7, ADMISSIONS))
    for at, error in ((0, FrameMalformed), (2, FrameUnsupported), (3, FrameMalformed)):
        changed = bytearray(message)
        changed[at] ^= 1
        with pytest.raises(error):
            decode_admissions(changed, LIMITS)
    with pytest.raises(FrameMalformed, match="magic"):
        decode_result(message, LIMITS)
    with pytest.raises(FrameMalformed, match="magic"):
        decode_admissions(encode_result(StepResult(7, ())), LIMITS)


def test_lists_that_claim_more_than_there_is_are_refused_before_they_are_read() -> None:
    start = struct.calcsize("<HBBIQ")
    for field in (5, 6, 7, 8):
        message = bytearray(encode_admissions(7, ADMISSIONS))
        struct.pack_into("<I", message, start + 4 * field, 2**32 - 1)
        with pytest.raises(FrameOutOfBounds):
            decode_admissions(message, LIMITS)
        struct.pack_into("<I", message, start + 4 * field, 50)
        with pytest.raises(FrameError):
            decode_admissions(message, LIMITS)


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_only_raise_frame_errors(noise: bytes) -> None:
    message = encode_admissions(7, ADMISSIONS)
    for start in (b"", message[:4], message[:16]):
        with contextlib.suppress(FrameError):
            decode_admissions(start + noise, LIMITS)


@settings(max_examples=500)
@given(admissions(), st.data())
def test_mutations_are_refused_or_stay_within_limits(
    admitted: tuple[Admission, ...], data: st.DataObject
) -> None:
    message = bytearray(encode_admissions(7, admitted))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        _, found = decode_admissions(message, LIMITS)
    except FrameError:
        return
    for admission in found:
        assert admission.slot < LIMITS.max_sequences
        assert len(admission.prompt) + len(admission.output) <= LIMITS.max_context
        wanted = admission.parameters
        biased = [token for token, _ in wanted.logit_bias]
        for token in (*admission.prompt, *admission.output, *wanted.end_tokens, *biased):
            assert token < LIMITS.vocabulary
