"""Holds a sharded layer to the whole one, before a stage serves with it.

Slices that are where they should be do not yet make a right layer: how many heads are left, what
is summed and where a bias is added is code of the family and of DeepSpeed. So every layer computes
a few rows before and after it is sharded, over a cache of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from runtime.stage.attention import PagedStep
from runtime.stage.dense_layer import rotation_name
from runtime.stage.errors import UnsupportedModel
from runtime.stage.kv_cache import PagedCache
from security.channel.frame import SequenceStep, StepHeader

if TYPE_CHECKING:
    from runtime.stage.families import DecoderParts
    from runtime.stage.settings import StageSettings

__all__ = ["ShardingProbe"]

_ROWS = 8
_SEED = 0
# Of what the layer adds to its rows; a layer with a wrong part is off by about 1.
_TOLERANCE = 1e-3
# Of the rows themselves, in units of their rounding: sums of several ranks round elsewhere.
_ROUNDINGS = 4


class ShardingProbe:
    """Rows for the layers of one stage, the same on all ranks.

    Args:
        parts: of the model.
        settings: of the stage.
    """

    def __init__(self, parts: DecoderParts, settings: StageSettings) -> None:
        self._config = parts.config
        self._dtype = settings.torch_dtype
        generator = torch.Generator().manual_seed(_SEED)
        rows_TD = torch.randn(_ROWS, settings.hidden_size, generator=generator)
        self._rows_1TD = rows_TD.to(self._dtype)[None]
        self._header = StepHeader(0, (SequenceStep(0, 0, _ROWS, (0,), False),))
        layers = range(settings.first_layer, settings.last_layer)
        self._rotations = parts.rotations(layers)

    @torch.inference_mode()
    def output(self, layer: nn.Module, ranks: int) -> torch.Tensor:
        """What a layer that is spread over `ranks` makes of the rows [1, T, D]."""
        index = cast("int", layer.get_submodule("self_attn").layer_idx)
        head_size = cast("int", layer.get_submodule("self_attn").head_dim)
        cache = PagedCache(
            range(index, index + 1),
            blocks=1,
            block_size=_ROWS,
            heads=self._config.num_key_value_heads // ranks,
            head_size=head_size,
            dtype=self._dtype,
        )
        step = PagedStep(cache, self._header)
        rotations = self._rotations.at(self._rows_1TD, step.positions_1T)
        output_1TD: torch.Tensor = layer(
            self._rows_1TD.clone(),
            attention_mask=None,
            position_ids=step.positions_1T,
            position_embeddings=rotations[rotation_name(self._config, index)],
            paged_step=step,
        )
        return output_1TD

    def check(self, layer: nn.Module, found_1TD: torch.Tensor, expected_1TD: torch.Tensor) -> None:
        """Compares the output of a sharded layer with that of the whole one.

        Raises:
            UnsupportedModel: they differ by more than sums in another order explain.
        """
        found, expected = found_1TD.float(), expected_1TD.float()
        added = torch.linalg.vector_norm(expected - self._rows_1TD.float())
        rounding = _ROUNDINGS * torch.finfo(self._dtype).eps * torch.linalg.vector_norm(expected)
        difference = torch.linalg.vector_norm(found - expected)
        # Written so that a NaN is refused.
        if not bool(difference <= _TOLERANCE * added + rounding):
            raise UnsupportedModel(
                f"{type(layer).__name__}: expected the sharded layer to compute what the whole "
                "one computes, found another output; plan its stages with tensor parallelism 1"
            )
