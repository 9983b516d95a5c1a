"""Fused projections taken apart, so that tensor parallelism can shard each of their parts.

A slice of a fused projection's outputs is mostly query or mostly value, not a slice of each; so
the parts become linears of their own, under the names that other families give them, and what
stands in the fused one's place joins their outputs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FUSED", "split_fused"]

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)
"""Names of fused projections in transformers, and of their parts."""


class _Joined(nn.Module):
    """The outputs of several linears of one module, side by side.

    Looks them up in every call, since sharding puts others in their place.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self._owner = (owner,)  # a plain tuple, or the owner would be a part of its own part
        self._names = names

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        owner = self._owner[0]
        return torch.cat([owner.get_submodule(name)(hidden) for name in self._names], dim=-1)


def split_fused(config: PretrainedConfig, layer: nn.Module) -> None:
    """Replaces the fused projections of a decoder layer by linears that share their storage."""
    for owner in [layer.get_submodule("self_attn"), layer.get_submodule("mlp")]:
        for name, parts in FUSED.items():
            fused = dict(owner.named_children()).get(name)
            if isinstance(fused, nn.Linear):
                for part, linear in zip(parts, _parts(config, name, fused), strict=True):
                    owner.add_module(part, linear)
                setattr(owner, name, _Joined(owner, parts))


def _parts(config: PretrainedConfig, name: str, fused: nn.Linear) -> list[nn.Linear]:
    if name == "gate_up_proj":
        sizes = [fused.out_features // 2] * 2
    else:
        groups = config.num_attention_heads + 2 * config.num_key_value_heads
        head_size = fused.out_features // groups
        sizes = [
            heads * head_size
            for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        ]
    weights = torch.split(fused.weight.detach(), sizes)
    biases = [None] * len(sizes) if fused.bias is None else torch.split(fused.bias.detach(), sizes)
    return [_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
