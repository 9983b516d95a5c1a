"""Draws the next token of each sequence from its logits, all rows of a step at once.

In this order, as vLLM and transformers have it where they agree: logit bias, repetition penalty,
frequency and presence penalty, end tokens masked before `min_tokens`; then, unless greedy,
temperature, top-k, top-p, min-p and the draw. Logprobs are of the raw logits, before all of it.

A row's token depends on nothing but its logits, its sequence and the position: not on the rows
beside it. Randomness is counter-based (the idea of Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011, with SHA-256 as the bijection's stand-in): a draw depends on the sequence's
seed and the token's position, so there is no generator state to restore. Tokens have one order,
likeliest first and of equal ones the lower id first, and weights are whole numbers, whose sums are
exact in whatever order they are added.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from runtime.stage.errors import NonFinite, StepRefused
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import TokenLogprobs

__all__ = ["Draw", "Sampler", "uniform"]

_DOMAIN = b"bulkhead/v1/sampler"
_COUNTER = struct.Struct("<QQ")
_RANDOM_BITS = 53
# Reductions over chunks are many times faster than over a whole vocabulary.
_CHUNK = 128
# Most draws are decided among so many likeliest tokens; the rest need more, or all in order.
_CANDIDATES = (64, 256, 1024)
# Sums over a vocabulary stay whole numbers in float64, which has 53 bits; and over a chunk in
# float32, which has 24, for halves of weights. So a weight has at most twice that half's bits.
_SUM_BITS = 52
_HALF_BITS = 17
# A mebibyte in float32.
_CACHED_LOGITS = 2**18
_LARGEST_FLOAT = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Draw:
    """A row of logits: whose it is, and the position of the token to draw."""

    slot: int
    position: int


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, fixed by its two arguments (unsigned, 64 bits)."""
    return float(_random_bits(seed, position) * 2.0**-_RANDOM_BITS)


def _random_bits(seed: int, position: int) -> int:
    digest = hashlib.sha256(_DOMAIN + _COUNTER.pack(seed, position)).digest()
    return int.from_bytes(digest[:8], "little") >> (64 - _RANDOM_BITS)


class Sampler:
    """What the last stage knows of the sequence in each slot, and the draws themselves.

    Nothing here outlives an epoch or needs to: the head admits a sequence with all of its tokens.
    """

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}

    def admit(self, admission: Admission) -> None:
        """Gives a slot to a sequence; whoever had it before is forgotten."""
        self._slots[admission.slot] = _Slot(admission)

    def reset(self) -> None:
        """Forgets all sequences, for a new epoch."""
        self._slots.clear()

    @torch.inference_mode()
    def sample(
        self, logits_SV: torch.Tensor, draws: Sequence[Draw]
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """One token id per row, and its logprobs where its sequence asked.

        Args:
            logits_SV: float32; changed in place.
            draws: one per row.

        Raises:
            NonFinite: a row holds a NaN or an infinity.
            StepRefused: a slot that nobody was admitted to, or a position before its output.
        """
        slots = [self._slot(draw) for draw in draws]
        # One pass that keeps NaN; isfinite().all() would take three.
        if not all(map(torch.isfinite, torch.aminmax(logits_SV))):
            raise NonFinite(
                f"logits: expected finite numbers in {logits_SV.shape[0]} rows, found others"
            )
        told = [row for row, slot in enumerate(slots) if slot.parameters.logprobs is not None]
        raw_RV = logits_SV[told] if told else None  # a copy
        _adjust(logits_SV, slots, draws)
        tokens = _largest(logits_SV)
        drawn = [row for row, slot in enumerate(slots) if slot.parameters.temperature > 0]
        if drawn:
            picked = _pick(
                logits_SV if len(drawn) == len(slots) else logits_SV[drawn],
                logits_SV[drawn, [tokens[row] for row in drawn]],
                [slots[row].parameters for row in drawn],
                [draws[row].position for row in drawn],
            )
            for row, token in zip(drawn, picked, strict=True):
                tokens[row] = token
        for slot, token in zip(slots, tokens, strict=True):
            slot.append(token)
        logprobs: list[TokenLogprobs | None] = [None] * len(slots)
        if raw_RV is not None:
            wanted = [slots[row].parameters.logprobs or 0 for row in told]
            found = _logprobs(raw_RV, [tokens[row] for row in told], wanted)
            for row, entry in zip(told, found, strict=True):
                logprobs[row] = entry
        return tokens, logprobs

    def _slot(self, draw: Draw) -> _Slot:
        slot = self._slots.get(draw.slot)
        if slot is None:
            raise StepRefused(
                f"slot {draw.slot}: expected an admitted sequence to sample, found none"
            )
        if draw.position < slot.first:
            raise StepRefused(
                f"slot {draw.slot}: expected to sample from position {slot.first} on, "
                f"found {draw.position}"
            )
        return slot


class _Slot:
    """One sequence: its parameters as tensors, and its tokens as far as penalties need them."""

    def __init__(self, admission: Admission) -> None:
        self.parameters = parameters = admission.parameters
        self.first = admission.first
        self.bias_ids = torch.tensor([token for token, _ in parameters.logit_bias])
        self.bias = torch.tensor([bias for _, bias in parameters.logit_bias])
        self.end_ids = torch.tensor(parameters.end_tokens, dtype=torch.int64)
        self.seen: _SeenTokens | None = None
        if parameters.counts_output:
            self.seen = _SeenTokens(admission.prompt, admission.output)

    def append(self, token: int) -> None:
        """A token of output was drawn."""
        if self.seen is not None:
            self.seen.append(token)

    def ending_forbidden(self, position: int) -> bool:
        """Whether the token at this position comes before `min_tokens`."""
        return position - self.first < self.parameters.min_tokens


class _SeenTokens:
    """Distinct tokens of a sequence and how often each is in its output; grows by doubling."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids = torch.tensor(list(self._places), dtype=torch.int64)
        self._counts = torch.zeros(len(self._places))
        for token in output:
            self.append(token)

    @property
    def ids(self) -> torch.Tensor:
        """Each token once, int64."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> torch.Tensor:
        """Its number in the output, float32; 0 for one of the prompt only."""
        return self._counts[: len(self._places)]

    def append(self, token: int) -> None:
        """A token of output."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            spare = max(64, place)
            self._ids = torch.cat([self._ids, torch.zeros(spare, dtype=torch.int64)])
            self._counts = torch.cat([self._counts, torch.zeros(spare)])
        self._ids[place] = token
        self._counts[place] += 1


def _adjust(logits_SV: torch.Tensor, slots: Sequence[_Slot], draws: Sequence[Draw]) -> None:
    """Bias, penalties and forbidden ends, in place and only where there are any."""
    biased = [row for row, slot in enumerate(slots) if slot.parameters.logit_bias]
    if biased:
        places = _places(logits_SV, biased, [slots[row].bias_ids for row in biased])
        logits_SV[places] += torch.cat([slots[row].bias for row in biased]).to(logits_SV.device)
    seen = {row: slot.seen for row, slot in enumerate(slots) if slot.seen is not None}
    if seen:
        places = _places(logits_SV, list(seen), [tokens.ids for tokens in seen.values()])
        counts = torch.cat([tokens.counts for tokens in seen.values()]).to(logits_SV.device)
        parameters = [slots[row].parameters for row in seen]
        repetition, frequency, presence = (
            torch.tensor(
                [
                    [wanted.repetition_penalty for wanted in parameters],
                    [wanted.frequency_penalty for wanted in parameters],
                    [wanted.presence_penalty for wanted in parameters],
                ]
            )
            .repeat_interleave(torch.tensor([len(tokens.ids) for tokens in seen.values()]), dim=1)
            .to(logits_SV.device)
        )
        values = logits_SV[places]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits_SV[places] = values - frequency * counts - presence * (counts > 0)
    unfinished = [
        row
        for row, (slot, draw) in enumerate(zip(slots, draws, strict=True))
        if slot.ending_forbidden(draw.position)
    ]
    if unfinished:
        places = _places(logits_SV, unfinished, [slots[row].end_ids for row in unfinished])
        logits_SV[places] = -torch.inf


def _places(
    logits_SV: torch.Tensor, rows: Sequence[int], ids: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the given tokens of the given rows."""
    counts = torch.tensor([len(tokens) for tokens in ids])
    return (
        torch.tensor(rows).repeat_interleave(counts).to(logits_SV.device),
        torch.cat(list(ids)).to(logits_SV.device),
    )


def _largest(logits_SV: torch.Tensor) -> list[int]:
    """Per row the id of the largest logit, of equal ones the lowest.

    `argmax` says the same and takes ten times as long on a CPU, where it is not vectorised.
    """
    rows, vocabulary = logits_SV.shape
    whole = vocabulary // _CHUNK * _CHUNK
    chunks = logits_SV[:, :whole].view(rows, whole // _CHUNK, _CHUNK)
    largest = [chunks.amax(-1)] if whole else []
    if whole < vocabulary:
        largest.append(logits_SV[:, whole:].amax(-1, keepdim=True))
    chunk = torch.cat(largest, dim=1).argmax(-1)
    values = _chunk_of(logits_SV, chunk, -torch.inf)
    tokens: list[int] = (chunk * _CHUNK + values.argmax(-1)).tolist()
    return tokens


def _chunk_of(values_RV: torch.Tensor, chunk_R: torch.Tensor, beyond: float) -> torch.Tensor:
    """One chunk of each row; `beyond` stands where the last one is not full."""
    ids = chunk_R[:, None] * _CHUNK + torch.arange(_CHUNK, device=values_RV.device)
    inside = ids < values_RV.shape[1]
    return torch.where(inside, values_RV.gather(1, ids.where(inside, 0)), beyond)


def _ranked(logits_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` likeliest tokens of each row in their one order.

    Returns values and ids [R, count], and per row how many from the front are certain: of equal
    values at the very end, `topk` takes some.
    """
    rows, vocabulary = logits_RV.shape
    if count >= vocabulary:
        values, ids = torch.sort(logits_RV, dim=-1, descending=True, stable=True)
        return values, ids, torch.full((rows,), vocabulary, device=logits_RV.device)
    if 4 * count <= vocabulary // _CHUNK:
        of_chunks_RC, ids_of_chunks_RC = _largest_chunks(logits_RV, count)
        values, places = torch.topk(of_chunks_RC, count, dim=-1)
        ids = ids_of_chunks_RC.gather(1, places)
    else:
        values, ids = torch.topk(logits_RV, count, dim=-1)
    ids, order = torch.sort(ids, dim=-1)
    values, order = torch.sort(values.gather(1, order), dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order), (values > values[:, -1:]).sum(-1)


def _largest_chunks(logits_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids, among which the `count` largest of each row are.

    A token that is among them is in one of the `count` chunks whose largest are largest, unless as
    many others equal it. What is left behind the last full chunk is always there.
    """
    rows, vocabulary = logits_RV.shape
    whole = vocabulary // _CHUNK * _CHUNK
    device = logits_RV.device
    chunks = logits_RV[:, :whole].view(rows, whole // _CHUNK, _CHUNK)
    chunk_RC = torch.topk(chunks.amax(-1), count, dim=-1).indices
    ids = (chunk_RC[:, :, None] * _CHUNK + torch.arange(_CHUNK, device=device)).flatten(1)
    rest = torch.arange(whole, vocabulary, device=device).expand(rows, -1)
    ids = torch.cat([ids, rest], dim=1)
    return logits_RV.gather(1, ids), ids


def _pick(
    logits_RV: torch.Tensor,
    largest_R: torch.Tensor,
    parameters: Sequence[SamplingParameters],
    positions: Sequence[int],
) -> list[int]:
    """A token per row, by inversion: the first whose summed weight exceeds the random share."""
    weights = _Weights(largest_R, parameters, logits_RV.shape[1])
    bits = [
        _random_bits(wanted.seed, position)
        for wanted, position in zip(parameters, positions, strict=True)
    ]
    limited = [row for row in range(len(bits)) if weights.limited(row)]
    free = [row for row in range(len(bits)) if not weights.limited(row)]
    tokens = [0] * len(bits)
    for rows, pick in ((free, _pick_of_all), (limited, _pick_of_kept)):
        for some in _blocks(rows, logits_RV):
            found = pick(logits_RV, weights, some, [bits[row] for row in some])
            for row, token in zip(some, found, strict=True):
                tokens[row] = token
    return tokens


def _blocks(rows: Sequence[int], logits_RV: torch.Tensor) -> Iterator[Sequence[int]]:
    """The rows in groups that fit a CPU's cache: fresh memory would cost more than the work."""
    size = max(1, len(rows))
    if logits_RV.device.type == "cpu":
        size = max(1, _CACHED_LOGITS // logits_RV.shape[1])
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class _Weights:
    """Turns logits into weights: whole numbers, in proportion to exp(logit / temperature).

    Args:
        largest_R: the largest logit of each row; its weight is `one`.
        parameters: per row, with temperatures above 0.
        vocabulary: sums over so many weights are exact in float64.
    """

    def __init__(
        self, largest_R: torch.Tensor, parameters: Sequence[SamplingParameters], vocabulary: int
    ) -> None:
        self.parameters = parameters
        self.vocabulary = vocabulary
        self.one = 2.0 ** min(2 * _HALF_BITS, _SUM_BITS - vocabulary.bit_length())
        self._largest_R = largest_R
        # Bounded, so that the coldest temperature multiplies 0 by a number, not by infinity.
        inverse = [min(1 / wanted.temperature, _LARGEST_FLOAT) for wanted in parameters]
        self._inverse_R = torch.tensor(inverse, device=largest_R.device)

    def limited(self, row: int) -> bool:
        """Whether only some tokens may be drawn."""
        wanted = self.parameters[row]
        return 0 < wanted.top_k < self.vocabulary or wanted.top_p < 1 or wanted.min_p > 0

    def of(self, rows: Sequence[int], logits_RC: torch.Tensor) -> torch.Tensor:
        """Weights [R, C], float32 with whole values, of logits that belong to these rows."""
        index = torch.tensor(rows, device=logits_RC.device)
        scaled = logits_RC - self._largest_R[index][:, None]
        return scaled.mul_(self._inverse_R[index][:, None]).exp_().mul_(self.one).floor_()


def _pick_of_all(
    logits_RV: torch.Tensor, weights: _Weights, rows: Sequence[int], bits: Sequence[int]
) -> list[int]:
    """In order of token ids; first the chunk is found, then the token in it."""
    weights_RV = weights.of(rows, _rows_of(logits_RV, rows))
    sums_RC = _chunk_sums(weights_RV)
    until_RC = sums_RC.cumsum(-1)
    target_R1 = _targets(until_RC[:, -1], bits)
    chunk_R1 = torch.searchsorted(until_RC, target_R1, right=True)
    target_R1 = target_R1 - (until_RC - sums_RC).gather(1, chunk_R1)
    within_RC = _chunk_of(weights_RV, chunk_R1[:, 0], 0.0).double().cumsum(-1)
    place_R1 = torch.searchsorted(within_RC, target_R1, right=True)
    tokens: list[int] = (chunk_R1 * _CHUNK + place_R1)[:, 0].tolist()
    return tokens


def _pick_of_kept(
    logits_RV: torch.Tensor, weights: _Weights, rows: Sequence[int], bits: Sequence[int]
) -> list[int]:
    """Among the likeliest tokens that top-k, top-p and min-p keep, the likeliest first."""
    shares = _nucleus_weights(logits_RV, weights, rows)
    tokens: dict[int, int] = {}
    left = list(range(len(rows)))
    for count in (*_CANDIDATES, weights.vocabulary):
        some = [rows[at] for at in left]
        values_RC, ids_RC, certain_R = _ranked(_rows_of(logits_RV, some), count)
        weights_RC = weights.of(some, values_RC).double()
        until_RC = weights_RC.cumsum(-1)
        top_k, top_p, min_weight = torch.tensor(
            [
                [weights.parameters[row].top_k or weights.vocabulary for row in some],
                [weights.parameters[row].top_p for row in some],
                [weights.parameters[row].min_p * weights.one for row in some],
            ],
            dtype=torch.float64,
            device=logits_RV.device,
        )[:, :, None]
        rank_C = torch.arange(values_RC.shape[1], device=logits_RV.device)
        in_top_k = rank_C < top_k
        of_top_k = (weights_RC * in_top_k).sum(-1, keepdim=True)
        share_R1 = torch.tensor(
            [[shares[at]] for at in left], dtype=torch.float64, device=logits_RV.device
        )
        share_R1 = torch.where(share_R1 < 0, top_p * of_top_k, share_R1)
        kept = in_top_k & (until_RC - weights_RC < share_R1) & (weights_RC >= min_weight)
        kept_R = kept.sum(-1).clamp(min=1)
        last_R1 = (kept_R - 1)[:, None]
        target_R1 = _targets(until_RC.gather(1, last_R1)[:, 0], [bits[at] for at in left])
        place_R1 = torch.searchsorted(until_RC, target_R1, right=True)
        found: list[int] = ids_RC.gather(1, place_R1)[:, 0].tolist()
        # What top-k keeps must be certain even where top-p keeps less: it is what top-p is of.
        needed_R = torch.where(top_k[:, 0] < weights.vocabulary, top_k[:, 0], kept_R)
        decided: list[bool] = (torch.maximum(needed_R, kept_R) <= certain_R).tolist()
        tokens |= {at: token for at, token, sure in zip(left, found, decided, strict=True) if sure}
        left = [at for at, sure in zip(left, decided, strict=True) if not sure]
        if not left:
            break
    return [tokens[at] for at in range(len(rows))]


def _nucleus_weights(
    logits_RV: torch.Tensor, weights: _Weights, rows: Sequence[int]
) -> list[float]:
    """Per row the weight that top-p wants: infinite without top-p, -1 where it is of top-k."""
    shares = []
    whole = []
    for row in rows:
        wanted = weights.parameters[row]
        if wanted.top_p < 1 and not 0 < wanted.top_k < weights.vocabulary:
            whole.append(row)
        shares.append(math.inf if wanted.top_p >= 1 else -1.0)
    if whole:
        weights_RV = weights.of(whole, _rows_of(logits_RV, whole))
        totals: list[float] = _chunk_sums(weights_RV).sum(-1).tolist()
        for row, total in zip(whole, totals, strict=True):
            shares[rows.index(row)] = weights.parameters[row].top_p * total
    return shares


def _chunk_sums(weights_RV: torch.Tensor) -> torch.Tensor:
    """Exact sums [R, C] of the weights of each chunk, float64; the last chunk may be short.

    Adding up in float64 is slow on a CPU. Split in two halves of at most `_HALF_BITS`, 128 weights
    add up exactly in float32, too.
    """
    rows, vocabulary = weights_RV.shape
    whole = vocabulary // _CHUNK * _CHUNK
    high_RV = (weights_RV * 2.0**-_HALF_BITS).floor_()
    low_RV = weights_RV - high_RV * 2.0**_HALF_BITS
    sums = []
    for half in (high_RV, low_RV):
        chunks = half[:, :whole].view(rows, whole // _CHUNK, _CHUNK)
        sums.append(torch.cat([chunks.sum(-1), half[:, whole:].sum(-1, keepdim=True)], dim=1))
    high_RC, low_RC = sums
    return high_RC.double() * 2.0**_HALF_BITS + low_RC.double()


def _targets(totals_R: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """Random shares [R, 1] of whole totals, rounded down: the least is 0, none is the total."""
    return torch.tensor(
        [
            [float(random * int(total) >> _RANDOM_BITS)]
            for random, total in zip(bits, totals_R.tolist(), strict=True)
        ],
        dtype=torch.float64,
        device=totals_R.device,
    )


def _rows_of(logits_RV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows, without a copy where they follow each other."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits_RV[rows[0] : rows[-1] + 1]
    return logits_RV[list(rows)]


def _logprobs(
    raw_RV: torch.Tensor, tokens: Sequence[int], alternatives: Sequence[int]
) -> list[TokenLogprobs]:
    """Logprobs of each row's token and of as many of the likeliest as it asks for."""
    vocabulary = raw_RV.shape[1]
    total_R1 = raw_RV.logsumexp(-1, keepdim=True)
    token_R1 = torch.tensor(tokens, device=raw_RV.device)[:, None]
    # Rounding must not make a probability above 1.
    chosen: list[float] = (raw_RV.gather(1, token_R1) - total_R1).clamp(max=0)[:, 0].tolist()
    most = min(max(alternatives), vocabulary)
    values_RC, ids_RC, certain_R = _ranked(raw_RV, _CANDIDATES[0])
    values_RC, ids_RC = values_RC[:, :most].clone(), ids_RC[:, :most].clone()
    unsure = [row for row, certain in enumerate(certain_R.tolist()) if certain < most]
    if unsure:
        values, ids, _ = _ranked(raw_RV[unsure], vocabulary)
        values_RC[unsure], ids_RC[unsure] = values[:, :most], ids[:, :most]
    logprobs: list[list[float]] = (values_RC - total_R1).clamp(max=0).tolist()
    ranked: list[list[int]] = ids_RC.tolist()
    return [
        TokenLogprobs(value, tuple(zip(ids[:count], of_ids[:count], strict=True)))
        for value, ids, of_ids, count in zip(chosen, ranked, logprobs, alternatives, strict=True)
    ]
