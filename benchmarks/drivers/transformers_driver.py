"""Puts `transformers.generate` under load: one static batch, greedy, as fast as it goes here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.drivers.protocol import Arguments, drive
from benchmarks.times import RequestTimes, TimedRequest


class _Clock(BaseStreamer):
    """Notes when `generate` has a token for every sequence of the batch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then once a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


class Transformers:
    """A model as `from_pretrained` gives it: SDPA, the default dynamic cache, not compiled."""

    def __init__(self, arguments: Arguments) -> None:
        torch.set_num_threads(arguments.threads)
        self._model = transformers.Qwen3ForCausalLM.from_pretrained(
            arguments.model, dtype=torch.bfloat16
        )

    async def run(self, requests: Sequence[TimedRequest]) -> list[RequestTimes]:
        """See `Engine`. Only a batch of equal requests that arrive at once is one call here."""
        shapes = {(request.at_s, len(request.prompt), request.tokens) for request in requests}
        if len(shapes) != 1:
            raise ValueError("transformers.generate: expected equal requests at one time")
        return await asyncio.to_thread(self._generate, requests)

    async def close(self) -> None:
        """See `Engine`."""

    def _generate(self, requests: Sequence[TimedRequest]) -> list[RequestTimes]:
        prompts = torch.tensor([request.prompt for request in requests])
        tokens = requests[0].tokens
        clock = _Clock()
        begin = time.perf_counter()
        with torch.inference_mode():
            # Its annotations say that no model has this method.
            output = self._model.generate(  # type: ignore[misc]
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=None,
                streamer=clock,
            )
        assert isinstance(output, torch.Tensor), "without scores the answer is token ids alone"
        found = output.shape[1] - prompts.shape[1]
        if found != tokens:
            raise ValueError(f"answer: expected {tokens} tokens, found {found}")
        times = tuple(at - begin for at in clock.times[1:])
        return [RequestTimes(0.0, times) for _ in requests]


async def start(arguments: Arguments) -> Transformers:
    """Loads the model."""
    return Transformers(arguments)


if __name__ == "__main__":
    drive(__doc__, start)
