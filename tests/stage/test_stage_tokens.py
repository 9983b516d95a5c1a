"""Tokens are the model's: stages, chunks and batches give exactly what `generate` gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import Oracle
from stage_chain import Chain, generate, prompts_of
from stage_models import VARIANTS, settings

from runtime.stage.stage import StageRunner
from security.manifest import ModelFiles

CUTS = {"one": (0, 6), "two": (0, 4, 6), "three": (0, 1, 4, 6)}
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


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
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


@pytest.mark.parametrize("variant", ["qwen3", "mistral-window", "qwen2-window"])
def test_whole_prompts_in_one_step(
    variant: str,
    checkpoint: Callable[[str], Path],
    open_files: Callable[[Path], ModelFiles],
    expected: Callable[[str], list[list[int]]],
) -> None:
    chain = Chain([StageRunner(open_files(checkpoint(variant)), settings())])
    assert generate(chain, prompts_of(LENGTHS), TOKENS, chunk=200) == expected(variant)


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
