"""Stages in a row and the least scheduler that can drive them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from checkpoints import END

from runtime.stage.border import RotaryBorder
from runtime.stage.stage import StageRunner
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import SequenceStep, StepHeader

GREEDY = SamplingParameters(0.0, 1.0, 0, 0)


def step(
    start: int = 0,
    count: int = 1,
    blocks: tuple[int, ...] = (7,),
    sampled: bool = True,
) -> StepHeader:
    return StepHeader(0, (SequenceStep(0, start, count, blocks, sampled),))


class Chain:
    """Runs steps through stages in one process."""

    def __init__(self, stages: Sequence[StageRunner]) -> None:
        self.stages = list(stages)

    def run(
        self, header: StepHeader, token_ids: list[int], admissions: Sequence[Admission] = ()
    ) -> tuple[int, ...]:
        hidden = self.stages[0].forward(header, token_ids=token_ids)
        for stage in self.stages[1:]:
            # A copy: what arrives by network shares nothing with the sender.
            hidden = stage.forward(header, hidden_TD=hidden.clone())
        self.stages[-1].admit(admissions)
        return self.stages[-1].sample(header, hidden).tokens


def generate(
    chain: Chain,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    chunk: int = 7,
    blocks: int = 128,
    block_size: int = 4,
    parameters: Sequence[SamplingParameters] | None = None,
    stop: int = END,
    seed: int = 0,
    border: RotaryBorder | None = None,
) -> list[list[int]]:
    """Greedy tokens per prompt; sequences start one after another so that prompts and decodes mix.

    Block ids are handed out in a shuffled order, so that a table is never a range. What outgrows
    the border of a model that recomputes starts over.
    """
    parameters = parameters or [GREEDY] * len(prompts)
    free = list(range(blocks))
    random.Random(seed).shuffle(free)
    tables: list[list[int]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    all_long = [border is not None and border.makes_long(len(it), len(it)) for it in prompts]
    step = 0
    while True:
        sequences, token_ids, sampled, admissions = [], [], [], []
        for index, prompt in enumerate(prompts):
            known = [*prompt, *outputs[index]]
            ended = len(outputs[index]) >= tokens or (outputs[index] and outputs[index][-1] == stop)
            if ended or index > step:
                continue
            if border and border.makes_long(len(prompt), len(known)) != all_long[index]:
                all_long[index] = True
                done[index] = 0
                free += reversed(tables[index])
                tables[index].clear()
            # Chunks differ per sequence so that boundaries and blocks never line up.
            count = min(chunk + index % 3, len(known) - done[index])
            long = all_long[index]
            if border and not long:
                long = done[index] >= border.positions
                count = count if long else min(count, border.positions - done[index])
            while len(tables[index]) * block_size < done[index] + count:
                tables[index].append(free.pop())
            samples = done[index] + count == len(known)
            if done[index] == 0:
                wanted = parameters[index]
                seen = tuple(prompt) if wanted.counts_prompt else ()
                output = tuple(outputs[index]) if wanted.counts_output else ()
                admissions.append(Admission(index, wanted, len(prompt), seen, output))
            sequences.append(
                SequenceStep(
                    index,
                    done[index],
                    count,
                    tuple(tables[index]),
                    samples,
                    done[index] == 0,
                    long,
                )
            )
            token_ids += known[done[index] : done[index] + count]
            done[index] += count
            if samples:
                sampled.append(index)
        if not sequences and step >= len(prompts):
            return outputs
        if sequences:
            result = chain.run(StepHeader(step, tuple(sequences)), token_ids, admissions)
            assert len(result) == len(sampled)
            for index, token in zip(sampled, result, strict=True):
                outputs[index].append(token)
        step += 1


def prompts_of(lengths: Sequence[int], seed: int = 5) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, END, (n,), generator=generator).tolist() for n in lengths]
