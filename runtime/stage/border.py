"""Where a longrope model changes its rotations."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RotaryBorder"]


@dataclass(frozen=True, slots=True)
class RotaryBorder:
    """Which rows of a longrope model (arXiv 2402.13753) are long, as `generate` has it.

    *Long* rows are rotated with the long factors, all others with the short ones. A prompt of more
    positions than the border is long from its first row on. What becomes of an output that grows
    past the border differs among families.

    Attributes:
        positions: of the longest sequence without long rows.
        recomputes: a sequence that has grown past the border is computed anew, all of it long
            (`Phi3ForCausalLM.prepare_inputs_for_generation`); it has no row in common with the
            shorter one. Otherwise what is computed stays, and rows past the border are long.
    """

    positions: int
    recomputes: bool

    def __post_init__(self) -> None:
        if self.positions < 1:
            raise ValueError(f"positions: expected at least 1, found {self.positions}")

    def makes_long(self, prompt: int, length: int) -> bool:
        """Whether all rows of a sequence are long, given the positions of its prompt and of it."""
        return (length if self.recomputes else prompt) > self.positions
