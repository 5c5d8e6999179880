"""Who is trained on when: by seed and step alone, evenly divided, nobody twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from equipot.train.divide import divide
from equipot.train.recipe import RecipeError
from equipot.train.sampler import MicroBatch, Position, Sampler
from equipot.train.shuffle import Shuffle


def make(n: int = 50, structures: int = 8, seed: int = 5, limit: int | None = None) -> Sampler:
    indices = np.stack([np.arange(n) % 3, np.arange(n) * 7], axis=1)
    costs = np.random.default_rng(0).integers(1, 1000, n)
    return Sampler(indices, costs, structures=structures, seed=seed, limit=limit)


def keys(parts: list[MicroBatch]) -> list[tuple[int, int]]:
    """Of what counts, in order."""
    return sorted((int(store), int(index)) for part in parts if part.counts for store, index in part.keys)


def of_all_ranks(sampler: Sampler, step: int, ranks: int, accumulation: int) -> list[list[MicroBatch]]:
    return [
        sampler.micro_batches(step, rank=rank, ranks=ranks, accumulation=accumulation)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 4), (2, 3)])
def test_the_global_batch_does_not_depend_on_how_it_is_divided(ranks: int, accumulation: int) -> None:
    for step in (0, 1, 7, 100):
        whole = make().micro_batches(step, rank=0, ranks=1, accumulation=1)
        shares = of_all_ranks(make(), step, ranks, accumulation)
        assert [len(share) for share in shares] == [accumulation] * ranks
        parts = [part for share in shares for part in share]
        assert all(len(part.keys) and part.counts for part in parts)
        assert keys(parts) == keys(whole)
        assert len(keys(parts)) == 8


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [1000, 1700, 4000])
def test_no_micro_batch_is_dearer_than_the_limit(ranks: int, limit: int) -> None:
    sampler = make(n=200, structures=40, limit=limit)
    costs = dict(
        zip((np.arange(200) * 7).tolist(), np.random.default_rng(0).integers(1, 1000, 200), strict=True)
    )
    for step in range(5):
        shares = of_all_ranks(sampler, step, ranks, 1)
        assert len({len(share) for share in shares}) == 1
        parts = [part for share in shares for part in share]
        assert max(sum(costs[index] for index in part.keys[:, 1].tolist()) for part in parts) <= limit
        assert keys(parts) == keys(
            make(n=200, structures=40).micro_batches(step, rank=0, ranks=1, accumulation=1)
        )


def test_ranks_that_run_out_of_structures_stay_in_step() -> None:
    costs = np.array([900, 900, 900])
    sampler = Sampler(np.array([(0, 0), (0, 1), (0, 2)]), costs, structures=3, seed=0, limit=1000)
    shares = of_all_ranks(sampler, 0, 2, 1)
    assert [len(share) for share in shares] == [2, 2]
    assert sorted(part.counts for share in shares for part in share) == [False, True, True, True]
    assert keys(shares[0] + shares[1]) == [(0, 0), (0, 1), (0, 2)]


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


def test_what_the_sampler_is_given_is_only_looked_at_where_it_is_needed() -> None:
    class Watched:
        seen = 0

        def __len__(self) -> int:
            return 40_000_000

        def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint32]:
            self.seen += len(rows)
            return np.stack([rows % 5, rows], axis=1).astype(np.uint32)

    class Costs(Watched):
        def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint32]:
            self.seen += len(rows)
            return (rows % 1000 + 1).astype(np.uint32)

    indices, costs = Watched(), Costs()
    sampler = Sampler(indices, costs, structures=64, seed=0)
    (batch,) = sampler.micro_batches(3_000_000, rank=1, ranks=2, accumulation=1)
    assert batch.keys.dtype == np.int64
    assert indices.seen == costs.seen == 64


def test_ranks_are_even_on_molecules_among_slabs() -> None:
    random = np.random.default_rng(0)
    molecules, slabs = random.integers(60, 400, 3000), random.integers(1500, 6000, 3000)
    costs = np.concatenate([molecules, slabs])
    indices = np.stack([np.zeros(6000, np.int64), np.arange(6000)], axis=1)
    for ranks, structures in [(1, 32), (2, 32), (3, 32), (8, 64)]:
        sampler = Sampler(indices, costs, structures=structures, seed=1)
        dearest = mean = 0.0
        for step in range(20):
            loads = [costs[share[0].keys[:, 1]].sum() for share in of_all_ranks(sampler, step, ranks, 1)]
            dearest, mean = dearest + max(loads), mean + float(np.mean(loads))
        assert dearest / mean < 1.02


@settings(deadline=None)  # a busy machine is no mistake of the shuffle
@given(n=st.integers(1, 400), seed=st.integers(0, 2**32))
def test_a_shuffle_is_a_permutation_wherever_it_is_looked_at(n: int, seed: int) -> None:
    whole = Shuffle(n, [seed, 1])[np.arange(n)]
    assert sorted(whole.tolist()) == list(range(n))
    some = np.array([n - 1, 0, n // 2])
    assert Shuffle(n, [seed, 1])[some].tolist() == whole[some].tolist()


def test_all_orders_are_about_equally_likely() -> None:
    orders = [tuple(Shuffle(4, [seed, 0])[np.arange(4)].tolist()) for seed in range(4800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert np.square(counts - 200).sum() / 200 < 23 + 5 * np.sqrt(2 * 23)  # χ², five sigma


@settings(deadline=None)
@given(costs=st.lists(st.integers(0, 10_000), min_size=1, max_size=60), parts=st.integers(1, 8))
def test_division_is_a_partition_near_the_best(costs: list[int], parts: int) -> None:
    divided = divide(np.array(costs), parts)
    assert sorted(np.concatenate(divided).tolist()) == list(range(len(costs)))
    if len(costs) >= parts:
        assert all(len(part) for part in divided)
    loads = [sum(costs[i] for i in part) for part in divided]
    bound = max(max(costs), sum(costs) / parts)
    assert max(loads) <= 4 / 3 * bound + max(costs) / 3 + 1e-9
