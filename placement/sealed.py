"""Which parts of a model lie encrypted in its checkpoint, as far as a plan has to know."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SealedParts"]


@dataclass(frozen=True, slots=True)
class SealedParts:
    """What the signed manifest shows of a checkpoint; by default that nothing is sealed.

    Attributes:
        layers: the sealed layers.
        embedding: whether the embedding is sealed.
        norm: whether the final norm is.
        head: whether what the head computes with is; the embedding, where they are tied.
        complete: whether no tensor of the checkpoint lies in the clear.
    """

    layers: frozenset[int] = frozenset()
    embedding: bool = False
    norm: bool = False
    head: bool = False
    complete: bool = False

    @property
    def any(self) -> bool:
        """Whether anything is sealed."""
        return bool(self.layers) or self.embedding or self.norm or self.head

    def read_by(self, first_layer: int, last_layer: int, layers: int) -> bool:
        """Whether a stage of layers [first, last) of so many opens a sealed part."""
        ends = (first_layer == 0 and self.embedding) or (
            last_layer == layers and (self.norm or self.head)
        )
        return ends or any(first_layer <= layer < last_layer for layer in self.layers)
