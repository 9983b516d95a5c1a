"""How tokens are drawn does not depend on where: one stage, two, three, and after a lost shard.

Greedy tokens under penalties are held against `transformers.generate` with its own logits
processors, logprobs against its `log_softmax`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ALPHABET, END, write_checkpoint
from running import RunningPlan
from test_tokens import prompts
from transformers import AutoModelForCausalLM

ALTERNATIVES = 5
TOKENS = 60
BIAS = {11: 3.0, 40: -6.0, 77: 2.0}
SHARED: dict[str, object] = {
    "model": "test-model",
    "max_tokens": TOKENS,
    "logprobs": ALTERNATIVES,
    "return_token_ids": True,
}
GREEDY: dict[str, object] = {
    **SHARED,
    "temperature": 0,
    "repetition_penalty": 1.3,
    "logit_bias": {str(token): bias for token, bias in BIAS.items()},
    "min_tokens": 25,
}
SAMPLED: dict[str, object] = {
    **SHARED,
    "temperature": 0.9,
    "top_p": 0.95,
    "min_p": 0.001,
    "seed": 17,
    "n": 2,
    "presence_penalty": 0.8,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
    "min_tokens": 25,
    "stop_token_ids": list(range(0, 90, 7)),
}


@dataclass
class Output:
    """One choice: its tokens, and what was said of each."""

    tokens: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[dict[str, float]] = field(default_factory=list)
    finish: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        told = choice["logprobs"]
        self.tokens += choice["token_ids"]
        self.names += told["tokens"]
        self.logprobs += told["token_logprobs"]
        self.alternatives += told["top_logprobs"]
        self.finish = choice["finish_reason"] or self.finish


def outputs_of(documents: Iterable[dict[str, Any]]) -> list[Output]:
    """The choices of an answer, whole or in events."""
    outputs: dict[int, Output] = {}
    for document in documents:
        assert "error" not in document, document
        for choice in document["choices"]:
            outputs.setdefault(choice["index"], Output()).add(choice)
    return [outputs[index] for index in sorted(outputs)]


def assert_same(found: list[Output], expected: list[Output]) -> None:
    """Tokens are equal; logprobs but for rounding: rows of a batch may be computed differently."""
    assert [o.tokens for o in found] == [o.tokens for o in expected]
    assert [(o.names, o.finish) for o in found] == [(o.names, o.finish) for o in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        for mine, theirs in zip(one.alternatives, other.alternatives, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


class Reference:
    """The unsplit model under transformers."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def greedy(self, prompt: list[int]) -> list[int]:
        """What `generate` appends under the penalties of `GREEDY`."""
        output = self._model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=TOKENS,
            repetition_penalty=1.3,
            sequence_bias=[[[token], bias] for token, bias in BIAS.items()],
            min_new_tokens=25,
        )
        return [int(token) for token in output[0, len(prompt) :]]

    @torch.inference_mode()
    def check_logprobs(self, prompt: list[int], output: Output) -> None:
        """Of every token that has text: its own logprob, and those of the likeliest."""
        logits = self._model(torch.tensor([prompt + output.tokens])).logits[0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1)
        for place, (name, value, likeliest) in enumerate(
            zip(output.names, output.logprobs, output.alternatives, strict=True)
        ):
            token = output.tokens[place]
            assert name == (ALPHABET[token] if token < END else name)
            assert value == pytest.approx(float(expected[place, token]), abs=1e-3)
            best = expected[place].topk(ALTERNATIVES).values.tolist()
            assert sorted(likeliest.values(), reverse=True)[:ALTERNATIVES] == pytest.approx(
                best, abs=1e-3
            )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def batch() -> list[list[int]]:
    return prompts(4, len(ALPHABET), longest=60)


@pytest.fixture(scope="module")
def bodies(batch: list[list[int]]) -> list[dict[str, object]]:
    return [{**kind, "prompt": prompt} for kind in (GREEDY, SAMPLED) for prompt in batch]


def alone(plan: RunningPlan, bodies: list[dict[str, object]]) -> list[list[Output]]:
    """The answers, asked for one by one."""
    return [outputs_of([plan.post("/v1/completions", body).document]) for body in bodies]


def begin(
    plan: RunningPlan, bodies: list[dict[str, object]]
) -> list[tuple[dict[str, Any], Iterator[dict[str, Any]]]]:
    """All at once, streamed: the first event of each, and what follows."""
    streams = [plan.stream("/v1/completions", body) for body in bodies]
    return [(next(stream), stream) for stream in streams]


@pytest.fixture(scope="module")
def one_stage(model: Path, bodies: list[dict[str, object]]) -> list[list[Output]]:
    with RunningPlan(model) as plan:
        outputs = alone(plan, bodies)
        for (first, rest), expected in zip(begin(plan, bodies), outputs, strict=True):
            assert_same(outputs_of([first, *rest]), expected)
    return outputs


def test_one_stage_draws_what_transformers_does(
    model: Path, batch: list[list[int]], one_stage: list[list[Output]]
) -> None:
    reference = Reference(model)
    greedy, sampled = one_stage[:4], one_stage[4:]
    assert [output.tokens for (output,) in greedy] == [reference.greedy(p) for p in batch]
    for prompt, outputs in zip(batch * 2, one_stage, strict=True):
        for output in outputs:
            reference.check_logprobs(prompt, output)
    # Penalties, seeds and ends are at work.
    assert all(one.tokens != other.tokens for one, other in sampled)
    assert {output.finish for outputs in one_stage for output in outputs} == {"stop", "length"}
    assert all(len(output.tokens) > 25 for outputs in one_stage for output in outputs)


def test_two_stages_draw_what_one_does(
    model: Path, bodies: list[dict[str, object]], one_stage: list[list[Output]]
) -> None:
    with RunningPlan(model, (3,)) as plan:
        for found, expected in zip(alone(plan, bodies), one_stage, strict=True):
            assert_same(found, expected)
        for (first, rest), expected in zip(begin(plan, bodies), one_stage, strict=True):
            assert_same(outputs_of([first, *rest]), expected)


def test_three_stages_draw_what_one_does_and_the_sampler_may_be_lost(
    model: Path, bodies: list[dict[str, object]], one_stage: list[list[Output]]
) -> None:
    with RunningPlan(model, (2, 4)) as plan:
        begun = begin(plan, bodies)
        epoch = plan.states["stage-0"].epoch
        plan.kill_shard("stage-2")
        plan.start_shard("stage-2")
        for (first, rest), expected in zip(begun, one_stage, strict=True):
            assert_same(outputs_of([first, *rest]), expected)
        plan.wait_serving()
        assert plan.states["stage-0"].epoch != epoch
        for found, expected in zip(alone(plan, bodies), one_stage, strict=True):
            assert_same(found, expected)
