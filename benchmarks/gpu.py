"""The engine and one stage on one GPU, without Ray, beside transformers' continuous batching.

The model has the shape of Llama 3.1 8B and random weights, which are made on the device: no
checkpoint is needed. Everything between the engine and the kernels is the product's own. The
device's memory is measured first, as a copy and as a sum: what a decode step of one sequence must
read, over the time that it takes, is a share of the latter.

The aims: at batch 1, 75 % of that bandwidth; at batch 64, twice the output tokens per second of
transformers' `generate_batch` in the same run.

Not yet run on a GPU: so far this script, and the back-end that it measures, have run on CPUs only
(`--device cpu --tiny`, which the tests do), where its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from benchmarks.drivers.engine_driver import LocalEngine
from benchmarks.options import json_path, prompts
from benchmarks.planned import Size, plan_one_stage
from benchmarks.report import FIGURE_COLUMNS, RESULTS, figure_cells, print_table, write_json
from benchmarks.times import Figures, burst, figures, median
from placement.plan import PlanTemplate
from runtime.shard.shard import stage_settings
from runtime.stage.families import DecoderParts, parse_config
from runtime.stage.stage import StageRunner
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import SequenceStep, StepHeader

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput

__all__ = ["RandomWeights", "main"]

_LLAMA_8B: dict[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_STANDARD_DEVIATION = 0.02
_GREEDY = SamplingParameters(temperature=0.0, top_p=1.0, top_k=0, seed=0)
# Of the buffers that memory is measured with: far beyond every cache.
_BANDWIDTH_BYTES = 4 << 30
_TINY_BANDWIDTH_BYTES = 16 << 20
_REPEATS = 10


class RandomWeights:
    """Parts of a model with random weights, made on the device. A `PartLoader`."""

    def __init__(self, config: dict[str, object], dtype: torch.dtype, device: torch.device) -> None:
        family, parsed = parse_config(json.dumps(config).encode())
        self.parts: DecoderParts = family.decoder_on_meta(parsed)
        self._dtype = dtype
        self._device = device

    def bytes_of(self, parts: Iterable[str]) -> int:
        """As many as the parts' tensors have."""
        return sum(
            tensor.numel() * self._dtype.itemsize
            for part in parts
            for tensor in self.parts.part(part).parameters()
        )

    def fill(self, part: str) -> nn.Module:
        """The part; its norms are ones."""
        module = self.parts.part(part).to(self._dtype).to_empty(device=self._device)
        for tensor in module.parameters():
            tensor.requires_grad_(False)
            if tensor.dim() == 1:
                tensor.fill_(1.0)
            else:
                tensor.normal_(std=_STANDARD_DEVIATION)
        return module


class Clock:
    """Times work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def seconds(self, work: Callable[[], object], repeats: int = _REPEATS) -> float:
        """Median seconds of a run, after one that does not count."""
        work()
        times = []
        for _ in range(repeats):
            self._wait()
            begin = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def bandwidth(device: torch.device, size: int, clock: Clock) -> dict[str, float]:
    """Bytes a second: of a copy, read and written ones, and of a sum, which only reads."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return {
        "copy": 2 * size / clock.seconds(lambda: target.copy_(source)),
        "read": size / clock.seconds(source.sum),
    }


class Measured:
    """One stage with all layers on the device, and what is measured of it."""

    def __init__(
        self, config: dict[str, object], size: Size, device: torch.device, clock: Clock
    ) -> None:
        self.template: PlanTemplate = plan_one_stage(config, size)
        settings = stage_settings(self.template, self.template.roles[0], torch.get_num_threads())
        weights = RandomWeights(config, settings.torch_dtype, device)
        layers = [weights.parts.layer_name(index) for index in range(settings.layers)]
        # Of the embedding a step reads its rows only.
        self.read_bytes = weights.bytes_of([*layers, DecoderParts.NORM, DecoderParts.HEAD])
        parsed = weights.parts.config
        self.position_bytes = (
            2 * settings.layers * parsed.num_key_value_heads * parsed.head_dim
        ) * settings.torch_dtype.itemsize
        self.stage = StageRunner.on_device(weights, settings, device)
        self._clock = clock

    def decode_s(self, batch: int, position: int) -> float:
        """Seconds of a step of `batch` sequences, sampled, without an engine."""
        header = self._header(batch, position, 1)
        self.stage.admit([Admission(slot, _GREEDY, position) for slot in range(batch)])
        ids = [3] * batch

        def step() -> None:
            self.stage.sample(header, self.stage.forward(header, token_ids=ids))

        seconds = self._clock.seconds(step)
        self.stage.reset()
        return seconds

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a step that is one prompt's first `tokens`."""
        header = self._header(1, 0, tokens)
        seconds = self._clock.seconds(
            lambda: self.stage.forward(header, token_ids=[3] * tokens), repeats=3
        )
        self.stage.reset()
        return seconds

    def _header(self, batch: int, start: int, count: int) -> StepHeader:
        blocks = -(-(start + count) // self.template.block_size)
        return StepHeader(
            0,
            tuple(
                SequenceStep(
                    slot, start, count, tuple(range(slot * blocks, (slot + 1) * blocks)), True
                )
                for slot in range(batch)
            ),
        )


async def serve(engine: LocalEngine, load: Load) -> list[Figures]:
    """Figures of each run, after one that does not count."""
    found = [
        figures(await engine.run(burst(load.prompts(run), load.output)))
        for run in range(load.runs + 1)
    ]
    return found[1:]


class Load:
    """So many requests at once."""

    def __init__(self, arguments: argparse.Namespace, batch: int, vocabulary: int) -> None:
        self.batch = batch
        self.input: int = arguments.input
        self.output: int = arguments.output
        self.runs: int = arguments.runs
        self._vocabulary = vocabulary

    def prompts(self, run: int) -> list[tuple[int, ...]]:
        """Other ones in every run, the same for everybody."""
        return prompts(self.batch, self.input, self._vocabulary, seed=1000 * run + self.batch)


def transformers_figures(
    config: dict[str, object], load: Load, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Output tokens a second of `generate_batch` in each run, after one that does not count."""
    import transformers

    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
    torch.set_default_dtype(torch.float32)
    # On a GPU it sizes its cache itself; of a host's memory it would take nearly all.
    batching = transformers.ContinuousBatchingConfig()
    if device.type != "cuda":
        batching.num_blocks, batching.max_batch_tokens = 4, 256
    generation = transformers.GenerationConfig.from_dict(
        {"max_new_tokens": load.output, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    )

    def speed(run: int) -> float:
        """From the first request's submission to the last token."""
        outputs: dict[str, GenerationOutput] = model.generate_batch(
            [list(prompt) for prompt in load.prompts(run)],
            generation_config=generation,
            continuous_batching_config=batching,
            record_timestamps=True,
            # What it sets up counts in the first run only.
            persistent_manager=True,
        )
        found = list(outputs.values())
        tokens = sum(len(output.generated_tokens) for output in found)
        if tokens != load.batch * load.output:
            raise ValueError(f"answer: expected {load.batch * load.output} tokens, found {tokens}")
        begin = min(output.created_time for output in found)
        return tokens / (max((output.timestamps or [begin])[-1] for output in found) - begin)

    return [speed(run) for run in range(load.runs + 1)][1:]


def main() -> None:
    """Measures and reports."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device: expected a CUDA GPU, found none that torch can use")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"device: {name}")
    clock = Clock(device)
    memory = bandwidth(device, _TINY_BANDWIDTH_BYTES if arguments.tiny else _BANDWIDTH_BYTES, clock)
    print_table(
        "Memory", ("", "GB/s"), [(what, f"{rate / 1e9:.0f}") for what, rate in memory.items()]
    )
    config = {**_LLAMA_8B, **(_TINY if arguments.tiny else {})}
    loads = [
        Load(arguments, batch, cast("int", config["vocab_size"])) for batch in arguments.concurrency
    ]
    context = -(-max(arguments.input + arguments.output, arguments.prefill) // 128) * 128
    size = Size(context=context, sequences=max(arguments.concurrency), dtype=arguments.dtype)
    measured = Measured(config, size, device, clock)
    backend = measured.stage.backend
    print(f"stage: {backend}")
    prefill = arguments.prefill / measured.prefill_s(arguments.prefill)
    middle = arguments.input + arguments.output // 2
    steps = {load.batch: measured.decode_s(load.batch, middle) for load in loads}
    runs = asyncio.run(_engine_runs(measured, loads))
    results = []
    for load in loads:
        figure = median(runs[load.batch])
        read = measured.read_bytes + load.batch * middle * measured.position_bytes
        results.append(
            {
                "batch": load.batch,
                "median": figure.to_document(),
                "runs": [run.to_document() for run in runs[load.batch]],
                "step_s": steps[load.batch],
                "read_bytes": read,
                "share_of_bandwidth": read / figure.token_mean_s / memory["read"],
                "share_of_bandwidth_of_step": read / steps[load.batch] / memory["read"],
            }
        )
    most = loads[-1]
    ours = median(runs[most.batch]).tokens_per_second
    position_bytes = measured.position_bytes
    # Its weights take the place of ours.
    del measured
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    theirs = transformers_figures(config, most, getattr(torch, arguments.dtype), device)
    print_table(
        f"Engine, {arguments.input} tokens in, {arguments.output} out, median of {arguments.runs}",
        ("requests", *FIGURE_COLUMNS, "step s", "of bandwidth", "step alone"),
        [
            (
                str(load.batch),
                *figure_cells(median(runs[load.batch])),
                f"{result['step_s']:.4f}",
                f"{result['share_of_bandwidth']:.2f}",
                f"{result['share_of_bandwidth_of_step']:.2f}",
            )
            for load, result in zip(loads, results, strict=True)
        ],
    )
    ratio = ours / statistics.median(theirs)
    print(f"\nprefill of {arguments.prefill} tokens: {prefill:.0f} tokens/s")
    print(
        f"transformers continuous batching, {most.batch} requests: "
        f"{statistics.median(theirs):.1f} tokens/s; ours is {ratio:.2f} times that"
    )
    write_json(
        json_path(arguments),
        {
            "device": name,
            "backend": backend,
            "dtype": arguments.dtype,
            "input_tokens": arguments.input,
            "output_tokens": arguments.output,
            "bandwidth_bytes_per_second": memory,
            "cache_bytes_per_position": position_bytes,
            "prefill": {"tokens": arguments.prefill, "tokens_per_second": prefill},
            "results": results,
            "transformers": {
                "batch": most.batch,
                "tokens_per_second": statistics.median(theirs),
                "runs": theirs,
            },
            "ratio_to_transformers": ratio,
        },
    )


async def _engine_runs(measured: Measured, loads: Sequence[Load]) -> dict[int, list[Figures]]:
    engine = LocalEngine(measured.template, measured.stage)
    try:
        return {load.batch: await serve(engine, load) for load in loads}
    finally:
        await engine.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--input", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="output tokens")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt alone")
    parser.add_argument("--runs", type=int, default=3, help="the median is reported")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
