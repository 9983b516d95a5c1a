"""Loads the tensors of one stage, each through `ModelFiles`, which verifies it before we see it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from runtime.stage.errors import CheckpointMismatch, UnsupportedModel
from runtime.stage.families import DecoderParts, StoredPart, parse_config
from runtime.stage.settings import Progress, StageSettings

if TYPE_CHECKING:
    from security.manifest import ModelFiles

__all__ = ["PartLoader", "ProgressCount", "StageCheckpoint", "open_checkpoint"]

# dtype names of the safetensors format that hold plain numbers.
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
# Old exporters wrote the rotary frequencies out; they are computed from the configuration.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_SHOWN = 5


class PartLoader(Protocol):
    """Where the tensors of a model come from."""

    @property
    def parts(self) -> DecoderParts:
        """The model on meta."""

    def bytes_of(self, parts: Iterable[str]) -> int:
        """Bytes that `fill` reads for these parts."""

    def fill(self, part: str) -> nn.Module:
        """The part with its tensors, in the stage's dtype, ready to compute."""


class StageCheckpoint:
    """The tensors of one model and the means to fill modules with them.

    Args:
        files: the verified model directory.
        parts: the model on meta.
        settings: the stage.
    """

    def __init__(self, files: ModelFiles, parts: DecoderParts, settings: StageSettings) -> None:
        self.parts = parts
        self._files = files
        self._dtype = settings.torch_dtype
        self._shapes = parts.shapes()
        found = set(files.tensor_names())
        self._stored = {
            name: [StoredPart(name, shape)] if name in found else parts.stored_parts(name, shape)
            for name, shape in self._shapes.items()
        }
        self._check_names(found)

    def bytes_of(self, parts: Iterable[str]) -> int:
        """Bytes that `fill` reads for these parts, as stored."""
        total = 0
        for part in parts:
            for name in self._tensors_of(part):
                for stored in self._stored[name]:
                    total += self._files.tensor_info(stored.name).size
        return total

    def fill(self, part: str) -> nn.Module:
        """The part with its tensors, in the stage's dtype, ready to compute.

        Raises:
            CheckpointMismatch: a tensor has another shape than the configuration says.
            UnsupportedModel: a tensor is stored quantised.
        """
        prefix = f"{self._source(part)}."
        state = {name.removeprefix(prefix): self._read(name) for name in self._tensors_of(part)}
        module = self.parts.part(part)
        module.load_state_dict(state, strict=True, assign=True)
        _rebuild_buffers(module)
        module.requires_grad_(False)
        left = [name for name, tensor in _tensors(module) if tensor.is_meta]
        if left:
            raise UnsupportedModel(
                f"{part}: no checkpoint tensor gives a value to {left[:_SHOWN]}; the family keeps "
                "state that a stage does not rebuild"
            )
        return module

    def _tensors_of(self, part: str) -> list[str]:
        """The model's names of the tensors of one of its parts."""
        prefix = f"{self._source(part)}."
        return [name for name in self._shapes if name.startswith(prefix)]

    def _source(self, part: str) -> str:
        """The part under whose name the checkpoint stores this part's tensors."""
        tied = part == DecoderParts.HEAD and self.parts.tied
        return DecoderParts.EMBEDDING if tied else part

    def _read(self, name: str) -> torch.Tensor:
        parts = self._stored[name]
        if not parts[0].place:
            return self._read_part(parts[0])
        whole = torch.empty(self._shapes[name], dtype=self._dtype)
        for part in parts:
            whole[part.place] = self._read_part(part)
        return whole

    def _read_part(self, part: StoredPart) -> torch.Tensor:
        info = self._files.tensor_info(part.name)
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise UnsupportedModel(
                f"tensor {part.name}: expected a dtype of {sorted(_DTYPES)}, found {info.dtype}; "
                "quantised checkpoints are not supported"
            )
        if tuple(info.shape) != part.shape:
            raise CheckpointMismatch(
                f"tensor {part.name}: expected shape {list(part.shape)} by config.json, "
                f"found {list(info.shape)}"
            )
        # read_tensor hands over a buffer of its own, so the tensor may share it.
        stored = torch.frombuffer(self._files.read_tensor(part.name), dtype=dtype)
        return stored.view(part.shape).to(self._dtype)

    def _check_names(self, found: set[str]) -> None:
        expected = {part.name for parts in self._stored.values() for part in parts}
        head = f"{DecoderParts.HEAD}.weight"
        embedding = f"{DecoderParts.EMBEDDING}.weight"
        if self.parts.tied and {head, embedding} <= found:
            if self._files.tensor_info(head).sha256 != self._files.tensor_info(embedding).sha256:
                raise CheckpointMismatch(
                    f"tensors {head} and {embedding}: config.json ties them, "
                    "the checkpoint holds two different ones; set tie_word_embeddings to false"
                )
            found = found - {head}
        missing = sorted(expected - found)
        unexpected = sorted(name for name in found - expected if not _IGNORED.fullmatch(name))
        if missing:
            raise CheckpointMismatch(f"tensors missing from the checkpoint: {_some(missing)}")
        if unexpected:
            raise CheckpointMismatch(
                f"tensors in the checkpoint that config.json does not call for: {_some(unexpected)}"
            )


def open_checkpoint(files: ModelFiles, settings: StageSettings) -> StageCheckpoint:
    """Reads `config.json` and compares plan, configuration and tensor names.

    Raises:
        UnsupportedModel: see `parse_config`; or the plan's context is longer than the model's.
        CheckpointMismatch: layers, hidden size or tensor names disagree.
    """
    family, config = parse_config(files.read_file("config.json"))
    for name, expected, found in (
        ("num_hidden_layers", settings.layers, config.num_hidden_layers),
        ("hidden_size", settings.hidden_size, config.hidden_size),
    ):
        if expected != found:
            raise CheckpointMismatch(
                f"config.json: {name}: expected {expected} by the plan, found {found}"
            )
    if settings.max_context > config.max_position_embeddings:
        raise UnsupportedModel(
            f"max_context: expected at most the model's {config.max_position_embeddings} "
            f"positions, found {settings.max_context}; plan with a shorter context"
        )
    return StageCheckpoint(files, family.decoder_on_meta(config), settings)


class ProgressCount:
    """Adds up the bytes that were read and tells the listener."""

    def __init__(self, total_bytes: int, listener: Progress | None) -> None:
        self._done = 0
        self._total = total_bytes
        self._listener = listener
        self.add(0)

    def add(self, count: int) -> None:
        """Another `count` bytes were read."""
        self._done += count
        if self._listener is not None:
            self._listener(self._done, self._total)


def _rebuild_buffers(module: nn.Module) -> None:
    """Gives values to buffers that no checkpoint holds: the factor on Gemma's embeddings."""
    scale = getattr(module, "scalar_embed_scale", None)
    if isinstance(scale, float):
        module.embed_scale = torch.tensor(scale)


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
