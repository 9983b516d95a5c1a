"""Tokens are the model's: stages, chunks and batches give exactly what `generate` gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import Oracle
from stage_chain import Chain, generate, prompts_of, step
from stage_models import settings
from stage_variants import VARIANTS

from runtime.stage.stage import StageRunner
from security.manifest import ModelFiles

CUTS = {"one": (0, 6), "two": (0, 4, 6), "three": (0, 1, 4, 6)}
EVERYWHERE = tuple(range(7))
# Single tokens, a length of exactly one block, lengths beyond the sliding windows.
LENGTHS = (1, 4, 5, 13, 2, 37, 24, 50)
TOKENS = 12


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    found: dict[str, list[list[int]]] = {}

    def generate_with_transformers(variant: str) -> list[list[int]]:
        if variant not in found:
            oracle = Oracle(checkpoint(variant))
            found[variant] = [oracle.greedy(prompt, TOKENS) for prompt in prompts_of(LENGTHS)]
        return found[variant]

    return generate_with_transformers


@pytest.mark.parametrize(
    "cuts",
    [
        *(pytest.param(cuts, id=name) for name, cuts in CUTS.items()),
        pytest.param(EVERYWHERE, id="everywhere", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_split_batched_chunked_tokens_equal_generate(
    variant: str,
    cuts: tuple[int, ...],
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    files = open_files(checkpoint(variant))
    chain = Chain(
        [StageRunner(files, settings(first, last)) for first, last in itertools.pairwise(cuts)]
    )
    wanted = expected(variant)
    assert len({token for tokens in wanted for token in tokens}) > 10, "the oracle must vary"
    assert generate(chain, prompts_of(LENGTHS), TOKENS) == wanted


@pytest.mark.parametrize(
    "variant",
    ["cohere2", "gemma2", "gemma3_text", "gpt_oss", "mistral-window", "mixtral", "phi3", "qwen3"],
)
def test_whole_prompts_in_one_step(
    variant: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    chain = Chain([StageRunner(open_files(checkpoint(variant)), settings())])
    assert generate(chain, prompts_of(LENGTHS), TOKENS, chunk=200) == expected(variant)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_logits_are_the_models(
    variant: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    # What is monotone in the logits (soft caps, scales) shows in no greedy token.
    directory = checkpoint(variant)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    [prompt] = prompts_of((33,))
    stage = StageRunner(open_files(directory), settings())
    hidden = stage.forward(step(count=33, blocks=tuple(range(9))), token_ids=prompt)
    expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(stage._ends.logits(hidden), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text", "granite", "llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_embeddings_are_rounded_as_the_model_rounds_them(
    variant: str,
    dtype: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
) -> None:
    directory = checkpoint(variant)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype)
    ).eval()
    [prompt] = prompts_of((33,))
    expected = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[0][0]
    stage = StageRunner(open_files(directory), settings(0, 1, dtype=dtype))
    assert torch.equal(stage._ends.embed(prompt), expected)


def test_reused_blocks_and_a_reset_leave_no_trace(
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    chain = Chain([StageRunner(open_files(checkpoint("qwen3")), settings())])
    prompts, wanted = prompts_of(LENGTHS), expected("qwen3")
    for seed in range(3):
        assert generate(chain, prompts, TOKENS, seed=seed) == wanted
    chain.stages[0].reset()
    assert generate(chain, prompts, TOKENS, chunk=3) == wanted
