"""The decoder layers of a stage over their cache: what is computed in every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from runtime.stage import attention
from runtime.stage.checkpoint import PartLoader, ProgressCount
from runtime.stage.dense_layer import rotation_name
from runtime.stage.kv_cache import PagedCache
from runtime.stage.settings import StageSettings
from security.channel.frame import StepHeader

__all__ = ["LayerStack", "Layers"]

_CPU = torch.device("cpu")


class Layers(Protocol):
    """Layers of a stage, in this process or on tensor-parallel ranks.

    They are loaded when they are made; then comes `open_cache`, once, and only then steps.
    """

    @property
    def block_bytes(self) -> int:
        """Memory of one cache block in all layers, on all ranks together."""

    def open_cache(self, blocks: int) -> None:
        """Makes the cache and takes its memory."""

    def forward(self, header: StepHeader, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] after the layers; writes the step's positions to the cache."""

    def reset(self) -> None:
        """Empties the cache."""

    def close(self) -> None:
        """Releases processes and memory; nothing may be called after it."""


class LayerStack:
    """The layers of a stage in this process.

    Args:
        checkpoint: of the model.
        settings: of the stage.
        progress: told what is read.
        prepare: called with each layer as soon as its tensors are there, before the next is read;
            what a layer's sharding frees is free before the next layer needs memory.
        device: that computes.
    """

    def __init__(
        self,
        checkpoint: PartLoader,
        settings: StageSettings,
        progress: ProgressCount,
        prepare: Callable[[nn.Module], None] | None = None,
        device: torch.device = _CPU,
    ) -> None:
        attention.register()
        config = checkpoint.parts.config
        config._attn_implementation = attention.NAME
        indices = range(settings.first_layer, settings.last_layer)
        self._layers: list[tuple[nn.Module, str]] = []
        for index in indices:
            name = checkpoint.parts.layer_name(index)
            layer = checkpoint.fill(name).to(device)
            if prepare is not None:
                prepare(layer)
            self._layers.append((layer, rotation_name(config, index)))
            progress.add(checkpoint.bytes_of([name]))
        self._device = device
        self._rotations = checkpoint.parts.rotations(indices)
        self._rotations.to(device)
        self._settings = settings
        self._heads: int = config.num_key_value_heads // settings.tp
        self._head_size: int = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self._cache: PagedCache | None = None

    @property
    def block_bytes(self) -> int:
        """See `Layers`; of this rank."""
        row = self._heads * self._head_size * self._settings.torch_dtype.itemsize
        return 2 * len(self._layers) * self._settings.block_size * row

    def open_cache(self, blocks: int) -> None:
        """See `Layers`."""
        settings = self._settings
        self._cache = PagedCache(
            range(settings.first_layer, settings.last_layer),
            blocks=blocks,
            block_size=settings.block_size,
            heads=self._heads,
            head_size=self._head_size,
            dtype=settings.torch_dtype,
            device=self._device,
        )

    @torch.inference_mode()
    def forward(self, header: StepHeader, hidden_TD: torch.Tensor) -> torch.Tensor:
        """See `Layers`."""
        assert self._cache is not None, "the cache is open"
        step = attention.PagedStep(self._cache, header)
        hidden_1TD = hidden_TD.to(self._device)[None]
        rotations = self._rotations.at(hidden_1TD, step.positions_1T, step.long_1T)
        for layer, rotation in self._layers:
            hidden_1TD = layer(
                hidden_1TD,
                attention_mask=None,
                position_ids=step.positions_1T,
                position_embeddings=rotations[rotation],
                paged_step=step,
            )
        return hidden_1TD[0]

    @torch.inference_mode()
    def reset(self) -> None:
        """See `Layers`."""
        if self._cache is not None:
            self._cache.clear()

    def close(self) -> None:
        """See `Layers`."""
        self._layers.clear()
        self._cache = None
