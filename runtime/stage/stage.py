"""One stage as the shard process sees it, with or without tensor parallelism behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from runtime.stage.border import RotaryBorder
from runtime.stage.checkpoint import PartLoader, ProgressCount, open_checkpoint
from runtime.stage.cuda.layers import CudaLayers, computes
from runtime.stage.device import blocks_that_fit, compute_device
from runtime.stage.ends import Ends
from runtime.stage.errors import NonFinite, StepRefused, UnsupportedModel
from runtime.stage.layers import Layers, LayerStack
from runtime.stage.memory import affordable_blocks
from runtime.stage.native.library import Team
from runtime.stage.native.stack import NativeLayers, open_team
from runtime.stage.settings import Progress, StageSettings
from security.channel.admission import Admission
from security.channel.frame import SequenceStep, StepHeader, StepResult

if TYPE_CHECKING:
    from security.manifest import ModelFiles

__all__ = ["StageRunner", "StageSettings"]


class StageRunner:
    """Loads a stage and computes its steps. Calls come from one thread at a time.

    Construction loads: every tensor is verified by `files` before it is used, and nothing of other
    stages is read. With `settings.tp` above 1 the layers live in that many rank processes, which
    this object starts and ends.

    Args:
        files: the verified model directory.
        settings: the stage.
        progress: told (bytes read, bytes in all) while loading, from this thread.

    Raises:
        UnsupportedModel, CheckpointMismatch: the model cannot be computed as planned.
        RankFailed: a tensor-parallel rank did not come up.
        InsufficientMemory: too little memory is left for the cache.
        SecurityError: a file or tensor is not what the manifest says.
    """

    def __init__(
        self, files: ModelFiles, settings: StageSettings, progress: Progress | None = None
    ) -> None:
        self._settings = settings
        self._team: Team | None = None
        self._on_device = False
        self._layers: Layers | CudaLayers
        checkpoint = open_checkpoint(files, settings)
        self._border = checkpoint.parts.rotary_border
        self._device = compute_device(settings)
        count = _progress_count(checkpoint, settings, progress)
        if self._device.type != "cpu":
            self._load_on_device(checkpoint, count)
            return
        self._team = open_team(checkpoint, settings)
        self._ends = Ends(checkpoint, settings, count, self._team)
        if self._team is not None:
            self._layers = NativeLayers(checkpoint, settings, count, self._team)
        elif settings.tp == 1:
            self._layers = LayerStack(checkpoint, settings, count)
        else:
            from runtime.stage.tensor_parallel import TensorParallelGroup

            self._layers = TensorParallelGroup(files, checkpoint, settings, count)
        try:
            self._cache_blocks = affordable_blocks(settings, self._layers.block_bytes)
            self._layers.open_cache(self._cache_blocks)
        except BaseException:
            self.close()
            raise

    @classmethod
    def on_device(
        cls,
        weights: PartLoader,
        settings: StageSettings,
        device: torch.device,
        progress: Progress | None = None,
    ) -> StageRunner:
        """A stage as it computes on a GPU, whatever the device and wherever its weights are from.

        Args:
            weights: of the model; not necessarily of a checkpoint.
            settings: the stage; its `device` does not count.
            device: that computes.
            progress: as of the class.
        """
        runner = cls.__new__(cls)
        runner._settings = settings
        runner._border = weights.parts.rotary_border
        runner._team = None
        runner._device = device
        runner._load_on_device(weights, _progress_count(weights, settings, progress))
        return runner

    def _load_on_device(self, weights: PartLoader, count: ProgressCount) -> None:
        device = self._device
        blocks = blocks_that_fit(self._settings, weights.parts, device)
        settings = self._settings = replace(self._settings, cache_blocks=blocks)
        if settings.weight_format != "plain":
            raise UnsupportedModel(
                f"{settings.weight_format} weights: expected a stage that the native decoder "
                f"computes, found one on {device.type}; plan it with plain weights"
            )
        self._cache_blocks = blocks
        self._on_device = True
        self._ends = Ends(weights, settings, count, device=device)
        if computes(weights, settings):
            embed = self._ends.embed_ids if settings.is_first else None
            self._layers = CudaLayers(weights, settings, count, device, embed)
        else:
            self._layers = LayerStack(weights, settings, count, device=device)
            self._layers.open_cache(blocks)

    @property
    def backend(self) -> str:
        """What computes the layers, for the log."""
        if self._team is not None:
            return "native"
        if isinstance(self._layers, CudaLayers):
            return f"{self._device.type} graphs, attention {self._layers.attention}"
        if self._on_device:
            return f"torch on {self._device.type}"
        return "torch" if self._settings.tp == 1 else "tensor parallel"

    def forward(
        self,
        header: StepHeader,
        hidden_TD: torch.Tensor | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, D] after this stage's layers; of the last stage, before the norm.

        Those of the last stage stay on its device, and are valid until the next step there.

        Args:
            header: of the step, its block tables within the plan's limits.
            hidden_TD: what the stage before sent; None for the first stage. Not changed.
            token_ids: of all rows, for the first stage; None for the others.

        Raises:
            StepRefused: rows and header do not fit each other or this stage.
            NonFinite: the hidden states hold a NaN or an infinity.
            RankFailed: a rank ended or hung; the stage is of no further use.
        """
        expected = (header.tokens, self._settings.hidden_size)
        if self._settings.is_first:
            if token_ids is None or hidden_TD is not None or len(token_ids) != header.tokens:
                raise StepRefused(
                    f"step {header.step}: expected {header.tokens} token ids and no hidden states"
                )
            self._ends.check_ids(token_ids)
        elif (
            hidden_TD is None
            or token_ids is not None
            or tuple(hidden_TD.shape) != expected
            or hidden_TD.dtype != self._settings.torch_dtype
        ):
            found = None if hidden_TD is None else (tuple(hidden_TD.shape), hidden_TD.dtype)
            raise StepRefused(
                f"step {header.step}: expected hidden states {expected} of "
                f"{self._settings.dtype} and no token ids, found {found}"
            )
        elif not bool(torch.isfinite(hidden_TD).all()):
            raise NonFinite(
                f"step {header.step}: the hidden states received hold a NaN or an infinity"
            )
        self._check_places(header)
        if isinstance(self._layers, CudaLayers):
            output_TD = self._layers.forward(header, hidden_TD, token_ids)
        else:
            rows_TD = self._ends.embed(token_ids) if token_ids is not None else hidden_TD
            assert rows_TD is not None, "checked above: one of the two is there"
            output_TD = self._layers.forward(header, rows_TD)
        stays = self._settings.is_last or not self._on_device
        return output_TD if stays else _on_host(output_TD)

    @property
    def cache_blocks(self) -> int:
        """Cache blocks that this stage has memory for, at most the plan's."""
        return self._cache_blocks

    @property
    def rotary_border(self) -> RotaryBorder | None:
        """Where the model changes its rotations, None where it never does."""
        return self._border

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] in float32 of rows that `forward` returned; last stage only."""
        return self._ends.logits(hidden_SD)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Takes the sequences that a step admits, before that step is sampled; last stage only."""
        self._ends.admit(admissions)

    def sample(self, header: StepHeader, hidden_TD: torch.Tensor) -> StepResult:
        """Token ids, one per sequence that is sampled; last stage only.

        Args:
            header: of the step.
            hidden_TD: what `forward` returned for it, with no other step in between.

        Raises:
            NonFinite: the logits hold a NaN or an infinity.
            StepRefused: a sequence that was not admitted.
        """
        rows_S = self._layers.sampled_rows if isinstance(self._layers, CudaLayers) else None
        return self._ends.sample(header, hidden_TD, rows_S)

    def reset(self) -> None:
        """Empties the cache and forgets all sequences, for a new epoch."""
        self._layers.reset()
        self._ends.reset()

    def close(self) -> None:
        """Ends rank processes and lets go of the weights; may be called twice."""
        self._layers.close()
        if self._team is not None:
            self._team.close()

    def _check_places(self, header: StepHeader) -> None:
        # Frames from the network are checked when decoded; the head's own steps come here first.
        size = self._settings.block_size
        for sequence in header.sequences:
            end = sequence.start + sequence.count
            if sequence.count < 1 or end > self._settings.max_context:
                raise StepRefused(
                    f"step {header.step}: slot {sequence.slot}: expected rows up to position "
                    f"{self._settings.max_context}, found {sequence.count} up to {end}"
                )
            if len(sequence.blocks) * size < end or not all(
                0 <= block < self._cache_blocks for block in sequence.blocks
            ):
                raise StepRefused(
                    f"step {header.step}: slot {sequence.slot}: expected blocks below "
                    f"{self._cache_blocks} for {end} positions, "
                    f"found {len(sequence.blocks)} of {size}"
                )
            self._check_rotation(header.step, sequence)

    def _check_rotation(self, step: int, sequence: SequenceStep) -> None:
        """Long rows only where the stage has tables for them, and no others past the border."""
        border = self._border
        if border is None or self._settings.max_context <= border.positions:
            if sequence.long:
                found = "none" if border is None else f"one at {border.positions} positions"
                raise StepRefused(
                    f"step {step}: slot {sequence.slot}: long rows: expected a model with a "
                    f"longrope border below {self._settings.max_context} positions, found {found}"
                )
            return
        end = sequence.start + sequence.count
        if end > border.positions and not sequence.long:
            raise StepRefused(
                f"step {step}: slot {sequence.slot}: expected long rows past the longrope border "
                f"of {border.positions} positions, found others up to {end}"
            )


def _progress_count(
    weights: PartLoader, settings: StageSettings, progress: Progress | None
) -> ProgressCount:
    layers = [
        weights.parts.layer_name(index)
        for index in range(settings.first_layer, settings.last_layer)
    ]
    return ProgressCount(weights.bytes_of([*Ends.parts_of(weights, settings), *layers]), progress)


def _on_host(hidden_TD: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, for the link, whose thread reads it during the next step."""
    host_TD = torch.empty(
        hidden_TD.shape, dtype=hidden_TD.dtype, pin_memory=hidden_TD.device.type == "cuda"
    )
    return host_TD.copy_(hidden_TD)
