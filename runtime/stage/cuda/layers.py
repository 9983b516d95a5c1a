"""The layers of a stage on a GPU, from packed step to hidden states."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import nn

from runtime.stage.checkpoint import PartLoader, ProgressCount
from runtime.stage.cuda.attention import AttentionShape, choose_backends
from runtime.stage.cuda.dense import DeviceLayer, DeviceStep, RotationTables
from runtime.stage.cuda.graphs import open_capturer
from runtime.stage.cuda.step import Group, StepBuffer, StepPlan, plan_decodes, plan_rows
from runtime.stage.dense_layer import DenseLayer, describe_layer
from runtime.stage.kv_cache import PagedCache
from runtime.stage.settings import StageSettings
from security.channel.frame import StepHeader

__all__ = ["CudaLayers", "computes"]

# Rows of the steps that are recorded as graphs; a batch between two of them is padded.
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Block tables are padded to powers of two, from this many positions on.
_LEAST_POSITIONS = 256

Embed = Callable[[torch.Tensor], torch.Tensor]


def computes(weights: PartLoader, settings: StageSettings) -> bool:
    """Whether all layers of a stage are dense ones, which `CudaLayers` computes."""
    parts = weights.parts
    return settings.tp == 1 and all(
        describe_layer(parts.config, parts.part(parts.layer_name(index))) is not None
        for index in range(settings.first_layer, settings.last_layer)
    )


class CudaLayers:
    """Computes steps of single rows as graphs, others kernel by kernel.

    A graph is recorded when its batch and length of block tables are first met: some milliseconds,
    once. It replays one launch of all that a step is on the device, embedding included.

    Args:
        weights: of a stage that `computes`.
        settings: of the stage.
        progress: told what is read.
        device: that computes.
        embed: of the first stage: hidden states [T, D] of token ids [T] on the device.
    """

    def __init__(
        self,
        weights: PartLoader,
        settings: StageSettings,
        progress: ProgressCount,
        device: torch.device,
        embed: Embed | None,
    ) -> None:
        self._settings = settings
        self._device = device
        self._embed = embed
        parts = weights.parts
        indices = range(settings.first_layer, settings.last_layer)
        self._layers: list[DeviceLayer] = []
        described: DenseLayer | None = None
        for index in indices:
            name = parts.layer_name(index)
            module = weights.fill(name)
            described = describe_layer(parts.config, module)
            assert described is not None, "asked `computes`"
            self._layers.append(DeviceLayer(described, device))
            _let_go(module)
            progress.add(weights.bytes_of([name]))
        assert described is not None, "a stage has a layer"
        rotations = parts.rotations(indices)
        self._long_offset = rotations.long_offset
        self._rotations = RotationTables(
            rotations, settings.max_context, settings.torch_dtype, device
        )
        # The block behind the plan's is nobody's: padding is written to it.
        self._spare = settings.cache_blocks
        self._cache = PagedCache(
            indices,
            blocks=settings.cache_blocks + 1,
            block_size=settings.block_size,
            heads=described.kv_heads,
            head_size=described.head_size,
            dtype=settings.torch_dtype,
            device=device,
        )
        shape = AttentionShape(
            described.heads,
            described.kv_heads,
            described.head_size,
            settings.block_size,
            settings.torch_dtype,
        )
        self._backends = choose_backends([layer.form for layer in self._layers], shape, device)
        self._capturer = open_capturer(device)
        self._graphs: dict[tuple[int, int], Callable[[], torch.Tensor]] = {}
        self._recorded = self._buffer(
            self._ints_at_most(_BATCHES[-1], self._width(settings.max_context)), _BATCHES[-1]
        )
        self._any = self._buffer(0, 0)
        self._sampled_rows: torch.Tensor | None = None
        # What cannot be recorded here should show at start.
        self._decode(StepHeader(0, ()), None, None if embed is None else ())

    @property
    def attention(self) -> str:
        """What computes attention, for the log."""
        return self._backends.name

    @property
    def graphs(self) -> list[tuple[int, int]]:
        """Batch and width of block tables of each graph recorded so far."""
        return list(self._graphs)

    @property
    def sampled_rows(self) -> torch.Tensor | None:
        """The rows that the last step samples, on the device; None for all, in order."""
        return self._sampled_rows

    @torch.inference_mode()
    def forward(
        self,
        header: StepHeader,
        hidden_TD: torch.Tensor | None,
        token_ids: Sequence[int] | None,
    ) -> torch.Tensor:
        """Hidden states [T, D] after the layers, on the device, valid until the next step.

        Args:
            header: of the step.
            hidden_TD: what the stage before sent; None for the first stage.
            token_ids: within the vocabulary, for the first stage; None for the others.
        """
        if header.tokens == len(header.sequences) <= _BATCHES[-1]:
            return self._decode(header, hidden_TD, token_ids)
        plan = plan_rows(
            header,
            token_ids,
            block_size=self._settings.block_size,
            spare=self._spare,
            together=self._backends.together,
            long_offset=self._long_offset,
        )
        if self._bytes(len(plan.ints), plan.rows) > self._any.capacity:
            self._any = self._buffer(2 * len(plan.ints), 2 * plan.rows)
        ints, rows_TD = self._any.load(plan, hidden_TD)
        self._sampled_rows = None if plan.sampled is None else plan.sampled.of(ints)
        return self._compute(plan, ints, rows_TD)

    @torch.inference_mode()
    def reset(self) -> None:
        """Empties the cache."""
        self._cache.clear()

    def close(self) -> None:
        """Lets go of weights and graphs."""
        self._graphs.clear()
        self._layers.clear()

    @torch.inference_mode()
    def _decode(
        self,
        header: StepHeader,
        hidden_TD: torch.Tensor | None,
        token_ids: Sequence[int] | None,
    ) -> torch.Tensor:
        """A step of single rows, or of none, which is all padding."""
        sequences = header.sequences
        batch = _BATCHES[bisect_left(_BATCHES, len(sequences))]
        width = self._width(max((sequence.start + 1 for sequence in sequences), default=1))
        plan = plan_decodes(
            header,
            token_ids,
            batch=batch,
            width=width,
            block_size=self._settings.block_size,
            spare=self._spare,
            long_offset=self._long_offset,
        )
        if self._embed is None and hidden_TD is None:
            hidden_TD = torch.empty(0, self._settings.hidden_size, dtype=self._settings.torch_dtype)
        ints, rows_TD = self._recorded.load(plan, hidden_TD)
        self._sampled_rows = None if plan.sampled is None else plan.sampled.of(ints)
        key = (batch, width)
        if key not in self._graphs:
            # `ints` and `rows_TD` are where every step with this key is loaded.
            self._graphs[key] = self._capturer.capture(lambda: self._compute(plan, ints, rows_TD))
        return self._graphs[key]()[: len(sequences)]

    def _compute(
        self, plan: StepPlan, ints: torch.Tensor, hidden_TD: torch.Tensor | None
    ) -> torch.Tensor:
        """What happens on the device; the host looks at no value."""
        if self._embed is not None:
            assert plan.token_ids is not None, "the first stage gets token ids"
            hidden_TD = self._embed(plan.token_ids.of(ints))
        assert hidden_TD is not None, "other stages get hidden states"
        positions_T = plan.positions.of(ints).long()
        same = plan.turns == plan.positions
        turns_T = positions_T if same else plan.turns.of(ints).long()
        step = DeviceStep(
            plan.places.of(ints).long(),
            [Group.on_device(group, ints, positions_T) for group in plan.groups],
            self._rotations.at(turns_T),
        )
        for layer in self._layers:
            hidden_TD = layer.forward(hidden_TD, step, self._cache, self._backends)
        return hidden_TD

    def _width(self, positions: int) -> int:
        """Blocks of the tables of a graph for sequences of so many positions."""
        size = self._settings.block_size
        return -(-(1 << (max(positions, _LEAST_POSITIONS) - 1).bit_length()) // size)

    def _ints_at_most(self, batch: int, width: int) -> int:
        """Of a packed step of single rows."""
        plan = plan_decodes(
            StepHeader(0, ()),
            (),
            batch=batch,
            width=width,
            block_size=1,
            spare=0,
            long_offset=self._long_offset,
        )
        return len(plan.ints) + batch

    def _bytes(self, ints: int, rows: int) -> int:
        settings = self._settings
        return StepBuffer.bytes_for(ints, rows, settings.hidden_size, settings.torch_dtype)

    def _buffer(self, ints: int, rows: int) -> StepBuffer:
        settings = self._settings
        return StepBuffer(
            self._bytes(ints, rows), settings.hidden_size, settings.torch_dtype, self._device
        )


def _let_go(module: nn.Module) -> None:
    """Frees the tensors of a module that the model on meta keeps."""
    module.to_empty(device="meta")
