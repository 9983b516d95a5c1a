"""Puts vLLM under load: its asynchronous engine, as its server uses it, without HTTP."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks.drivers.protocol import Arguments, drive, replay
from benchmarks.times import RequestTimes, TimedRequest


class VLLM:
    """vLLM with the settings at which it is fastest here; see `benchmarks.peers`."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    async def run(self, requests: Sequence[TimedRequest]) -> list[RequestTimes]:
        """See `Engine`."""
        return await replay(self._generate, requests)

    async def close(self) -> None:
        """See `Engine`."""
        self._engine.shutdown()

    async def _generate(self, prompt: Sequence[int], tokens: int) -> AsyncIterator[int]:
        wanted = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        outputs = self._engine.generate(
            {"prompt_token_ids": list(prompt)}, wanted, f"request-{next(self._numbers)}"
        )
        async for output in outputs:
            yield len(output.outputs[0].token_ids)


async def start(arguments: Arguments) -> VLLM:
    """Loads the model."""
    return VLLM(
        AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(arguments.model),
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=arguments.context,
                max_num_seqs=arguments.sequences,
                enable_prefix_caching=False,
            )
        )
    )


if __name__ == "__main__":
    drive(__doc__, start)
