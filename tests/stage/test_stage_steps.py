"""Steps that do not fit, values that are not numbers, attention that is not ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stage_chain import GREEDY, Chain, generate, prompts_of, step
from stage_models import settings
from torch import nn

from runtime.stage.attention import NAME, PagedStep, paged_attention
from runtime.stage.errors import NonFinite, StepRefused, UnsupportedAttention
from runtime.stage.kv_cache import PagedCache
from runtime.stage.stage import StageRunner, StageSettings
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import SequenceStep, StepHeader, StepResult
from security.manifest import ModelFiles, build_manifest


@pytest.fixture(scope="module")
def stages(checkpoint: Callable[[str], Path]) -> list[StageRunner]:
    directory = checkpoint("mistral")
    files = ModelFiles(directory, build_manifest(directory))
    return [StageRunner(files, settings(first, first + 3)) for first in (0, 3)]


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (step(count=5, blocks=(7,)), "for 5 positions, found 1 of 4"),
        (step(blocks=()), "found 0 of 4"),
        (step(blocks=(128,)), "blocks below 128"),
        (step(start=256, blocks=tuple(range(65))), "up to position 256, found 1 up to 257"),
    ],
)
def test_steps_outside_the_plan_are_refused(
    header: StepHeader, text: str, stages: list[StageRunner]
) -> None:
    with pytest.raises(StepRefused, match=text):
        stages[0].forward(header, token_ids=[1] * header.tokens)


def test_rows_must_fit_the_stage(stages: list[StageRunner]) -> None:
    first, last = stages
    rows = torch.zeros(1, 64)
    for stage, hidden, tokens in (
        (first, None, [1, 2]),
        (first, None, None),
        (first, rows, [1]),
        (first, None, [99]),
        (first, None, [-1]),
        (last, None, [1]),
        (last, rows, [1]),
        (last, torch.zeros(2, 64), None),
        (last, torch.zeros(1, 63), None),
        (last, rows.double(), None),
    ):
        with pytest.raises(StepRefused):
            stage.forward(step(), hidden_TD=hidden, token_ids=tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_received_rows_must_be_finite(value: float, stages: list[StageRunner]) -> None:
    rows = torch.zeros(3, 64)
    rows[1, 5] = value
    with pytest.raises(NonFinite):
        stages[1].forward(step(count=3), hidden_TD=rows)


def test_received_rows_are_not_changed(stages: list[StageRunner]) -> None:
    rows = torch.ones(3, 64)
    stages[1].forward(step(count=3), hidden_TD=rows)
    assert torch.equal(rows, torch.ones(3, 64))


def test_only_sequences_that_ask_are_sampled(stages: list[StageRunner]) -> None:
    header = StepHeader(
        0,
        (
            SequenceStep(0, 0, 3, (1,), False),
            SequenceStep(1, 0, 2, (2,), True, admitted=True),
            SequenceStep(2, 0, 4, (3,), False),
        ),
    )
    hidden = stages[0].forward(header, token_ids=list(range(9)))
    hidden = stages[1].forward(header, hidden_TD=hidden)
    with pytest.raises(StepRefused, match="slot 1: expected an admitted sequence"):
        stages[1].sample(header, hidden)
    stages[1].admit([Admission(1, GREEDY, 2)])
    assert len(stages[1].sample(header, hidden).tokens) == 1
    quiet = StepHeader(1, header.sequences[:1])
    assert stages[1].sample(quiet, hidden[:3]) == StepResult(1, ())
    stages[1].reset()
    with pytest.raises(StepRefused):
        stages[1].sample(header, hidden)


def test_seeded_tokens_do_not_depend_on_chunks_or_neighbours(stages: list[StageRunner]) -> None:
    prompts = prompts_of((9, 21, 5))
    parameters = [SamplingParameters(1.0, 0.95, 0, seed) for seed in (1, 2**63, 3)]
    chain = Chain(stages)
    together = generate(chain, prompts, 10, parameters=parameters)
    for stage in stages:
        stage.reset()
    alone = [
        generate(chain, [prompt], 10, parameters=[wanted], chunk=4)[0]
        for prompt, wanted in zip(prompts, parameters, strict=True)
    ]
    assert together == alone


def test_a_reset_empties_the_cache(stages: list[StageRunner]) -> None:
    last = stages[1]
    rows = torch.randn(4, 64)
    last.forward(step(count=4), hidden_TD=rows)
    seen = last.forward(step(start=4, blocks=(7, 8)), hidden_TD=rows[:1])
    last.reset()
    assert not torch.equal(last.forward(step(start=4, blocks=(7, 8)), hidden_TD=rows[:1]), seen)


def attend(**changes: object) -> object:
    module = nn.Module()
    module.layer_idx = 0
    cache = PagedCache(range(1), blocks=8, block_size=4, heads=1, head_size=8, dtype=torch.float32)
    arguments: dict[str, object] = {
        "module": module,
        "query": torch.zeros(1, 2, 1, 8),
        "key": torch.zeros(1, 1, 1, 8),
        "value": torch.ones(1, 1, 1, 8),
        "attention_mask": None,
        "paged_step": PagedStep(cache, step()),
    }
    return paged_attention(**{**arguments, **changes})  # type: ignore[arg-type]


def test_attention_refuses_what_it_does_not_know() -> None:
    output, weights = attend(softcap=None, is_causal=None)  # type: ignore[misc]
    assert torch.equal(output, torch.ones(1, 1, 2, 8)) and weights is None
    encoder = nn.Module()
    encoder.layer_idx, encoder.is_causal = 0, False
    for changes, text in (
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"chunk_size": 8}, "chunk_size"),
        ({"is_causal": False}, "is_causal"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.zeros(1)}, "no mask"),
        ({"dropout": 0.1}, "no dropout"),
        ({"paged_step": None}, "expected a step"),
        ({"module": encoder}, "causal self-attention"),
    ):
        with pytest.raises(UnsupportedAttention, match=text):
            attend(**changes)


def test_a_model_outside_a_stage_cannot_use_our_attention(stages: list[StageRunner]) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    model.config._attn_implementation = NAME
    with pytest.raises(UnsupportedAttention, match="no mask"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "int8"},
        {"first_layer": 3, "last_layer": 3},
        {"last_layer": 7},
        {"first_layer": -1},
        {"tp": 0},
        {"cache_blocks": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        settings(**changes)  # type: ignore[arg-type]
    assert isinstance(settings(), StageSettings)
