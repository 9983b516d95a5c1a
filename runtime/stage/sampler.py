"""Draws the next token of each sequence from its logits.

Randomness is counter-based (the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011, with SHA-256 as the bijection's stand-in): a draw depends on the sequence's seed and
the position of the token, on nothing else. A stage that restarts, another batch or a recomputed
sequence draws the same token from the same logits, and there is no generator state to restore.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch

from runtime.stage.errors import NonFinite
from security.channel.frame import SamplingParameters

__all__ = ["sample", "uniform"]

_DOMAIN = b"bulkhead/v1/sampler"
_COUNTER = struct.Struct("<QQ")
# Most nucleus samples end within this many candidates; sorting a whole vocabulary is slow.
_CANDIDATES = 1024


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, fixed by its two arguments (unsigned, 64 bits)."""
    digest = hashlib.sha256(_DOMAIN + _COUNTER.pack(seed, position)).digest()
    return float((int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53)


def sample(
    logits_SV: torch.Tensor, parameters: Sequence[SamplingParameters], positions: Sequence[int]
) -> list[int]:
    """One token id per row.

    Args:
        logits_SV: float32.
        parameters: per row; temperature 0 takes the largest logit, otherwise `top_k` (0 for all)
            is applied before `top_p`, both after the temperature, as transformers does.
        positions: per row, of the token to draw in its sequence.

    Raises:
        NonFinite: a row holds a NaN or an infinity.
    """
    if not bool(torch.isfinite(logits_SV).all()):
        raise NonFinite(
            f"logits: expected finite numbers in {logits_SV.shape[0]} rows, found others"
        )
    greedy: list[int] = torch.argmax(logits_SV, dim=-1).tolist()
    return [
        token if wanted.temperature == 0 else _draw(logits_V, wanted, position)
        for token, logits_V, wanted, position in zip(
            greedy, logits_SV, parameters, positions, strict=True
        )
    ]


def _draw(logits_V: torch.Tensor, wanted: SamplingParameters, position: int) -> int:
    # float64, and a row at a time: the sums must not depend on how many rows there are. The
    # largest logit is taken away first, so that a tiny temperature overflows to -inf, not to inf.
    scaled_V = (logits_V.double() - logits_V.max().double()) / wanted.temperature
    vocabulary = scaled_V.shape[0]
    limit = wanted.top_k if 0 < wanted.top_k < vocabulary else vocabulary
    weights_V = torch.exp(scaled_V)
    if limit == vocabulary and wanted.top_p >= 1:
        return _pick(weights_V, wanted, position)
    if limit == vocabulary:
        target = wanted.top_p * float(weights_V.sum())
        weights, tokens = torch.topk(weights_V, min(_CANDIDATES, vocabulary))
        if float(weights.sum()) < target:
            weights, tokens = torch.sort(weights_V, descending=True, stable=True)
    else:
        weights, tokens = torch.topk(weights_V, limit)
        target = wanted.top_p * float(weights.sum())
    if wanted.top_p < 1:
        # A candidate stays while those before it have not reached the target; the first always.
        before = weights.cumsum(0) - weights
        kept = max(1, int((before < target).sum()))
        weights, tokens = weights[:kept], tokens[:kept]
    return int(tokens[_pick(weights, wanted, position)])


def _pick(weights: torch.Tensor, wanted: SamplingParameters, position: int) -> int:
    sums = weights.cumsum(0)
    target = uniform(wanted.seed, position) * sums[-1]
    index = int(torch.searchsorted(sums, target, right=True))
    # Rounding can land on the very end, where the last weights may be zero.
    return min(index, int(torch.searchsorted(sums, sums[-1])))
