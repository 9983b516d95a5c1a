"""Tokens are the model's: whatever the split, the batch or a recovery, in fp32."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import ALPHABET, Oracle
from running import RunningPlan

DEMO = Path(__file__).parents[2] / "models" / "demo"

# Splits of six layers, and tensor-parallel ranks of each stage.
PLANS = {
    "one-stage": ((), 1),
    "two-stages": ((3,), 1),
    "three-uneven": ((1, 4), 1),
    "two-stages-tp2": ((3,), 2),
}


def prompts(count: int, vocabulary: int, longest: int = 120) -> list[list[int]]:
    """Prompts of different lengths, some longer than a step and than a sliding window."""
    chance = random.Random(7)
    lengths = [1, longest, 5, 64, 17, 49, 90, 33, 2, 75][:count]
    return [[chance.randrange(vocabulary) for _ in range(length)] for length in lengths]


def expected(oracle: Oracle, prompt: list[int], tokens: int) -> tuple[str, int]:
    """Text and number of the tokens that `generate` appends."""
    output = oracle.greedy(prompt, tokens)
    return oracle.tokenizer.decode(output, skip_special_tokens=True), len(output)


def check(plan: RunningPlan, oracle: Oracle, vocabulary: int) -> None:
    """One request alone, then eight at once, against the oracle."""
    single = prompts(1, vocabulary)[0] * 9
    assert plan.complete(single, 40) == expected(oracle, single, 40)
    batch = prompts(8, vocabulary)
    counts = [60, 24, 48, 31, 52, 40, 8, 60]
    found = plan.complete_all(batch, counts)
    assert found == [expected(oracle, *pair) for pair in zip(batch, counts, strict=True)]


@pytest.mark.parametrize("shape", PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_equal_to_generate(checkpoint: Callable[[str], Path], family: str, shape: str) -> None:
    model = checkpoint(family)
    splits, tp = PLANS[shape]
    with RunningPlan(model, splits, tp) as plan:
        check(plan, Oracle(model), len(ALPHABET))


@pytest.mark.parametrize("shape", PLANS)
def test_demo_model_equal_to_generate(shape: str) -> None:
    oracle = Oracle(DEMO)
    layers = oracle.layers
    splits = {"one-stage": (), "three-uneven": (1, layers - 1)}.get(shape, (layers // 2,))
    with RunningPlan(DEMO, splits, PLANS[shape][1]) as plan:
        check(plan, oracle, 256)
        answer = plan.post(
            "/v1/chat/completions",
            {
                "model": "test-model",
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
            },
        )
        assert "Paris" in answer.document["choices"][0]["message"]["content"]


SAMPLED: dict[str, object] = {
    "temperature": 0.9,
    "seed": 17,
    "presence_penalty": 0.8,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
    "logit_bias": {"11": 4.0, "40": -6.0},
    "min_tokens": 30,
    "stop_token_ids": list(range(0, 90, 7)),
    "logprobs": 2,
}


@pytest.mark.parametrize("victim", ["stage-1", "stage-2"])
def test_killed_shard_mid_stream(checkpoint: Callable[[str], Path], victim: str) -> None:
    """Streams pause and go on: no repeated, missing or changed token."""
    model = checkpoint("llama")
    oracle = Oracle(model)
    batch = prompts(8, len(ALPHABET), longest=60)
    common = {"model": "test-model", "max_tokens": 120}
    greedy = {**common, "temperature": 0, "ignore_eos": True}
    with RunningPlan(model, (2, 4)) as plan:
        # What penalties and bias count is on the last stage, which may be the one that dies.
        undisturbed = [
            plan.post("/v1/completions", {**common, **SAMPLED, "prompt": prompt}).document
            for prompt in batch[:4]
        ]
        bodies = [{**greedy, "prompt": prompt} for prompt in batch]
        bodies += [{**common, **SAMPLED, "prompt": prompt} for prompt in batch[:4]]
        streams = [plan.stream("/v1/completions", body) for body in bodies]
        texts = [next(stream)["choices"][0]["text"] for stream in streams]
        epoch = plan.states["stage-0"].epoch
        plan.kill_shard(victim)
        plan.start_shard(victim)
        for index, stream in enumerate(streams):
            for document in stream:
                assert "error" not in document, document
                texts[index] += document["choices"][0]["text"]
        plan.wait_serving()
        assert plan.states["stage-0"].epoch != epoch
        for prompt, text in zip(batch, texts[:8], strict=True):
            output = oracle.greedy(prompt, 120, ignore_end=True)
            assert text == oracle.tokenizer.decode(output, skip_special_tokens=True)
        assert texts[8:] == [document["choices"][0]["text"] for document in undisturbed]
        counts = [document["usage"]["completion_tokens"] for document in undisturbed]
        assert all(count >= 30 for count in counts), "long enough to be cut in the middle"
