"""The rotary embeddings of a stage's layers, computed anew from the configuration.

Transformers' own module for longrope takes the short or the long factors for a whole batch, by the
longest position in it; here each row has its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

__all__ = ["LONGROPE", "Rotations", "rotary_parameters"]

LONGROPE = "longrope"
_FIXED = "fixed"
"""A `rope_type` whose frequencies transformers leaves as they are."""

Table = tuple[torch.Tensor, torch.Tensor]


def rotary_parameters(config: PretrainedConfig) -> dict[str, Mapping[str, object]]:
    """The parameters of each rotary embedding: by layer type, or of the only one under ""."""
    parameters: Mapping[str, object] = config.rope_parameters or {}
    layer_types: list[str] = getattr(config, "layer_types", None) or []
    per_type = {name: parameters[name] for name in sorted(set(layer_types) & parameters.keys())}
    return {
        name: cast("Mapping[str, object]", rotary if isinstance(rotary, Mapping) else {})
        for name, rotary in (per_type or {"": parameters}).items()
    }


class Rotations:
    """Cosines and sines, by the names of `dense_layer.rotation_name`.

    In tables, the row of a position is the position; behind the rows up to the border come those of
    long rows, of which the row is the position plus `long_offset`.

    Args:
        rotary: the family's module; not to be used by others from then on.
        config: of the model.
        names: of the rotations that are needed.
        border: see `RotaryBorder.positions`; None for models without.
    """

    def __init__(
        self,
        rotary: nn.Module,
        config: PretrainedConfig,
        names: frozenset[str],
        border: int | None,
    ) -> None:
        self.long_offset = border or 0
        self._names = names
        self._short = rotary
        self._long: nn.Module | None = None
        if border is not None:
            self._long = copy.deepcopy(rotary)
            _fix(self._short, config, border)
            _fix(self._long, config, border + 1)

    def to(self, device: torch.device) -> None:
        """Moves them to the device that computes."""
        for rotary in (self._short, self._long):
            if rotary is not None:
                rotary.to(device)

    def at(
        self,
        hidden_1TD: torch.Tensor,
        positions_1T: torch.Tensor,
        long_1T: torch.Tensor | None = None,
    ) -> dict[str, Table]:
        """Cosines and sines [1, T, rotary size] of each rotation, in the dtype of `hidden_1TD`.

        Args:
            hidden_1TD: on the device that computes.
            positions_1T: of the rows.
            long_1T: which rows are long, as booleans; None for none.
        """
        short = self._computed(self._short, hidden_1TD, positions_1T)
        if long_1T is None:
            return short
        assert self._long is not None, "the stage refuses long rows of a model that has none"
        long = self._computed(self._long, hidden_1TD, positions_1T)
        return {
            name: _mixed(long_1T[..., None], long[name], of_short)
            for name, of_short in short.items()
        }

    def rows(self, max_context: int) -> int:
        """Rows of a table that holds every row of sequences of at most so many positions."""
        needs_long = self._long is not None and max_context > self.long_offset
        return max_context + self.long_offset * needs_long

    def tables(self, rows: int, dtype: torch.dtype) -> dict[str, Table]:
        """The first `rows` rows of tables of cosines and sines [rows, rotary size]."""
        like = torch.empty(1, dtype=dtype)
        if self._long is None or rows <= self.long_offset:
            parts = [self._computed(self._short, like, torch.arange(rows)[None])]
        else:
            parts = [
                self._computed(rotary, like, torch.arange(count)[None])
                for rotary, count in (
                    (self._short, self.long_offset),
                    (self._long, rows - self.long_offset),
                )
            ]
        return {
            name: (
                torch.cat([part[name][0][0] for part in parts]),
                torch.cat([part[name][1][0] for part in parts]),
            )
            for name in self._names
        }

    def _computed(
        self, rotary: nn.Module, hidden_1TD: torch.Tensor, positions_1T: torch.Tensor
    ) -> dict[str, Table]:
        return {
            name: rotary(hidden_1TD, positions_1T, **({"layer_type": name} if name else {}))
            for name in self._names
        }


def _mixed(long_1T1: torch.Tensor, of_long: Table, of_short: Table) -> Table:
    cosines, sines = (
        torch.where(long_1T1, long, short) for long, short in zip(of_long, of_short, strict=True)
    )
    return cosines, sines


def _fix(rotary: nn.Module, config: PretrainedConfig, length: int) -> None:
    """Gives a rotary module the frequencies for sequences of `length` positions, for good."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    of_each = rotary_parameters(config)
    for name, parameters in of_each.items():
        if parameters.get("rope_type") == LONGROPE:
            # What it returns besides, the factor on cosines and sines, is the same for all lengths.
            frequencies, _ = ROPE_INIT_FUNCTIONS[LONGROPE](
                config, None, seq_len=length, layer_type=name or None
            )
            setattr(rotary, f"{name}_inv_freq" if name else "inv_freq", frequencies)
    vars(rotary)["rope_type"] = _FIXED if "" in of_each else dict.fromkeys(of_each, _FIXED)
