"""Weights as int8 with one scale for each output channel: symmetric, rounded to nearest.

A channel's scale is its largest magnitude over 127, so that no weight is clipped and each is off by
at most half a scale. Activations keep the stage's dtype: what is saved is memory and reading it.
"""

from __future__ import annotations

import torch

__all__ = ["quantise"]

_LARGEST = 127
# Bounds the copy in float32: an LM head has some hundred thousand channels.
_CHANNELS_AT_ONCE = 4096


def quantise(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits a weight into int8 numbers and scales: weight is about numbers * scales[:, None].

    Args:
        weight_OI: finite, of any floating dtype.

    Returns:
        numbers [O, I], int8, -127 to 127; scales [O], float32, above 0.
    """
    numbers_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    scales_O = torch.empty(len(weight_OI))
    for first in range(0, len(weight_OI), _CHANNELS_AT_ONCE):
        part = slice(first, first + _CHANNELS_AT_ONCE)
        exact_OI = weight_OI[part].float()
        # A channel of zeros, or of numbers whose scale would vanish, needs one to divide by.
        scale_O = (exact_OI.abs().amax(1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        numbers_OI[part] = (exact_OI / scale_O[:, None]).round().to(torch.int8)
        scales_O[part] = scale_O
    return numbers_OI, scales_O
