"""Longrope beyond its border: each sequence is rotated as `generate` rotates it alone."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import transformers
from checkpoints import Oracle, write_checkpoint
from stage_chain import Chain, generate, prompts_of, step
from stage_models import settings
from stage_variants import VARIANTS

from runtime.stage.border import RotaryBorder
from runtime.stage.checkpoint import open_checkpoint
from runtime.stage.errors import StepRefused, UnsupportedModel
from runtime.stage.families import FAMILIES
from runtime.stage.native.library import load_library
from runtime.stage.stage import StageRunner
from security.channel.frame import SequenceStep, StepHeader
from security.manifest import ModelFiles, build_manifest

BORDER = 24
ORIGINAL = "original_max_position_embeddings"
# Within the border, on it, one past it, and so long that a chunk ends before it.
LENGTHS = (1, 13, 23, 24, 25, 50, 20, 37)
TOKENS = 30
CPU = torch.device("cpu")


def longrope(pairs: int, **more: object) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [4.0 + 0.6 * pair for pair in range(pairs)],
        ORIGINAL: BORDER,
        "factor": 2.0,
        **more,
    }


def changed(variant: str) -> dict[str, object]:
    _, changes = VARIANTS[variant]
    rotary = {**cast("dict[str, object]", changes["rope_parameters"]), ORIGINAL: BORDER}
    outside = {ORIGINAL: BORDER} if variant == "longrope" else {}
    return {**changes, "rope_parameters": rotary, **outside}


DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "phi3": ("phi3", changed("longrope")),
    "llama": ("llama", changed("longrope-llama")),
    # A rotary embedding per layer type, one of them longrope.
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 32,
            "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": longrope(16)},
        },
    ),
    # Layers that transformers computes.
    "mixtral": ("mixtral", {"head_dim": 16, "rope_parameters": longrope(8)}),
}
BACKENDS = [
    ("torch", "phi3"),
    ("torch", "llama"),
    ("torch", "gemma3_text"),
    ("torch", "mixtral"),
    ("native", "phi3"),
    ("native", "llama"),
    ("native", "gemma3_text"),
    ("device", "phi3"),
    ("device", "llama"),
    ("device", "gemma3_text"),
    ("device", "mixtral"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directories: dict[str, Path] = {}

    def write(model: str) -> Path:
        if model not in directories:
            family, changes = MODELS[model]
            directories[model] = tmp_path_factory.mktemp(model)
            write_checkpoint(family, directories[model], seed=3, **changes)
        return directories[model]

    return write


@pytest.fixture(scope="module")
def expected(written: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    found: dict[str, list[list[int]]] = {}

    def generate_with_transformers(model: str) -> list[list[int]]:
        if model not in found:
            oracle = Oracle(written(model))
            found[model] = [
                oracle.greedy(prompt, TOKENS, ignore_end=True) for prompt in prompts_of(LENGTHS)
            ]
        return found[model]

    return generate_with_transformers


@pytest.fixture
def opened(
    written: Callable[[str], Path], open_files: Callable[[Path], ModelFiles]
) -> Iterator[Callable[..., list[StageRunner]]]:
    stages: list[StageRunner] = []

    def open_(
        model: str, backend: str, cuts: tuple[int, ...] = (0, 6), **changes: object
    ) -> list[StageRunner]:
        files = open_files(written(model))
        size = 16 if backend == "native" else 4
        before = len(stages)
        for first, last in itertools.pairwise(cuts):
            wanted = settings(first, last, block_size=size, **changes)
            if backend == "device":
                stage = StageRunner.on_device(open_checkpoint(files, wanted), wanted, CPU)
            else:
                stage = StageRunner(files, wanted)
            stages.append(stage)
        return stages[before:]

    yield open_
    for stage in stages:
        stage.close()


def border_of(stages: list[StageRunner]) -> RotaryBorder:
    border = stages[0].rotary_border
    assert border is not None
    return border


def tokens_of(stages: list[StageRunner], chunk: int, border: RotaryBorder) -> list[list[int]]:
    size = stages[0]._settings.block_size
    return generate(
        Chain(stages),
        prompts_of(LENGTHS),
        TOKENS,
        chunk=chunk,
        block_size=size,
        stop=-1,
        border=border,
    )


@pytest.mark.parametrize(
    ("cuts", "chunk"),
    [
        pytest.param((0, 6), 200, id="one"),
        pytest.param((0, 1, 4, 6), 7, id="three"),
        pytest.param(tuple(range(7)), 7, id="everywhere", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("backend", "model"), BACKENDS)
def test_tokens_equal_generate(
    backend: str,
    model: str,
    cuts: tuple[int, ...],
    chunk: int,
    opened: Callable[..., list[StageRunner]],
    expected: Callable[[str], list[list[int]]],
) -> None:
    if backend == "native" and load_library() is None:
        pytest.skip("this processor has no AVX-512, or no compiler was installed")
    stages = opened(model, backend, cuts)
    dense = model != "mixtral"
    names = {"torch": "torch", "native": "native", "device": "torch on cpu"}
    named = "cpu graphs, attention gathered" if backend == "device" and dense else names[backend]
    assert {stage.backend for stage in stages} == {named}
    assert border_of(stages) == RotaryBorder(BORDER, recomputes=model == "phi3")
    assert tokens_of(stages, chunk, border_of(stages)) == expected(model)


@pytest.mark.parametrize("model", ["phi3", "llama"])
def test_the_other_rule_gives_other_tokens(
    model: str,
    opened: Callable[..., list[StageRunner]],
    expected: Callable[[str], list[list[int]]],
) -> None:
    stages = opened(model, "torch")
    border = border_of(stages)
    found = tokens_of(stages, 7, replace(border, recomputes=not border.recomputes))
    same = [ours == theirs for ours, theirs in zip(found, expected(model), strict=True)]
    crossing = [length <= BORDER for length in LENGTHS]
    assert not any(same[index] for index, crosses in enumerate(crossing) if crosses)
    assert all(same[index] for index, crosses in enumerate(crossing) if not crosses)


def test_tensor_parallel_ranks(
    opened: Callable[..., list[StageRunner]], expected: Callable[[str], list[list[int]]]
) -> None:
    for model in ("phi3", "llama"):
        (stage,) = opened(model, "torch", tp=2)
        assert stage.backend == "tensor parallel"
        assert tokens_of([stage], 7, border_of([stage])) == expected(model)
        stage.close()


@pytest.mark.parametrize(("backend", "model"), BACKENDS)
@torch.inference_mode()
def test_logits_are_the_models_whoever_else_is_in_the_step(
    backend: str,
    model: str,
    opened: Callable[..., list[StageRunner]],
    written: Callable[[str], Path],
) -> None:
    if backend == "native" and load_library() is None:
        pytest.skip("this processor has no AVX-512, or no compiler was installed")
    whole = transformers.AutoModelForCausalLM.from_pretrained(written(model), dtype=torch.float32)
    prompts = prompts_of((BORDER, BORDER + 1, 40))
    (stage,) = opened(model, backend)
    sequences = tuple(
        SequenceStep(
            slot,
            0,
            len(prompt),
            tuple(range(10 * slot, 10 * slot + 10)),
            sampled=True,
            long=len(prompt) > BORDER,
        )
        for slot, prompt in enumerate(prompts)
    )
    token_ids = list(itertools.chain.from_iterable(prompts))
    hidden = stage.forward(StepHeader(0, sequences), token_ids=token_ids)
    wanted = torch.cat([whole.eval()(torch.tensor([prompt])).logits[0] for prompt in prompts])
    torch.testing.assert_close(stage.logits(hidden), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(load_library() is None, reason="this processor has no AVX-512")
def test_the_decoders_tables_grow_as_long_rows_come(
    tmp_path: Path, open_files: Callable[[Path], ModelFiles]
) -> None:
    """They begin with 512 rows, and long rows come behind 600 others."""
    rotary = {**longrope(8), ORIGINAL: 600}
    write_checkpoint("llama", tmp_path, rope_parameters=rotary, max_position_embeddings=2048)
    files = open_files(tmp_path)
    sizes = {"block_size": 16, "cache_blocks": 100, "max_context": 1280}
    native = StageRunner(files, settings(0, 1, **sizes))
    exact = StageRunner.on_device(
        open_checkpoint(files, settings(0, 1, **sizes)), settings(0, 1, **sizes), CPU
    )
    for slot, start, count, long in (
        (0, 0, 40, False),
        (1, 0, 40, True),
        (1, 40, 1, True),
        (0, 40, 560, False),
        (1, 41, 640, True),
        (0, 600, 1, True),
        (1, 681, 10, True),
    ):
        table = tuple(range(50 * slot, 50 * slot + -(-(start + count) // 16)))
        header = StepHeader(0, (SequenceStep(slot, start, count, table, False, long=long),))
        ids = torch.randint(0, 90, (count,)).tolist()
        found, wanted = (stage.forward(header, token_ids=ids) for stage in (native, exact))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    native.close()


@pytest.mark.parametrize("backend", ["torch", "device"])
def test_a_context_up_to_the_border_has_no_long_rows(
    backend: str,
    opened: Callable[..., list[StageRunner]],
    written: Callable[[str], Path],
) -> None:
    (stage,) = opened("phi3", backend, max_context=BORDER)
    for length in (12, BORDER):
        [prompt] = prompts_of((length,))
        # The last token is drawn from the row of the last position within the border.
        count = BORDER + 1 - length
        wanted = Oracle(written("phi3")).greedy(prompt, count, ignore_end=True)
        assert generate(Chain([stage]), [prompt], count, stop=-1) == [wanted]
        stage.reset()
    with pytest.raises(StepRefused, match=r"long rows: expected .* below 24 .* found one at 24"):
        stage.forward(long_step(1), token_ids=[1])


def long_step(count: int, start: int = 0, *, long: bool = True) -> StepHeader:
    return StepHeader(0, (SequenceStep(0, start, count, tuple(range(8)), True, long=long),))


def test_rows_rotated_as_they_never_are_are_refused(
    opened: Callable[..., list[StageRunner]],
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    (stage,) = opened("llama", "torch")
    stage.forward(long_step(24, long=False), token_ids=[1] * 24)
    with pytest.raises(StepRefused, match=r"slot 0: expected long rows past .* of 24 .* to 25"):
        stage.forward(long_step(25, long=False), token_ids=[1] * 25)
    plain = StageRunner(open_files(checkpoint("llama")), settings())
    with pytest.raises(StepRefused, match=r"slot 0: long rows: .* longrope border .* found none"):
        plain.forward(long_step(1), token_ids=[1])
    plain.forward(step(count=1), token_ids=[1])


def test_layer_types_with_different_borders_are_refused(
    tmp_path: Path, open_files: Callable[[Path], ModelFiles]
) -> None:
    rotary = {"sliding_attention": longrope(16), "full_attention": longrope(16, **{ORIGINAL: 32})}
    write_checkpoint("gemma3_text", tmp_path, head_dim=32, rope_parameters=rotary)
    with pytest.raises(UnsupportedModel, match=r"same in all layer types, found \[24, 32\]"):
        StageRunner(open_files(tmp_path), settings())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_who_recomputes_is_who_drops_its_cache_in_transformers(family: object) -> None:
    model_class = family._part("modeling", family.model_class)  # type: ignore[attr-defined]
    source = inspect.getsource(model_class.prepare_inputs_for_generation)
    drops = ORIGINAL in source and "past_key_values = None" in source
    assert family.recomputes == drops  # type: ignore[attr-defined]


def test_a_border_is_at_a_position() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        RotaryBorder(0, recomputes=True)


def test_a_stage_without_a_border_says_so(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("qwen3")
    stage = StageRunner(ModelFiles(directory, build_manifest(directory)), settings(0, 1))
    assert stage.rotary_border is None
