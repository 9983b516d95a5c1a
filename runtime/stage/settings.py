"""What a stage is told about itself; the numbers come from the signed plan template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = ["Progress", "StageSettings"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called while loading with (bytes read so far, bytes in all), both of the checkpoint."""

_DTYPES = ("float32", "bfloat16", "float16")
_WEIGHT_FORMATS = ("plain", "int8")
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class StageSettings:
    """One stage of a plan.

    Args:
        first_layer: first decoder layer of the stage.
        last_layer: one past its last decoder layer.
        layers: decoder layers of the whole model; the stage is the first if `first_layer` is 0
            and the last if `last_layer` is `layers`, and may be both.
        dtype: "float32", "bfloat16" or "float16": of weights, cache and hidden states.
        tp: tensor-parallel ranks, 1 for none.
        block_size: positions in a cache block.
        cache_blocks: cache blocks, named 0 to `cache_blocks` - 1 in block tables.
        max_context: positions of a sequence at most.
        hidden_size: width of the hidden states.
        threads: CPU threads of the stage, divided among its ranks.
        weight_format: of the layers' linears and the LM head: "plain" keeps them in `dtype`,
            "int8" as `runtime.stage.quantise` makes them, which only the native decoder computes.
        device: "cpu", "cuda", or "auto" for a GPU where the process has one. Not in the plan:
            which devices a process has is known where it runs.
    """

    first_layer: int
    last_layer: int
    layers: int
    dtype: str
    tp: int
    block_size: int
    cache_blocks: int
    max_context: int
    hidden_size: int
    threads: int
    weight_format: str = "plain"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {_DTYPES}, found {self.dtype!r}")
        if self.weight_format not in _WEIGHT_FORMATS:
            raise ValueError(
                f"weight_format: expected one of {_WEIGHT_FORMATS}, found {self.weight_format!r}"
            )
        if self.device not in _DEVICES:
            raise ValueError(f"device: expected one of {_DEVICES}, found {self.device!r}")
        if not 0 <= self.first_layer < self.last_layer <= self.layers:
            raise ValueError(
                f"layers: expected a non-empty range within 0 to {self.layers}, "
                f"found {self.first_layer} to {self.last_layer}"
            )
        for name in ("tp", "block_size", "cache_blocks", "max_context", "hidden_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")

    @property
    def is_first(self) -> bool:
        """The stage embeds token ids."""
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        """The stage has the final norm and the head, and samples."""
        return self.last_layer == self.layers

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        import torch

        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[self.dtype]

    def to_document(self) -> dict[str, int | str]:
        """As plain JSON values, for the job of a tensor-parallel rank."""
        return asdict(self)
