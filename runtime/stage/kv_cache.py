"""The paged key-value cache of one stage (PagedAttention, arXiv 2309.06180)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["PagedCache", "committed_zeros"]


def committed_zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Zeros whose memory is taken at once.

    `torch.zeros` only reserves addresses, so that whoever measures what is left would count it in,
    and the first long prompt would find that it is gone.
    """
    return torch.empty(*shape, dtype=dtype, device=device).zero_()


class PagedCache:
    """Keys and values of a range of layers, in blocks that the head alone hands out.

    The cache keeps no record of who owns a block: block tables come with every step, and strict
    order of the steps makes reuse safe. A position must be written before a later step reads it.

    Args:
        layers: model-wide indices of the layers.
        blocks, block_size: N and P.
        heads, head_size: K and E, of this rank.
        device: where the cache is.
    """

    def __init__(
        self,
        layers: range,
        *,
        blocks: int,
        block_size: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self.block_size = block_size
        shape = (blocks, block_size, heads, head_size)
        # Zeros, not whatever was there: hidden positions are multiplied by 0, and 0 * NaN is NaN.
        self._keys_NPKE = {layer: committed_zeros(shape, dtype, device) for layer in layers}
        self._values_NPKE = {layer: committed_zeros(shape, dtype, device) for layer in layers}

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return next(iter(self._keys_NPKE.values())).device

    @property
    def bytes(self) -> int:
        """Memory of the cache."""
        return sum(
            tensor.numel() * tensor.element_size()
            for tensors in (self._keys_NPKE, self._values_NPKE)
            for tensor in tensors.values()
        )

    def write(
        self, layer: int, places_T: torch.Tensor, keys_TKE: torch.Tensor, values_TKE: torch.Tensor
    ) -> None:
        """Stores one row per place; a place is `block * block_size + offset`."""
        self._keys_NPKE[layer].flatten(0, 1).index_copy_(0, places_T, keys_TKE)
        self._values_NPKE[layer].flatten(0, 1).index_copy_(0, places_T, values_TKE)

    def read(self, layer: int, blocks_SB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, K, L, E] of whole blocks, L = B * P; copies, not contiguous."""
        keys = self._keys_NPKE[layer][blocks_SB].flatten(1, 2)
        values = self._values_NPKE[layer][blocks_SB].flatten(1, 2)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def blocks(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, P, K, E] of all blocks; not copies."""
        return self._keys_NPKE[layer], self._values_NPKE[layer]

    def clear(self) -> None:
        """Forgets everything: a new epoch reads nothing of the one before."""
        for tensors in (self._keys_NPKE, self._values_NPKE):
            for tensor in tensors.values():
                tensor.zero_()
