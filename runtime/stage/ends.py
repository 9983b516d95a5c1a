"""What only the first and the last stage have: embedding, final norm, head and sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from runtime.stage.checkpoint import PartLoader, ProgressCount
from runtime.stage.errors import StepRefused
from runtime.stage.families import DecoderParts
from runtime.stage.native.library import Team
from runtime.stage.native.stack import PackedLinear
from runtime.stage.sampler import Draw, Sampler
from runtime.stage.settings import StageSettings
from security.channel.admission import Admission
from security.channel.frame import StepHeader, StepResult

__all__ = ["Ends"]

_CPU = torch.device("cpu")


class Ends:
    """The parts of the model outside its layers, as far as this stage has them.

    Where the head is tied and the stage is first and last, both are one tensor.

    Args:
        checkpoint: of the model.
        settings: of the stage.
        progress: told what is read.
        team: of the native decoder, which then multiplies by the head.
        device: that computes, the sampler's part included: the logits of one row are hundreds of
            kilobytes, what is drawn from them is one number.
    """

    def __init__(
        self,
        checkpoint: PartLoader,
        settings: StageSettings,
        progress: ProgressCount,
        team: Team | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self._parts = checkpoint.parts
        self._device = device
        self._embedding: nn.Module | None = None
        self._norm: nn.Module | None = None
        self._head: nn.Module | None = None
        self._sampler = Sampler()
        self._packed: PackedLinear | None = None
        # The head's weight, where the embedding has it too: each step's rows are taken from it.
        self._shared: PackedLinear | None = None
        self._vocabulary = int(checkpoint.parts.config.vocab_size)
        if settings.is_first:
            self._embedding = checkpoint.fill(DecoderParts.EMBEDDING).to(device)
            progress.add(checkpoint.bytes_of([DecoderParts.EMBEDDING]))
        if not settings.is_last:
            return
        self._norm = checkpoint.fill(DecoderParts.NORM).to(device)
        progress.add(checkpoint.bytes_of([DecoderParts.NORM]))
        head = self._embedding
        if not checkpoint.parts.tied or head is None:
            head = checkpoint.fill(DecoderParts.HEAD).to(device)
            progress.add(checkpoint.bytes_of([DecoderParts.HEAD]))
        if team is None or getattr(head, "bias", None) is not None:
            self._head = checkpoint.parts.part(DecoderParts.HEAD)
            self._head.weight = head.weight
            return
        self._packed = PackedLinear(team, head.get_parameter("weight"), settings.weight_format)
        if settings.weight_format != "plain" and head is self._embedding:
            # An embedding stays exact; its rows are not those that the head multiplies with.
            return
        head.register_parameter("weight", None)
        if isinstance(head, nn.Embedding):
            # What else an embedding does to its rows (Gemma scales them) is still its own.
            head.padding_idx = None
            self._shared = self._packed

    @staticmethod
    def parts_of(checkpoint: PartLoader, settings: StageSettings) -> list[str]:
        """The parts whose tensors this stage reads."""
        parts = [DecoderParts.EMBEDDING] if settings.is_first else []
        if settings.is_last:
            parts.append(DecoderParts.NORM)
            if not (checkpoint.parts.tied and settings.is_first):
                parts.append(DecoderParts.HEAD)
        return parts

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises StepRefused for an id outside the vocabulary."""
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocabulary:
            raise StepRefused(
                f"token ids: expected 0 to {self._vocabulary - 1}, found one outside; "
                "the tokenizer does not belong to this model"
            )

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Hidden states [T, D]. Raises StepRefused for an id outside the vocabulary."""
        self.check_ids(token_ids)
        return self.embed_ids(torch.tensor(list(token_ids), device=self._device))

    @torch.inference_mode()
    def embed_ids(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, D] of ids on the stage's device, within the vocabulary."""
        assert self._embedding is not None, "only the first stage embeds"
        if self._shared is not None:
            self._embedding.weight = nn.Parameter(self._shared.rows(ids_T), requires_grad=False)
            ids_T = torch.arange(len(ids_T))
        hidden_TD: torch.Tensor = self._embedding(ids_T)
        return self._parts.scale_embeddings(hidden_TD)

    @torch.inference_mode()
    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] in float32, as the model returns them; last stage only."""
        assert self._norm is not None, "only the last stage samples"
        normed_SD: torch.Tensor = self._norm(hidden_SD)
        if self._packed is not None:
            return self._parts.scale_logits(self._packed(normed_SD))
        assert self._head is not None, "the last stage has a head"
        logits_SV: torch.Tensor = self._head(normed_SD)
        return self._parts.scale_logits(logits_SV).float()

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Takes sequences into their slots; last stage only."""
        for admission in admissions:
            self._sampler.admit(admission)

    def reset(self) -> None:
        """Forgets the sequences in all slots."""
        self._sampler.reset()

    @torch.inference_mode()
    def sample(
        self, header: StepHeader, hidden_TD: torch.Tensor, rows_S: torch.Tensor | None = None
    ) -> StepResult:
        """One token id per sequence that is sampled, in the order of the header.

        Args:
            header: of the step.
            hidden_TD: of its rows.
            rows_S: those that are sampled, where the stage's device has their indices already.
        """
        rows: list[int] = []
        draws: list[Draw] = []
        row = -1
        for sequence in header.sequences:
            row += sequence.count
            if sequence.sampled:
                rows.append(row)
                draws.append(Draw(sequence.slot, sequence.start + sequence.count))
        if not rows:
            return StepResult(header.step, ())
        if rows_S is not None:
            hidden_SD = hidden_TD.index_select(0, rows_S)
        elif len(rows) == len(hidden_TD):
            hidden_SD = hidden_TD
        else:
            hidden_SD = hidden_TD[torch.tensor(rows, device=hidden_TD.device)]
        logits_SV = self.logits(hidden_SD)
        tokens, logprobs = self._sampler.sample(logits_SV, draws)
        asked = any(entry is not None for entry in logprobs)
        return StepResult(header.step, tuple(tokens), tuple(logprobs) if asked else ())
