"""How long steps take, measured, and how many prompt tokens a step may carry beside decodes.

A step that only decodes is bound by reading weights and cache; every row of a prompt adds
arithmetic. `StepPace` keeps two numbers from the engine's own steps: the seconds of a step with so
many decodes and no prompt, and the seconds that a prompt token adds. Both are medians of the last
steps, which a single slow one does not move.

The cost of a prompt token is never taken to be less than its share of the step: where the step was
still bound by reading weights, the rows looked nearly free, and a larger chunk would not be.
"""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["LEAST_CHUNK", "StepPace"]

LEAST_CHUNK = 16
"""Prompt tokens that a step carries at least, where there are any: prompts always advance."""

_KEPT = 9
_REMEASURE_AFTER = 64


class StepPace:
    """The engine's speed as it was lately. Belongs to the engine's thread."""

    def __init__(self) -> None:
        # By the bit length of the number of decodes: a step of 20 says little about one of 3.
        self._decode_s: dict[int, deque[float]] = {}
        self._token_s: deque[float] = deque(maxlen=_KEPT)
        self._steps = 0
        self._measured_at: dict[int, int] = {}

    def record(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Takes one step: its decodes, its prompt tokens, and for how long it kept the stages."""
        if seconds <= 0:
            return
        if prompt_tokens == 0:
            size = decodes.bit_length()
            self._decode_s.setdefault(size, deque(maxlen=_KEPT)).append(seconds)
            return
        share = seconds / (decodes + prompt_tokens)
        usual = self.decode_s(decodes) if decodes else None
        added = share if usual is None else (seconds - usual) / prompt_tokens
        self._token_s.append(max(share, added))

    def decode_s(self, decodes: int) -> float | None:
        """Seconds of a step with so many decodes and no prompt; None where none was measured."""
        known = self._decode_s.get(decodes.bit_length())
        return median(known) if known else None

    def wants_decodes_alone(self, decodes: int) -> bool:
        """Whether the next step should carry these decodes only, to know how long that takes.

        True now and then while prompts never let up, and the first time that so many decode.
        Called once for each step that could carry both.
        """
        self._steps += 1
        size = decodes.bit_length()
        last = self._measured_at.get(size)
        if last is not None and self._steps - last < _REMEASURE_AFTER:
            return False
        self._measured_at[size] = self._steps
        return True

    def prompt_tokens(self, decodes: int) -> int | None:
        """Prompt tokens that make a step of so many decodes take twice as long.

        At least LEAST_CHUNK. None where nothing is measured yet: then nothing is known to wait for.
        """
        usual = self.decode_s(decodes)
        if usual is None or not self._token_s:
            return None
        return max(LEAST_CHUNK, int(usual / median(self._token_s)))
