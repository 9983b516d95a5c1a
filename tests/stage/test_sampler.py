"""The sampler: transformers' processors say what may be drawn, exact inversion what is."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.stage import sampler
from runtime.stage.errors import NonFinite, StepRefused
from runtime.stage.sampler import Draw, Sampler, uniform
from security.channel.admission import Admission, SamplingParameters
from security.channel.frame import TokenLogprobs

V = 50
FIRST = 4


def logits(rows: int, seed: int = 0, vocabulary: int = V) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def parameters(**changes: object) -> SamplingParameters:
    return dataclasses.replace(SamplingParameters(1.0, 1.0, 0, 1), **changes)


GREEDY = parameters(temperature=0.0)


def sample(
    rows: torch.Tensor,
    wanted: Sequence[SamplingParameters],
    positions: Sequence[int],
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Each row a sequence of its own, freshly admitted; the logits stay as they are."""
    made = Sampler()
    count = len(wanted)
    for slot in range(count):
        prompt = () if prompts is None else tuple(prompts[slot])
        output = () if outputs is None else tuple(outputs[slot])
        made.admit(Admission(slot, wanted[slot], len(prompt), prompt, output))
    draws = [Draw(slot, position) for slot, position in zip(range(count), positions, strict=True)]
    return made.sample(rows.clone(), draws)


def tokens(
    rows: torch.Tensor, wanted: Sequence[SamplingParameters], positions: Sequence[int]
) -> list[int]:
    return sample(rows, wanted, positions)[0]


def frequencies(row: torch.Tensor, wanted: SamplingParameters, count: int = 4000) -> torch.Tensor:
    made = tokens(row.expand(count, -1), [wanted] * count, range(count))
    return torch.bincount(torch.tensor(made), minlength=row.shape[0]) / count


def warped(row: torch.Tensor, wanted: SamplingParameters) -> torch.Tensor:
    """The distribution that transformers draws from."""
    warpers = [TemperatureLogitsWarper(wanted.temperature)]
    if wanted.top_k:
        warpers.append(TopKLogitsWarper(wanted.top_k))
    if wanted.top_p < 1:
        warpers.append(TopPLogitsWarper(wanted.top_p))
    if wanted.min_p:
        warpers.append(MinPLogitsWarper(wanted.min_p))
    scores = row[None]
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores[0].double(), -1)


def test_uniform_numbers_are_fixed_for_all_time() -> None:
    # Other numbers would change the tokens of a sequence that is recomputed by a newer release.
    assert uniform(0, 0) == 0.7189092809650481
    assert uniform(2**64 - 1, 2**32) == uniform(2**64 - 1, 2**32)
    numbers = [uniform(seed, position) for seed in range(20) for position in range(200)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 300, 5000])
def test_temperature_zero_takes_the_largest(vocabulary: int) -> None:
    rows = logits(6, vocabulary=vocabulary)
    assert tokens(rows, [GREEDY] * 6, [0] * 6) == rows.argmax(-1).tolist()


def test_the_lowest_of_equal_tokens_is_taken() -> None:
    for equal in ([3, 7], [120, 290], [0, 299], [128, 256, 257], [296, 298]):
        row = torch.zeros(1, 300)
        row[0, equal] = 1.5
        assert tokens(row, [GREEDY], [0]) == equal[:1]
        assert tokens(row, [parameters(top_k=1, seed=3)], [0]) == equal[:1]
    assert tokens(torch.zeros(1, 300), [GREEDY], [0]) == [0]


LIMITS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": V},
    {"top_k": V + 7},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 10, "top_p": 0.7},
    {"top_p": 0.8, "min_p": 0.2, "temperature": 1.5},
    {"top_k": 12, "top_p": 0.95, "min_p": 0.1, "temperature": 0.7},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_draws_are_from_what_transformers_draws_from(limits: dict[str, object]) -> None:
    """Pearson's chi-square at p = 1e-4, and nothing that transformers leaves out."""
    row = logits(1)[0]
    wanted = parameters(**limits)
    expected = warped(row, wanted)
    count = 4000
    found = frequencies(row, wanted, count) * count
    assert not found[expected == 0].any()
    likely = expected * count >= 5
    # Cells that are too rare count as one.
    cells = torch.cat([expected[likely] * count, expected[~likely].sum()[None] * count])
    seen = torch.cat([found[likely], found[~likely].sum()[None]])
    full = cells > 0
    statistic = float(((seen - cells)[full] ** 2 / cells[full]).sum())
    freedom = int(full.sum()) - 1
    # Wilson and Hilferty's approximation of the quantile.
    bound = (
        freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
        if freedom
        else 1e-9
    )
    assert statistic <= bound


@pytest.mark.parametrize("vocabulary", [50, 128, 700, 5000])
@pytest.mark.parametrize("limits", [{}, {"top_k": 30}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_the_draw_is_the_exact_inversion(vocabulary: int, limits: dict[str, object]) -> None:
    """The token is the first whose cumulative probability exceeds the random number."""
    row = logits(1, 3, vocabulary)[0]
    wanted = parameters(**limits, temperature=1.3)
    order = torch.argsort(row, descending=True) if limits else torch.arange(vocabulary)
    sums = warped(row, wanted)[order].cumsum(0)
    positions = range(500)
    found = tokens(row.expand(500, -1), [wanted] * 500, positions)
    for position, token in zip(positions, found, strict=True):
        number = uniform(wanted.seed, position)
        place = int((order == token).nonzero())
        # Float32 probabilities are good to about six digits.
        assert sums[place] > number - 1e-5
        assert place == 0 or sums[place - 1] <= number + 1e-5


def test_kept_sets_of_flat_and_large_vocabularies() -> None:
    """More candidates than are looked at first, and equal ones at every border."""
    row = torch.zeros(5000)
    row[4000] = 1.0
    wide = frequencies(row, parameters(top_p=0.9), 2000)
    assert int((wide > 0).sum()) > 1024
    for top_k in (2, 64, 100, 1024, 1500):
        found = frequencies(row, parameters(top_k=top_k), 3000).nonzero().flatten().tolist()
        # Of equal tokens the lower ids are kept.
        assert set(found) <= {*range(top_k - 1), 4000}
        assert len(found) > min(top_k, 1500) / 2
    # Half of what five tokens have: of equal ones the first three are needed.
    found = frequencies(row, parameters(top_k=5, top_p=0.5), 500).nonzero().flatten().tolist()
    assert found == [0, 4000]


MIXED = [
    GREEDY,
    parameters(temperature=0.7, top_p=0.9, seed=5),
    parameters(temperature=1.3, top_k=4, seed=6),
    parameters(temperature=0.9, top_p=0.8, top_k=9, seed=2**64 - 1, min_p=0.01),
    parameters(seed=12, logprobs=3),
    parameters(min_p=0.1, seed=9, presence_penalty=1.0, repetition_penalty=1.3),
    parameters(temperature=0.0, frequency_penalty=-0.5, logit_bias=((7, 5.0), (8, 5.0))),
    parameters(top_k=2000, seed=4, min_tokens=9, end_tokens=(3, 1)),
]


@pytest.mark.parametrize("vocabulary", [V, 3000])
def test_a_row_does_not_depend_on_its_neighbours(vocabulary: int) -> None:
    rows = torch.cat([logits(16, 1, vocabulary), logits(16, 2, vocabulary).bfloat16().float()])
    wanted = MIXED * 4
    positions = [random.Random(row).randrange(FIRST, 10**6) for row in range(32)]
    prompts = [[1, 2, 2, 3]] * 32
    outputs = [[row, row, 3] for row in range(32)]
    together = sample(rows, wanted, positions, prompts, outputs)
    alone = [
        sample(rows[r : r + 1], [wanted[r]], [positions[r]], [prompts[r]], [outputs[r]])
        for r in range(32)
    ]
    assert together[0] == [token for drawn, _ in alone for token in drawn]
    turned = sample(rows.flip(0), wanted[::-1], positions[::-1], prompts, outputs[::-1])
    assert turned[0][::-1] == together[0]
    for row, (_, (single,)) in enumerate(alone):
        assert (single is None) == (together[1][row] is None)
        if single is not None:
            assert [token for token, _ in single.alternatives] == [
                token for token, _ in together[1][row].alternatives
            ]


def test_seed_and_position_matter() -> None:
    row = torch.zeros(1, V)
    found = [tokens(row, [parameters(seed=seed)], [7])[0] for seed in range(30)]
    assert len(set(found)) > 10
    found = [tokens(row, [parameters()], [position])[0] for position in range(30)]
    assert len(set(found)) > 10


def test_extreme_temperatures_stay_finite() -> None:
    row = logits(1)
    for limits in ({}, {"top_p": 0.5}):
        cold, hot = (parameters(temperature=t, **limits) for t in (1e-300, 1e300))
        assert tokens(row, [cold], [0]) == row.argmax(-1).tolist()
        assert 0 <= tokens(row, [hot], [0])[0] < V


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_an_error(value: float) -> None:
    rows = logits(3)
    rows[1, 4] = value
    with pytest.raises(NonFinite):
        sample(rows, [GREEDY] * 3, [0] * 3)


def test_only_admitted_sequences_are_sampled() -> None:
    made = Sampler()
    with pytest.raises(StepRefused, match="slot 3: expected an admitted sequence"):
        made.sample(logits(1), [Draw(3, 5)])
    made.admit(Admission(3, GREEDY, 5))
    made.sample(logits(1), [Draw(3, 5)])
    with pytest.raises(StepRefused, match="from position 5 on, found 4"):
        made.sample(logits(1), [Draw(3, 4)])
    made.reset()
    with pytest.raises(StepRefused):
        made.sample(logits(1), [Draw(3, 5)])


# -- what changes logits ---------------------------------------------------------------------------


def adjusted(
    row: torch.Tensor,
    wanted: SamplingParameters,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> torch.Tensor:
    """What of the logits is drawn from, seen through the module's own seam."""
    made = Sampler()
    made.admit(Admission(0, wanted, len(prompt), tuple(prompt), tuple(output)))
    rows = row[None].clone()
    made.sample(rows, [Draw(0, len(prompt) + len(output))])
    return rows[0]


def test_repetition_penalty_is_that_of_transformers() -> None:
    row = logits(1)[0]
    prompt, output = [3, 9, 9, 41], [7, 3, 22, 7]
    for penalty in (0.5, 1.2, 3.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([prompt + output]), row[None].clone()
        )
        found = adjusted(row, parameters(repetition_penalty=penalty), prompt, output)
        torch.testing.assert_close(found, expected[0])


def test_bias_is_that_of_transformers() -> None:
    row = logits(1)[0]
    bias = ((4, 7.5), (0, -100.0), (49, 100.0))
    expected = SequenceBiasLogitsProcessor({(token,): value for token, value in bias})(
        torch.tensor([[1]]), row[None].clone()
    )
    torch.testing.assert_close(adjusted(row, parameters(logit_bias=bias)), expected[0])


@pytest.mark.parametrize("drawn", [0, 2, 3, 4])
def test_end_tokens_before_the_least_length_are_those_of_transformers(drawn: int) -> None:
    row = logits(1)[0]
    prompt, output = [5, 6], list(range(10, 10 + drawn))
    expected = MinNewTokensLengthLogitsProcessor(len(prompt), 3, [8, 2], device="cpu")(
        torch.tensor([prompt + output]), row[None].clone()
    )
    made = Sampler()
    made.admit(Admission(0, parameters(min_tokens=3, end_tokens=(8, 2)), len(prompt)))
    rows = row[None].clone()
    made.sample(rows, [Draw(0, len(prompt) + drawn)])
    assert torch.equal(rows, expected)


def test_presence_and_frequency_are_openai_s_formula() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting the output only."""
    row = logits(1)[0]
    wanted = parameters(presence_penalty=0.7, frequency_penalty=-0.4)
    expected = row.clone()
    for token, count in ((7, 2), (22, 1)):
        expected[token] -= -0.4 * count + 0.7
    torch.testing.assert_close(adjusted(row, wanted, [3, 9], [7, 22, 7]), expected)


def test_greedy_with_penalties_and_bias_takes_the_largest_of_what_is_left() -> None:
    row = torch.zeros(1, V)
    row[0, 5], row[0, 6], row[0, 7] = 3.0, 2.5, 1.0
    found = []
    made = Sampler()
    made.admit(Admission(0, parameters(temperature=0.0, frequency_penalty=0.4), 1))
    for position in range(1, 9):
        found += made.sample(row.clone(), [Draw(0, position)])[0]
    assert found == [5, 5, 6, 5, 6, 5, 6, 5]
    assert tokens(row, [parameters(temperature=0.0, logit_bias=((7, 2.5),))], [0]) == [7]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_sequence_admitted_again_goes_on_as_if_nothing_had_happened(data: st.DataObject) -> None:
    """Whatever its parameters, and in whatever slot: preemption and recovery change no token."""
    wanted = parameters(
        temperature=data.draw(st.sampled_from([0.0, 0.8])),
        top_p=data.draw(st.sampled_from([0.7, 1.0])),
        presence_penalty=data.draw(st.sampled_from([0.0, 1.5])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.6])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.4])),
        logit_bias=data.draw(st.sampled_from([(), ((3, 4.0), (8, -3.0))])),
        min_tokens=data.draw(st.integers(0, 6)),
        end_tokens=(1, 2),
        seed=data.draw(st.integers(0, 2**64 - 1)),
    )
    prompt = tuple(data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=5)))
    rows = logits(12, vocabulary=12)

    def draw(made: Sampler, slot: int, output: list[int]) -> int:
        position = len(prompt) + len(output)
        row = rows[len(output)][None].clone()
        return made.sample(row, [Draw(slot, position)])[0][0]

    def admission(slot: int, output: list[int]) -> Admission:
        return Admission(
            slot,
            wanted,
            len(prompt),
            prompt if wanted.counts_prompt else (),
            tuple(output) if wanted.counts_output else (),
        )

    undisturbed = Sampler()
    undisturbed.admit(admission(0, []))
    expected: list[int] = []
    for _ in range(12):
        expected.append(draw(undisturbed, 0, expected))
    disturbed, slot = Sampler(), 0
    disturbed.admit(admission(0, []))
    found: list[int] = []
    for _ in range(12):
        if data.draw(st.booleans()):
            slot = data.draw(st.integers(0, 3))
            disturbed.admit(admission(slot, found))
        found.append(draw(disturbed, slot, found))
    assert found == expected


# -- logprobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [3, V, 4000])
def test_logprobs_are_of_the_raw_logits(vocabulary: int) -> None:
    rows = logits(3, vocabulary=vocabulary)
    wanted = [
        parameters(logprobs=0, temperature=0.2, top_k=2),
        parameters(),
        parameters(logprobs=20, temperature=0.0, logit_bias=((1, 50.0),)),
    ]
    found, logprobs = sample(rows, wanted, [9, 9, 9])
    expected = torch.log_softmax(rows.double(), -1)
    first, none, third = logprobs
    assert none is None and first is not None and third is not None
    assert first.chosen == pytest.approx(float(expected[0, found[0]]), abs=1e-5)
    assert first.alternatives == ()
    assert found[2] == 1
    assert third.chosen == pytest.approx(float(expected[2, 1]), abs=1e-5)
    values, ids = expected[2].topk(min(20, vocabulary))
    assert [token for token, _ in third.alternatives] == ids.tolist()
    assert [value for _, value in third.alternatives] == pytest.approx(values.tolist(), abs=1e-5)


def test_alternatives_of_equal_logits_are_in_order_of_their_ids() -> None:
    wanted = [parameters(logprobs=5)] * 2
    rows = torch.stack([torch.zeros(3000), torch.zeros(3000).index_fill(0, torch.tensor([7]), 2)])
    _, (flat, peaked) = sample(rows, wanted, [0, 0])
    assert [token for token, _ in flat.alternatives] == [0, 1, 2, 3, 4]
    assert [token for token, _ in peaked.alternatives] == [7, 0, 1, 2, 3]
    # All of the probability on one token: none above 1.
    sure = torch.full((1, 3000), -200.0)
    sure[0, 9] = 200.0
    _, (entry,) = sample(sure, wanted[:1], [0])
    assert entry.chosen == 0.0 and all(value <= 0 for _, value in entry.alternatives)


def test_the_order_of_reading_candidates_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the search for what is kept stops, the token is the same."""
    rows = logits(40, vocabulary=2000).bfloat16().float()
    wanted = [MIXED[row % 8] for row in range(40)]
    expected = sample(rows, wanted, range(10, 50), [[1]] * 40)
    for candidates in ((64,), (1999, 2000), (64, 128, 256, 512)):
        monkeypatch.setattr(sampler, "_CANDIDATES", candidates)
        assert sample(rows, wanted, range(10, 50), [[1]] * 40) == expected
