"""The layers of a stage on the native decoder."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn

from runtime.stage.checkpoint import ProgressCount, StageCheckpoint
from runtime.stage.dense_layer import DenseLayer, RmsNorm, describe_layer
from runtime.stage.errors import UnsupportedModel
from runtime.stage.native import library as native
from runtime.stage.native.library import Library, PackedWeight, Team, load_library
from runtime.stage.quantise import quantise
from runtime.stage.rotations import Rotations
from runtime.stage.settings import StageSettings
from security.channel.frame import StepHeader

__all__ = ["NativeLayers", "PackedLinear", "open_team"]

# Columns of a tile, positions of a cache group.
_LANES = 16


def open_team(checkpoint: StageCheckpoint, settings: StageSettings) -> Team | None:
    """A team for a stage that the native decoder can compute, None for any other.

    Raises:
        UnsupportedModel: no other way of computing has the stage's weight format.
    """
    library = load_library()
    obstacle = _obstacle(library, checkpoint, settings)
    if obstacle is None:
        assert library is not None, "no library is an obstacle"
        return Team(library, settings.threads)
    if settings.weight_format != "plain":
        raise UnsupportedModel(
            f"{settings.weight_format} weights: expected a stage that the native decoder computes, "
            f"found {obstacle}; plan with plain weights"
        )
    return None


def _obstacle(
    library: Library | None, checkpoint: StageCheckpoint, settings: StageSettings
) -> str | None:
    """Why the native decoder cannot compute a stage; None where it can."""
    if library is None:
        return "a processor without its instructions, or an installation without it"
    if settings.tp > 1:
        return f"{settings.tp} tensor-parallel ranks"
    if settings.torch_dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {settings.dtype}"
    if settings.torch_dtype == torch.bfloat16 and not library.bfloat16:
        return "a processor that does not multiply bfloat16"
    if settings.block_size % _LANES:
        return f"cache blocks of {settings.block_size} positions, no multiple of {_LANES}"
    parts = checkpoint.parts
    layers = [
        describe_layer(parts.config, parts.part(parts.layer_name(index)))
        for index in range(settings.first_layer, settings.last_layer)
    ]
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers):
        return f"layers of {parts.config.model_type} that are no dense decoder layers it knows"
    if not _fits(known):
        return f"layers of {parts.config.model_type} whose widths or kinds differ from its own"
    return None


def _fits(layers: Sequence[DenseLayer]) -> bool:
    """What the decoder keeps once for all layers is the same in all, and widths fill vectors."""
    first = layers[0]
    return all(_common(layer) == _common(first) for layer in layers) and all(
        width % _LANES == 0
        for width in (first.output.out_features, first.head_size, first.down.in_features)
    )


def _common(layer: DenseLayer) -> tuple[object, ...]:
    norms = _norms(layer)
    return (
        layer.heads,
        layer.kv_heads,
        layer.head_size,
        layer.activation,
        layer.scale,
        layer.soft_cap,
        layer.residual_multiplier,
        _wide_head_norm(layer),
        {norm.epsilon for norm in norms.values()},
    )


def _norms(layer: DenseLayer) -> dict[str, RmsNorm]:
    norms = {
        "before_attention": layer.before_attention,
        "query_norm": layer.query_norm,
        "key_norm": layer.key_norm,
        "after_attention": layer.after_attention,
        "before_mlp": layer.before_mlp,
        "after_mlp": layer.after_mlp,
    }
    return {place: norm for place, norm in norms.items() if norm is not None}


def _wide_head_norm(layer: DenseLayer) -> bool:
    return layer.query_norm is not None and layer.query_norm.width != layer.head_size


def _packed(team: Team, weight_OI: torch.Tensor, weight_format: str) -> PackedWeight:
    if weight_format == "int8":
        return team.library.pack_int8(team, *quantise(weight_OI), weight_OI.dtype)
    return team.library.pack(team, weight_OI)


class PackedLinear:
    """A linear without bias, stored as the decoder multiplies: an LM head, or a tied embedding.

    Args:
        team: computes it.
        weight_VD: not kept.
        weight_format: see `StageSettings`.
    """

    def __init__(self, team: Team, weight_VD: torch.Tensor, weight_format: str = "plain") -> None:
        self._team = team
        self._weight = _packed(team, weight_VD, weight_format)

    def __call__(self, rows_SD: torch.Tensor) -> torch.Tensor:
        """Products [S, V] in float32."""
        return self._team.library.project(self._team, self._weight, rows_SD)

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows [T, D] of a plain weight; `ids_T` is int64 and within it."""
        return self._team.library.unpack(self._weight, ids_T)


class NativeLayers:
    """`runtime.stage.layers.Layers` of layers that `open_team` has accepted.

    Args:
        checkpoint: of the model.
        settings: of the stage.
        progress: told what is read.
        team: computes; closed by its owner.
    """

    def __init__(
        self,
        checkpoint: StageCheckpoint,
        settings: StageSettings,
        progress: ProgressCount,
        team: Team,
    ) -> None:
        parts = checkpoint.parts
        self._team = team
        self._settings = settings
        self._used = False
        # Everything that the decoder has pointers into.
        self._weights: list[PackedWeight] = []
        self._kept: list[torch.Tensor] = []
        self._caches: list[torch.Tensor] = []
        indices = range(settings.first_layer, settings.last_layer)
        rotations = parts.rotations(indices)
        self._long_offset = rotations.long_offset
        self._tables = _RotationTables(rotations, settings.max_context)
        self._rotary: list[str] = []
        self._layers: list[native.Layer] = []
        self._stage = 0
        described: DenseLayer | None = None
        for index in indices:
            name = parts.layer_name(index)
            module = checkpoint.fill(name)
            described = describe_layer(parts.config, module)
            assert described is not None, "open_team has described it"
            self._layers.append(self._layer(described))
            self._rotary.append(described.rotary)
            _let_go(module)
            progress.add(checkpoint.bytes_of([name]))
        assert described is not None, "a stage has a layer"
        self._shape = self._shape_of(described)
        self._table_rows = 0

    @property
    def block_bytes(self) -> int:
        """See `Layers`."""
        return 2 * len(self._layers) * self._rows_bytes(self._settings.block_size)

    def open_cache(self, blocks: int) -> None:
        """See `Layers`."""
        shape = (blocks, self._rows_bytes(self._settings.block_size))
        for layer in self._layers:
            # Written at once: whoever measures what is left must not count it in.
            keys, values = (self._team.library.empty(shape, torch.uint8).zero_() for _ in range(2))
            self._caches += [keys, values]
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self._stage = self._team.library.new_stage(self._shape, self._layers)

    def _rows_bytes(self, positions: int) -> int:
        """Of the keys of so many positions in one layer, or of the values."""
        row: int = self._shape.key_heads * self._shape.head_size
        return positions * row * self._settings.torch_dtype.itemsize

    def forward(self, header: StepHeader, hidden_TD: torch.Tensor) -> torch.Tensor:
        """See `Layers`."""
        self._used = True
        sequences = header.sequences
        offsets = array("i", [self._long_offset * sequence.long for sequence in sequences])
        self._rotate_up_to(
            max(s.start + s.count + offset for s, offset in zip(sequences, offsets, strict=True))
        )
        counts = array("i", [sequence.count for sequence in sequences])
        starts = array("i", [sequence.start for sequence in sequences])
        tables, at = array("i"), 0
        for sequence in sequences:
            tables.append(at)
            at += len(sequence.blocks)
        blocks = array("i", chain.from_iterable(sequence.blocks for sequence in sequences))
        output_TD = hidden_TD.clone(memory_format=torch.contiguous_format)
        step = native.Step(
            len(sequences),
            len(output_TD),
            *(_address(values) for values in (starts, counts, tables, blocks, offsets)),
        )
        self._team.library.forward(self._stage, self._team, step, output_TD.data_ptr())
        return output_TD

    def reset(self) -> None:
        """See `Layers`."""
        if self._used:
            for cache in self._caches:
                cache.zero_()
        self._used = False

    def close(self) -> None:
        """See `Layers`."""
        if self._stage:
            self._team.library.free_stage(self._stage)
            self._stage = 0
        self._weights.clear()
        self._kept.clear()
        self._caches.clear()

    def _rotate_up_to(self, rows: int) -> None:
        if rows <= self._table_rows:
            return
        self._table_rows = self._tables.grow(rows)
        for layer, name in enumerate(self._rotary):
            cosines, sines = self._tables.tables[name]
            self._team.library.rotate_stage(
                self._stage, layer, cosines.data_ptr(), sines.data_ptr()
            )

    def _shape_of(self, layer: DenseLayer) -> native.Shape:
        return native.Shape(
            hidden=layer.output.out_features,
            heads=layer.heads,
            key_heads=layer.kv_heads,
            head_size=layer.head_size,
            intermediate=layer.down.in_features,
            block_size=self._settings.block_size,
            bfloat=self._settings.torch_dtype == torch.bfloat16,
            amx=self._team.library.amx and self._settings.torch_dtype == torch.bfloat16,
            wide_head_norm=_wide_head_norm(layer),
            gelu=layer.activation == "gelu_tanh",
            epsilon=next(iter(_norms(layer).values())).epsilon,
            scale=layer.scale,
            soft_cap=layer.soft_cap or 0.0,
            residual_multiplier=layer.residual_multiplier,
        )

    def _layer(self, layer: DenseLayer) -> native.Layer:
        gate_OI, up_OI = _halves(layer.gate_up, "weight")
        gate_bias_O, up_bias_O = _halves(layer.gate_up, "bias")
        norms = {
            place: self._keep(norm.weight.float() + norm.offset)
            for place, norm in _norms(layer).items()
        }
        return native.Layer(
            query_key_value=self._linear(_joined(layer.qkv, "weight"), _joined(layer.qkv, "bias")),
            attention_output=self._linear(layer.output.weight, layer.output.bias),
            gate_up=self._linear(
                _by_turns(gate_OI, up_OI),
                None if gate_bias_O is None else _by_turns(gate_bias_O, up_bias_O),
            ),
            down=self._linear(layer.down.weight, layer.down.bias),
            window=layer.window or 0,
            rotary_size=layer.rotary_size,
            **norms,
        )

    def _linear(self, weight_OI: torch.Tensor | None, bias_O: torch.Tensor | None) -> native.Linear:
        assert weight_OI is not None, "a linear has a weight"
        packed = _packed(self._team, weight_OI, self._settings.weight_format)
        self._weights.append(packed)
        return packed.linear(None if bias_O is None else self._keep(bias_O.float()))

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


class _RotationTables:
    """Cosines and sines [rows, rotary size / 2] by rotation; longer as positions are used.

    Rows are as in `Rotations`: they depend on the position, and on whether a row is long.
    """

    def __init__(self, rotations: Rotations, max_context: int) -> None:
        self.tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotations = rotations
        self._max_rows = rotations.rows(max_context)

    @torch.inference_mode()
    def grow(self, rows: int) -> int:
        """Sees that there are so many rows, or more; returns how many there are."""
        length = min(self._max_rows, max(512, 1 << (rows - 1).bit_length()))
        longer: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, pair in self._rotations.tables(length, torch.float32).items():
            cosines, sines = (
                table[:, : table.shape[-1] // 2].float().contiguous() for table in pair
            )
            longer[name] = (cosines, sines)
        # All or none: the decoder still points into the old ones where memory ran out above.
        self.tables = longer
        return length


def _joined(linears: Sequence[nn.Linear], name: str) -> torch.Tensor | None:
    """The same tensor of linears side by side; None where none has it."""
    tensors = [getattr(linear, name) for linear in linears]
    return None if tensors[0] is None else torch.cat(tensors)


def _halves(
    linears: Sequence[nn.Linear], name: str
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    joined = _joined(linears, name)
    if joined is None:
        return None, None
    gate, up = joined.chunk(2)
    return gate, up


def _by_turns(gate_O: torch.Tensor | None, up_O: torch.Tensor | None) -> torch.Tensor:
    """Sixteen rows of the gate, sixteen of what it gates, and so on: a pair of tiles holds both."""
    assert gate_O is not None and up_O is not None, "gate and up have the same tensors"
    pairs = [half.view(-1, _LANES, *half.shape[1:]) for half in (gate_O, up_O)]
    return torch.stack(pairs, dim=1).flatten(0, 2)


def _let_go(module: nn.Module) -> None:
    """Frees the tensors of a module that the model on meta keeps."""
    module.to_empty(device="meta")


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]
