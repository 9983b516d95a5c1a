"""int8 weights: the decoder computes what the weights that they stand for compute, or says no."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import END, random_model
from stage_chain import Chain, generate, prompts_of
from stage_models import settings
from stage_variants import VARIANTS

from runtime.stage.errors import UnsupportedModel
from runtime.stage.native import stack
from runtime.stage.native.library import Library, Team, load_library
from runtime.stage.native.stack import PackedLinear
from runtime.stage.quantise import quantise
from runtime.stage.stage import StageRunner
from security.channel.frame import SequenceStep, StepHeader
from security.manifest import ModelFiles

LENGTHS = (1, 16, 5, 37, 70)
TOKENS = 10
# Tied and untied heads, biases, fused projections, all places of norms, both activations.
COMPUTED = ("qwen2", "qwen3", "llama", "phi3", "gemma2-wider", "granite", "olmo2")

needs_decoder = pytest.mark.skipif(
    load_library() is None, reason="this processor has no AVX-512, or no compiler was installed"
)


def int8_settings(first: int = 0, last: int = 6, **changes: object) -> object:
    values = {"block_size": 16, "cache_blocks": 40, "weight_format": "int8", **changes}
    return settings(first, last, **values)


def stood_for(weight_OI: torch.Tensor) -> torch.Tensor:
    """The weight that int8 numbers and scales stand for."""
    numbers_OI, scales_O = quantise(weight_OI)
    return numbers_OI.float() * scales_O[:, None]


@pytest.fixture
def library() -> Library:
    found = load_library()
    assert found is not None
    return found


@pytest.fixture
def team(library: Library) -> Iterator[Callable[[int], Team]]:
    opened: list[Team] = []

    def open_(threads: int) -> Team:
        opened.append(Team(library, threads))
        return opened[-1]

    yield open_
    for team in opened:
        team.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    # More channels than are quantised at a time, of very different magnitudes.
    weight = torch.randn(4500, 24, generator=generator)
    weight *= torch.logspace(-3, 3, 4500)[:, None]
    weight = weight.to(dtype)
    numbers, scales = quantise(weight)
    assert numbers.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert torch.equal(numbers.int().abs().amax(1), torch.full((4500,), 127, dtype=torch.int32))
    off = (numbers.double() * scales.double()[:, None] - weight.double()).abs()
    assert bool((off <= scales.double()[:, None] * 0.50001).all())


def test_channels_of_zeros_and_of_next_to_nothing() -> None:
    weight = torch.zeros(3, 8)
    weight[1, 2] = 1e-44
    weight[2, 3] = -5.0
    numbers, scales = quantise(weight)
    assert not numbers[:2].any()
    assert bool((scales > 0).all())
    assert numbers[2].tolist() == [0, 0, 0, -127, 0, 0, 0, 0]


@needs_decoder
@pytest.mark.parametrize(
    ("dtype", "amx"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "bfloat16 amx"],
)
@pytest.mark.parametrize("rows", [1, 3, 14, 15, 17, 33, 70])
def test_products_are_torchs_with_the_weights_they_stand_for(
    dtype: torch.dtype,
    rows: int,
    amx: bool,
    library: Library,
    team: Callable[[int], Team],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (dtype == torch.bfloat16 and not library.bfloat16) or (amx and not library.amx):
        pytest.skip("this processor does not multiply bfloat16 this way")
    monkeypatch.setattr(library, "amx", amx)
    generator = torch.Generator().manual_seed(rows)
    # Neither a multiple of the tiles' columns nor of lines, and more than one run of lines.
    for outputs, inputs in ((99, 64), (513, 96), (32, 1200), (7, 1040), (48, 16)):
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        weight *= torch.logspace(-2, 2, outputs)[:, None].to(dtype)
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        products = PackedLinear(team(2), weight, "int8")(x)
        # Each column in units of its own scale: else a wrong small one would not show.
        scales = quantise(weight)[1] * 127
        expected = x.float() @ stood_for(weight).T
        torch.testing.assert_close(products / scales, expected / scales, rtol=1e-4, atol=2e-3)


def oracle(variant: str, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates with the weights that int8 stands for, in float32."""
    family, changes = VARIANTS[variant]
    model = random_model(family, seed=3, **changes)
    head = model.get_output_embeddings()
    # A tied embedding stays exact: only the head changes.
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(stood_for(module.weight))
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, eos_token_id=END, pad_token_id=END
    )
    return [
        model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


@needs_decoder
@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 6)], ids=["one", "two"])
@pytest.mark.parametrize("variant", COMPUTED)
def test_tokens_are_those_of_transformers_with_the_weights_they_stand_for(
    variant: str,
    cuts: tuple[int, ...],
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    files = open_files(checkpoint(variant))
    stages = [
        StageRunner(files, int8_settings(first, last)) for first, last in itertools.pairwise(cuts)
    ]
    assert {stage.backend for stage in stages} == {"native"}
    prompts = prompts_of(LENGTHS)
    found = generate(Chain(stages), prompts, TOKENS, blocks=40, block_size=16)
    for stage in stages:
        stage.close()
    assert found == oracle(variant, prompts)


@needs_decoder
def test_bfloat16_differs_from_float32_by_rounding_only(
    library: Library, tmp_path: Path, open_files: Callable[[Path], ModelFiles]
) -> None:
    if not library.bfloat16:
        pytest.skip("this processor does not multiply bfloat16")
    # Stored in bfloat16, so that both stages make int8 of the same numbers.
    random_model("llama", seed=3).bfloat16().save_pretrained(tmp_path)
    files = open_files(tmp_path)

    def logits(dtype: str, weight_format: str) -> torch.Tensor:
        stage = StageRunner(files, int8_settings(dtype=dtype, weight_format=weight_format))
        (prompt,) = prompts_of((60,))
        header = StepHeader(0, (SequenceStep(0, 0, 60, (0, 1, 2, 3), False),))
        found = stage.logits(stage.forward(header, token_ids=prompt))
        stage.close()
        return found

    exact = logits("float32", "int8")
    rounding = (logits("float32", "plain") - logits("bfloat16", "plain")).square().mean().sqrt()
    error = (exact - logits("bfloat16", "int8")).square().mean().sqrt()
    assert 0 < float(error) <= 1.3 * float(rounding)


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        ("mixtral", {}, "layers of mixtral that are no dense decoder layers"),
        ("gemma", {}, "layers of gemma whose widths"),
        ("qwen3", {"dtype": "float16"}, "dtype float16"),
        ("qwen3", {"block_size": 4}, "cache blocks of 4 positions"),
        ("qwen3", {"tp": 2}, "2 tensor-parallel ranks"),
    ],
)
@needs_decoder
def test_a_stage_that_torch_would_compute_is_refused(
    variant: str,
    changes: dict[str, object],
    reason: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    files = open_files(checkpoint(variant))
    with pytest.raises(UnsupportedModel, match=f"int8 weights: .*{reason}.*plain weights"):
        StageRunner(files, int8_settings(0, 1, **changes))


def test_without_the_decoder_int8_is_refused(
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stack, "load_library", lambda: None)
    with pytest.raises(UnsupportedModel, match="installation without it; plan with plain weights"):
        StageRunner(open_files(checkpoint("qwen3")), int8_settings(0, 1))


def test_formats_are_a_closed_list() -> None:
    with pytest.raises(ValueError, match=r"weight_format: expected one of .*found 'int4'"):
        int8_settings(weight_format="int4")
