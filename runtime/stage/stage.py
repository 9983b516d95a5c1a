"""One stage as the shard process sees it, with or without tensor parallelism behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from runtime.stage.checkpoint import ProgressCount, open_checkpoint
from runtime.stage.ends import Ends
from runtime.stage.errors import NonFinite, StepRefused
from runtime.stage.layers import Layers, LayerStack
from runtime.stage.memory import affordable_blocks
from runtime.stage.native.stack import NativeLayers, open_team
from runtime.stage.settings import Progress, StageSettings
from security.channel.admission import Admission
from security.channel.frame import StepHeader, StepResult

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
        checkpoint = open_checkpoint(files, settings)
        layer_names = [
            checkpoint.parts.layer_name(index)
            for index in range(settings.first_layer, settings.last_layer)
        ]
        count = ProgressCount(
            checkpoint.bytes_of([*Ends.parts_of(checkpoint, settings), *layer_names]), progress
        )
        self._team = open_team(checkpoint, settings)
        self._ends = Ends(checkpoint, settings, count, self._team)
        self._layers: Layers
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

    @property
    def backend(self) -> str:
        """What computes the layers, for the log: "native", "torch" or "tensor parallel"."""
        if self._team is not None:
            return "native"
        return "torch" if self._settings.tp == 1 else "tensor parallel"

    def forward(
        self,
        header: StepHeader,
        hidden_TD: torch.Tensor | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, D] after this stage's layers; of the last stage, before the norm.

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
            rows_TD = self._ends.embed(token_ids)
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
        else:
            rows_TD = hidden_TD
            if not bool(torch.isfinite(rows_TD).all()):
                raise NonFinite(
                    f"step {header.step}: the hidden states received hold a NaN or an infinity"
                )
        self._check_places(header)
        return self._layers.forward(header, rows_TD)

    @property
    def cache_blocks(self) -> int:
        """Cache blocks that this stage has memory for, at most the plan's."""
        return self._cache_blocks

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
            hidden_TD: what `forward` returned for it.

        Raises:
            NonFinite: the logits hold a NaN or an infinity.
            StepRefused: a sequence that was not admitted.
        """
        return self._ends.sample(header, hidden_TD)

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
