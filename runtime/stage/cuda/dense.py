"""Dense decoder layers on a device: few and large kernels, computed as `DenseLayer` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from runtime.stage.cuda.attention import AttentionForm, Backends
from runtime.stage.cuda.step import Group
from runtime.stage.dense_layer import DenseLayer, RmsNorm
from runtime.stage.kv_cache import PagedCache
from runtime.stage.rotations import Rotations

__all__ = ["DeviceLayer", "DeviceStep", "RotationTables"]


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What all layers of a step share.

    Attributes:
        places_T: int64, where keys and values go.
        groups: every row is in one.
        rotations: cosines and signed sines [T, 1, rotary size] by name, see `RotationTables`.
    """

    places_T: torch.Tensor
    groups: Sequence[Group]
    rotations: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class RotationTables:
    """Cosines and sines of all positions, on the device, in the dtype that the family rotates in.

    Rows are as in `Rotations`, long ones behind the others.

    The first half of the sines is negated: a rotation is then x * cosines + y * sines, with y being
    x with its halves exchanged.
    """

    def __init__(
        self, rotations: Rotations, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        computed = rotations.tables(rotations.rows(max_context), dtype)
        for name, (cosines, sines) in computed.items():
            first, second = sines.chunk(2, dim=-1)
            signed = torch.cat([-first, second], dim=-1)
            self._tables[name] = (cosines.to(device), signed.to(device))

    def at(self, rows_T: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and signed sines [T, 1, rotary size] of these rows of the tables."""
        return {
            name: (cosines[rows_T][:, None], sines[rows_T][:, None])
            for name, (cosines, sines) in self._tables.items()
        }


class _Norm:
    """An `RmsNorm` on the device."""

    def __init__(self, norm: RmsNorm, device: torch.device) -> None:
        self._width = norm.width
        self._epsilon = norm.epsilon
        # One kernel does it in the stage's own dtype. It rounds once, where the families that round
        # first do so twice.
        self._in_float32 = not norm.rounds_first
        weight = norm.weight.float() + norm.offset if self._in_float32 else norm.weight
        self._weight = weight.to(device)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        shape = states.shape
        # A norm over all heads is wider than one of them.
        states = states if shape[-1] == self._width else states.flatten(-2)
        given = states.float() if self._in_float32 else states
        normed = functional.rms_norm(given, (self._width,), self._weight, self._epsilon)
        return normed.to(states.dtype).view(shape)


class _Linear:
    """One or more linears that have the same inputs, as one."""

    def __init__(self, linears: Sequence[nn.Linear], device: torch.device) -> None:
        self._weight = _joined([linear.weight for linear in linears]).to(device)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = _joined(biases).to(device) if biases else None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self._weight, self._bias)


class DeviceLayer:
    """One layer's weights on the device.

    Args:
        layer: the description of a layer whose tensors are there; not needed afterwards.
        device: that computes.
    """

    def __init__(self, layer: DenseLayer, device: torch.device) -> None:
        self._index = layer.index
        self._heads, self._kv_heads, self._size = layer.heads, layer.kv_heads, layer.head_size
        self._qkv = _Linear(layer.qkv, device)
        self._output = _Linear((layer.output,), device)
        self._gate_up = _Linear(layer.gate_up, device)
        self._down = _Linear((layer.down,), device)
        self._before_attention = _norm(layer.before_attention, device)
        self._after_attention = _norm(layer.after_attention, device)
        self._before_mlp = _norm(layer.before_mlp, device)
        self._after_mlp = _norm(layer.after_mlp, device)
        self._query_norm = _norm(layer.query_norm, device)
        self._key_norm = _norm(layer.key_norm, device)
        self._gelu = layer.activation == "gelu_tanh"
        self._residual_multiplier = layer.residual_multiplier
        self._rotary, self._rotary_size = layer.rotary, layer.rotary_size
        self.form = AttentionForm(layer.scale, layer.soft_cap, layer.window)

    def forward(
        self, hidden_TD: torch.Tensor, step: DeviceStep, cache: PagedCache, backends: Backends
    ) -> torch.Tensor:
        """Hidden states [T, D] after the layer; writes the step's positions to the cache."""
        attended = self._attend(_normed(self._before_attention, hidden_TD), step, cache, backends)
        hidden_TD = self._added(hidden_TD, _normed(self._after_attention, self._output(attended)))
        gate_TI, up_TI = self._gate_up(_normed(self._before_mlp, hidden_TD)).chunk(2, dim=-1)
        gate_TI = (
            functional.gelu(gate_TI, approximate="tanh") if self._gelu else functional.silu(gate_TI)
        )
        return self._added(hidden_TD, _normed(self._after_mlp, self._down(gate_TI * up_TI)))

    def _attend(
        self, states_TD: torch.Tensor, step: DeviceStep, cache: PagedCache, backends: Backends
    ) -> torch.Tensor:
        heads_THE = self._qkv(states_TD).view(len(states_TD), -1, self._size)
        values_TKE = heads_THE[:, self._heads + self._kv_heads :]
        rotated_THE = heads_THE[:, : self._heads + self._kv_heads]
        if self._query_norm is not None and self._key_norm is not None:
            query_THE = self._query_norm(heads_THE[:, : self._heads])
            rotated_THE = torch.cat(
                [query_THE, self._key_norm(rotated_THE[:, self._heads :])], dim=1
            )
        rotated_THE = self._rotate(rotated_THE, step)
        query_THE, keys_TKE = rotated_THE[:, : self._heads], rotated_THE[:, self._heads :]
        cache.write(self._index, step.places_T, keys_TKE, values_TKE)
        keys_NPKE, values_NPKE = cache.blocks(self._index)
        if len(step.groups) == 1 and isinstance(step.groups[0].rows, slice):
            (group,) = step.groups
            backend = backends.decodes if group.most_rows == 1 else backends.rest
            output = backend.attend(query_THE, keys_NPKE, values_NPKE, group, self.form)
            return output.flatten(1)
        output_THE = torch.empty_like(query_THE, memory_format=torch.contiguous_format)
        for group in step.groups:
            backend = backends.decodes if group.most_rows == 1 else backends.rest
            output_THE[group.rows] = backend.attend(
                query_THE[group.rows], keys_NPKE, values_NPKE, group, self.form
            )
        return output_THE.flatten(1)

    def _rotate(self, states_THE: torch.Tensor, step: DeviceStep) -> torch.Tensor:
        size = self._rotary_size
        if size == 0:
            return states_THE
        cosines_T1R, sines_T1R = step.rotations[self._rotary]
        part_THR = states_THE[..., :size]
        rotated = torch.addcmul(
            part_THR * cosines_T1R, part_THR.roll(size // 2, dims=-1), sines_T1R
        ).to(states_THE.dtype)
        if size == self._size:
            return rotated
        return torch.cat([rotated, states_THE[..., size:]], dim=-1)

    def _added(self, hidden_TD: torch.Tensor, states_TD: torch.Tensor) -> torch.Tensor:
        return torch.add(hidden_TD, states_TD, alpha=self._residual_multiplier)


def _joined(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return parameters[0].detach() if len(parameters) == 1 else torch.cat(tuple(parameters))


def _norm(norm: RmsNorm | None, device: torch.device) -> _Norm | None:
    return None if norm is None else _Norm(norm, device)


def _normed(norm: _Norm | None, states_TD: torch.Tensor) -> torch.Tensor:
    return states_TD if norm is None else norm(states_TD)
