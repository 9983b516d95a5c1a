"""The sampler: distribution, limits, and independence of everything but seed and position."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.stage.errors import NonFinite
from runtime.stage.sampler import sample, uniform
from security.channel.frame import SamplingParameters

V = 50


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def parameters(
    temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 1
) -> SamplingParameters:
    return SamplingParameters(temperature, top_p, top_k, seed)


def draws(row: torch.Tensor, wanted: SamplingParameters, count: int = 4000) -> torch.Tensor:
    tokens = sample(row.expand(count, -1), [wanted] * count, range(count))
    return torch.bincount(torch.tensor(tokens), minlength=row.shape[0]) / count


def test_uniform_numbers_are_fixed_for_all_time() -> None:
    # Other numbers would change the tokens of a sequence that is recomputed by a newer release.
    assert uniform(0, 0) == 0.7189092809650481
    assert uniform(2**64 - 1, 2**32) == uniform(2**64 - 1, 2**32)
    numbers = [uniform(seed, position) for seed in range(20) for position in range(200)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


def test_temperature_zero_takes_the_largest() -> None:
    rows = logits(6)
    assert sample(rows, [parameters(temperature=0.0)] * 6, [0] * 6) == rows.argmax(-1).tolist()


def test_frequencies_follow_the_softmax() -> None:
    row = logits(1)[0]
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(row / temperature, -1)
        found = draws(row, parameters(temperature=temperature))
        assert (found - expected).abs().sum() < 0.1


@pytest.mark.parametrize("top_k", [1, 5, V, V + 7])
def test_top_k(top_k: int) -> None:
    row = logits(1)[0]
    allowed = torch.topk(row, min(top_k, V))
    expected = torch.zeros(V).index_copy(0, allowed.indices, torch.softmax(allowed.values, -1))
    found = draws(row, parameters(top_k=top_k))
    assert (found - expected).abs().sum() < 0.1
    assert not found[expected == 0].any()


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9])
@pytest.mark.parametrize("top_k", [0, 10])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, top_k: int) -> None:
    row = logits(1)[0]
    probabilities, order = torch.softmax(row, -1).sort(descending=True)
    if top_k:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    kept = (probabilities.cumsum(0) - probabilities < top_p) & (probabilities > 0)
    found = draws(row, parameters(top_p=top_p, top_k=top_k))
    assert not found[order[~kept]].any()
    expected = probabilities[kept] / probabilities[kept].sum()
    assert (found[order[kept]] - expected).abs().sum() < 0.1


def test_a_flat_and_large_vocabulary_is_sorted_in_full() -> None:
    row = torch.zeros(5000)
    row[4000] = 1.0
    found = draws(row, parameters(top_p=0.9), count=2000)
    assert int((found > 0).sum()) > 1024


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = logits(8)
    wanted = [
        parameters(0.0),
        parameters(0.7, 0.9, 0, 5),
        parameters(1.3, 1.0, 4, 6),
        parameters(0.9, 0.8, 9, 2**64 - 1),
    ] * 2
    positions = [3, 9, 4, 77, 1, 2, 10**6, 0]
    together = sample(rows, wanted, positions)
    alone = [sample(rows[row : row + 1], [wanted[row]], [positions[row]])[0] for row in range(8)]
    assert together == alone
    backwards = sample(rows.flip(0), wanted[::-1], positions[::-1])
    assert backwards[::-1] == together


def test_seed_and_position_matter() -> None:
    row = torch.zeros(1, V)
    tokens = [sample(row, [parameters(seed=seed)], [7])[0] for seed in range(30)]
    assert len(set(tokens)) > 10
    tokens = [sample(row, [parameters()], [position])[0] for position in range(30)]
    assert len(set(tokens)) > 10


def test_extreme_temperatures_stay_finite() -> None:
    row = logits(1)
    assert sample(row, [parameters(temperature=1e-300)], [0]) == row.argmax(-1).tolist()
    assert 0 <= sample(row, [parameters(temperature=1e300)], [0])[0] < V


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_an_error(value: float) -> None:
    rows = logits(3)
    rows[1, 4] = value
    with pytest.raises(NonFinite):
        sample(rows, [parameters(temperature=0.0)] * 3, [0] * 3)
