"""How the tokens of a sequence are drawn: told by the head to the last stage, and to nobody else.

Both see prompts anyway; the stages between them would learn from sampling parameters and token ids
what their role does not expose. So these travel in frames of their own over the link that brings
results from the last stage to the head, in the other direction. Nor are they in any `repr`, which
ends up in logs.

An *admission frame* goes with each step whose header admits sequences, and is as little trusted:

    u16 magic | u8 version | u8 zero | u32 admissions | u64 step
    admissions x (u32 slot | u32 first | u32 top_k | u32 min_tokens
                  u32 logprobs: 0 for none, otherwise 1 + alternatives
                  u32 biases | u32 end tokens | u32 prompt | u32 output | u64 seed
                  f64 temperature | f64 top_p | f64 min_p
                  f64 presence | f64 frequency | f64 repetition)
    for each admission:
        biases x (u32 token id | f64 bias) | end tokens x u32 | prompt x u32 | output x u32
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Final

from security.channel.frame import (
    MAX_ALTERNATIVES,
    VERSION,
    BytesLike,
    FrameLimits,
    FrameMalformed,
    FrameOutOfBounds,
    bytes_of,
    check_start,
    within,
)

__all__ = [
    "MAX_BIASES",
    "MAX_END_TOKENS",
    "Admission",
    "SamplingParameters",
    "decode_admissions",
    "encode_admissions",
    "max_admission_bytes",
]

MAX_BIASES: Final = 1024
MAX_END_TOKENS: Final = 1024
MAX_TEMPERATURE: Final = 100.0
MAX_BIAS: Final = 100.0
MAX_ADDED_PENALTY: Final = 2.0
REPETITION_PENALTIES: Final = (0.01, 100.0)

_MAGIC: Final = 0x4142
_START: Final = struct.Struct("<HBBIQ")
_ADMISSION: Final = struct.Struct("<IIIIIIIIIQdddddd")
_BIAS: Final = struct.Struct("<Id")
_ID_BYTES: Final = 4


@dataclass(frozen=True, slots=True, repr=False)
class SamplingParameters:
    """How the last stage draws the tokens of a sequence.

    Attributes:
        temperature: 0 is greedy; at most 100.
        top_p: in (0, 1]; 1 for no limit.
        top_k: 0 for no limit, otherwise at most the vocabulary.
        seed: unsigned, 64 bits.
        min_p: least share of the likeliest token's probability, 0 to 1.
        presence_penalty: taken from the logits of tokens in the output, -2 to 2.
        frequency_penalty: taken once for each time that a token is in the output, -2 to 2.
        repetition_penalty: for tokens in prompt or output, positive logits are divided by it and
            others multiplied, 0.01 to 100; 1 for none.
        min_tokens: tokens of output before which no end token is drawn.
        end_tokens: the ids that `min_tokens` is about, each once; none where it is 0.
        logit_bias: (token id, what is added to its logit, -100 to 100), each id once.
        logprobs: None, or how many alternatives are told with each token's logprob.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    end_tokens: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    @property
    def counts_output(self) -> bool:
        """Whether a draw depends on the tokens of the output."""
        return bool(self.presence_penalty or self.frequency_penalty or self.counts_prompt)

    @property
    def counts_prompt(self) -> bool:
        """Whether a draw depends on the tokens of the prompt, beyond the logits."""
        return self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence that takes a slot: all that the last stage needs to draw its tokens.

    Attributes:
        slot: replaces whatever was there.
        parameters: how tokens are drawn.
        first: position of the output's first token, that is the length of the prompt.
        prompt: its token ids where `parameters.counts_prompt`, otherwise none.
        output: token ids drawn so far where `parameters.counts_output`, otherwise none. Those that
            the stage draws from here on it adds by itself.
    """

    slot: int
    parameters: SamplingParameters = field(repr=False)
    first: int
    prompt: tuple[int, ...] = field(default=(), repr=False)
    output: tuple[int, ...] = field(default=(), repr=False)


def max_admission_bytes(limits: FrameLimits) -> int:
    """The longest admission frame that these limits allow: the bound for `Link.receive`."""
    each = (
        _ADMISSION.size
        + MAX_BIASES * _BIAS.size
        + (MAX_END_TOKENS + limits.max_context) * _ID_BYTES
    )
    return _START.size + limits.max_sequences * each


def encode_admissions(step: int, admissions: Sequence[Admission]) -> bytes:
    """An admission frame for the step of that number.

    Raises FrameOutOfBounds where a field does not fit its width; the plan's limits are the
    receiver's to check.
    """
    try:
        parts = [_START.pack(_MAGIC, VERSION, 0, len(admissions), step)]
        for admission in admissions:
            wanted = admission.parameters
            parts.append(
                _ADMISSION.pack(
                    admission.slot,
                    admission.first,
                    wanted.top_k,
                    wanted.min_tokens,
                    0 if wanted.logprobs is None else 1 + wanted.logprobs,
                    len(wanted.logit_bias),
                    len(wanted.end_tokens),
                    len(admission.prompt),
                    len(admission.output),
                    wanted.seed,
                    wanted.temperature,
                    wanted.top_p,
                    wanted.min_p,
                    wanted.presence_penalty,
                    wanted.frequency_penalty,
                    wanted.repetition_penalty,
                )
            )
        for admission in admissions:
            wanted = admission.parameters
            parts += starmap(_BIAS.pack, wanted.logit_bias)
            ids = (*wanted.end_tokens, *admission.prompt, *admission.output)
            parts.append(struct.pack(f"<{len(ids)}I", *ids))
    except struct.error as error:
        raise FrameOutOfBounds(f"admissions of {step}: a field does not fit: {error}") from None
    return b"".join(parts)


def decode_admissions(message: BytesLike, limits: FrameLimits) -> tuple[int, tuple[Admission, ...]]:
    """Parse and check an admission frame: the step's number and who it admits.

    Whether that step admits these slots is for the caller to compare with its header. Raises a
    FrameError.
    """
    view = bytes_of(message)
    if len(view) < _START.size:
        raise FrameMalformed(
            f"admission frame: expected at least {_START.size} bytes, found {len(view)}"
        )
    magic, version, zero, count, step = _START.unpack_from(view)
    check_start("admission", magic, _MAGIC, version)
    if zero:
        raise FrameMalformed("admission frame: a reserved byte is not zero")
    within("admissions", count, 1, limits.max_sequences)
    lists_at = _START.size + count * _ADMISSION.size
    if len(view) < lists_at:
        raise FrameMalformed(
            f"admissions of {step}: expected at least {lists_at} bytes, found {len(view)}"
        )
    admissions: list[Admission] = []
    at = lists_at
    for fields in _ADMISSION.iter_unpack(view[_START.size : lists_at]):
        biases, ends, prompt, output = fields[5:9]
        within("biases", biases, 0, MAX_BIASES)
        # One token is left to draw, whatever the end tokens are.
        within("end tokens", ends, 0, min(MAX_END_TOKENS, limits.vocabulary - 1))
        within("prompt and output tokens", prompt + output, 0, limits.max_context)
        lengths = (biases * _BIAS.size, ends * _ID_BYTES, (prompt + output) * _ID_BYTES)
        if at + sum(lengths) > len(view):
            raise FrameMalformed(
                f"admissions of {step}: expected at least {at + sum(lengths)} bytes, "
                f"found {len(view)}"
            )
        logit_bias = tuple(_BIAS.iter_unpack(view[at : at + lengths[0]]))
        at += lengths[0]
        ids = struct.unpack_from(f"<{ends + prompt + output}I", view, at)
        at += lengths[1] + lengths[2]
        parameters = _checked_parameters(fields, logit_bias, ids[:ends], limits)
        tokens = ids[ends:]
        if max(tokens, default=0) >= limits.vocabulary:
            raise FrameOutOfBounds(
                f"admissions of {step}: expected token ids below {limits.vocabulary}, "
                f"found {max(tokens)}"
            )
        slot, first = fields[:2]
        within("slot", slot, 0, limits.max_sequences - 1)
        within("first", first, 1, limits.max_context - 1)
        within("prompt tokens", prompt, *_all_or_none(parameters.counts_prompt, first))
        if not parameters.counts_output:
            within("output tokens", output, 0, 0)
        admissions.append(Admission(slot, parameters, first, tokens[:prompt], tokens[prompt:]))
    if at != len(view):
        raise FrameMalformed(f"admissions of {step}: expected {at} bytes, found {len(view)}")
    if len({admission.slot for admission in admissions}) != count:
        raise FrameOutOfBounds(f"admissions of {step}: a slot is named twice")
    return step, tuple(admissions)


def _all_or_none(wanted: bool, count: int) -> tuple[int, int]:
    return (count, count) if wanted else (0, 0)


def _checked_parameters(
    fields: tuple[int | float, ...],
    logit_bias: tuple[tuple[int, float], ...],
    end_tokens: tuple[int, ...],
    limits: FrameLimits,
) -> SamplingParameters:
    top_k, min_tokens, logprobs, seed = (int(fields[index]) for index in (2, 3, 4, 9))
    temperature, top_p, min_p, presence, frequency, repetition = map(float, fields[10:])
    # Above some 1e45 its inverse is 0 in float32, and 0 times minus infinity not a number.
    _between("temperature", temperature, 0.0, MAX_TEMPERATURE)
    if not 0 < top_p <= 1:
        raise FrameOutOfBounds(f"top_p: expected a number in (0, 1], found {top_p}")
    _between("min_p", min_p, 0.0, 1.0)
    _between("presence_penalty", presence, -MAX_ADDED_PENALTY, MAX_ADDED_PENALTY)
    _between("frequency_penalty", frequency, -MAX_ADDED_PENALTY, MAX_ADDED_PENALTY)
    _between("repetition_penalty", repetition, *REPETITION_PENALTIES)
    within("top_k", top_k, 0, limits.vocabulary)
    within("min_tokens", min_tokens, 0, limits.max_context)
    within("logprobs", logprobs, 0, 1 + MAX_ALTERNATIVES)
    biased = [token for token, _ in logit_bias]
    for name, ids in (("logit_bias", biased), ("end tokens", end_tokens)):
        if max(ids, default=0) >= limits.vocabulary:
            raise FrameOutOfBounds(
                f"{name}: expected token ids below {limits.vocabulary}, found {max(ids)}"
            )
        if len(set(ids)) != len(ids):
            raise FrameOutOfBounds(f"{name}: a token is named twice")
    for _, bias in logit_bias:
        _between("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
    return SamplingParameters(
        temperature,
        top_p,
        top_k,
        seed,
        min_p,
        presence,
        frequency,
        repetition,
        min_tokens,
        end_tokens,
        logit_bias,
        logprobs - 1 if logprobs else None,
    )


def _between(name: str, value: float, least: float, most: float) -> None:
    # Also false for NaN.
    if not least <= value <= most:
        raise FrameOutOfBounds(f"{name}: expected {least:g} to {most:g}, found {value}")
