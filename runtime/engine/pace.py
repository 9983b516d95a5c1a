"""How long steps take, measured, and how many prompt tokens a step may carry beside decodes.

A step that only decodes is bound by reading weights and cache; every row of a prompt adds
arithmetic. `StepPace` keeps from the engine's own steps the seconds of a step with so many decodes
and no prompt, which are medians of the last steps, so that a single slow one does not move them,
and what the chunks of the last steps with prompts added to that.

Rows are not equally dear: the first ones hide behind the reading of weights, and a larger chunk
does not (the roofline). So a chunk grows to no more than twice the largest one measured lately,
and the dearest of the last few says what a row costs. At the roof's knee the step of twice the
rows takes at most twice the time, whatever the machine.
"""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["LEAST_CHUNK", "StepPace"]

LEAST_CHUNK = 16
"""Prompt tokens that a step carries at least, where there are any: prompts always advance."""

_KEPT = 9
_CHUNKS_KEPT = 3
_MOST_GROWTH = 2
_ADDED_SHARE = 0.8
"""Of a step's usual time that prompts may add: what is hard to foresee has room below thrice."""
_REMEASURE_AFTER = 64


class StepPace:
    """The engine's speed as it was lately. Belongs to the engine's thread."""

    def __init__(self) -> None:
        # By the bit length of the number of decodes: a step of 20 says little about one of 3.
        self._decode_s: dict[int, deque[float]] = {}
        # Of the last steps with prompts: tokens of them, and the seconds that those added.
        self._chunks: deque[tuple[int, float]] = deque(maxlen=_CHUNKS_KEPT)
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
        usual = self.decode_s(decodes) if decodes else None
        added = seconds if usual is None else max(0.0, seconds - usual)
        self._chunks.append((prompt_tokens, added))

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
        """Prompt tokens that make a step of so many decodes take `_ADDED_SHARE` longer.

        At least LEAST_CHUNK. None where nothing is measured yet: then nothing is known to wait for.
        """
        usual = self.decode_s(decodes)
        if usual is None or not self._chunks:
            return None
        token_s = max(added / tokens for tokens, added in self._chunks)
        most = _MOST_GROWTH * max(tokens for tokens, _ in self._chunks)
        room = _ADDED_SHARE * usual
        fitting = most if token_s * most <= room else round(room / token_s)
        return max(LEAST_CHUNK, fitting)
