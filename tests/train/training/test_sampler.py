"""Who is trained on when: by seed and step alone, evenly divided, nobody twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from equipot.train.recipe import RecipeError
from equipot.train.sampler import Position, Sampler, divide


def make(n: int = 50, structures: int = 8, seed: int = 5) -> Sampler:
    indices = np.stack([np.arange(n) % 3, np.arange(n) * 7], axis=1)
    costs = np.random.default_rng(0).integers(0, 1000, n)
    return Sampler(indices, costs, structures=structures, seed=seed)


def keys(parts: list[NDArray[np.int64]]) -> set[tuple[int, int]]:
    return {(int(store), int(index)) for part in parts for store, index in part}


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 3)])
def test_the_global_batch_does_not_depend_on_how_it_is_divided(ranks: int, accumulation: int) -> None:
    for step in (0, 1, 7, 100):
        whole = make().micro_batches(step, rank=0, ranks=1, accumulation=1)
        parts = [
            part
            for rank in range(ranks)
            for part in make().micro_batches(step, rank=rank, ranks=ranks, accumulation=accumulation)
        ]
        assert len(parts) == ranks * accumulation
        assert all(len(part) for part in parts)
        assert sum(len(part) for part in parts) == 8
        assert keys(parts) == keys(whole)


def test_an_epoch_visits_nobody_twice_and_the_next_one_otherwise() -> None:
    sampler = make()
    assert sampler.steps_per_epoch == 6
    first = [tuple(sampler.global_batch(step)) for step in range(6)]
    second = [tuple(sampler.global_batch(step)) for step in range(6, 12)]
    assert len({row for batch in first for row in batch}) == 48
    assert first != second
    assert sampler.position(13) == Position(epoch=2, offset=1)
    assert tuple(make(seed=6).global_batch(0)) != first[0]


def test_a_step_is_found_without_the_steps_before() -> None:
    walked = make()
    for step in range(9):
        walked.global_batch(step)
    assert np.array_equal(walked.global_batch(9), make().global_batch(9))


def test_a_batch_larger_than_the_split_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"batch\.structures = 51 .* 50 structures .* ≤ 50"):
        make(structures=51)


@given(costs=st.lists(st.integers(0, 10_000), min_size=1, max_size=60), parts=st.integers(1, 8))
def test_division_is_a_partition_near_the_best(costs: list[int], parts: int) -> None:
    divided = divide(np.array(costs), parts)
    assert sorted(np.concatenate(divided).tolist()) == list(range(len(costs)))
    if len(costs) >= parts:
        assert all(len(part) for part in divided)
    loads = [sum(costs[i] for i in part) for part in divided]
    bound = max(max(costs), sum(costs) / parts)
    assert max(loads) <= 4 / 3 * bound + max(costs) / 3 + 1e-9
