"""vesin behind our signature against every pair in every image."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from equipot.model.neighbors import NeighborList, brute_force_neighbor_list, neighbor_list

ISOLATED = np.zeros((3, 3)), np.zeros(3, dtype=bool)


def as_set(edges: NeighborList) -> set[tuple[int, ...]]:
    rows = np.column_stack([edges.receivers, edges.senders, edges.cell_shifts])
    found = set(map(tuple, rows.tolist()))
    assert len(found) == len(rows), "an edge comes twice"
    return found


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    while True:
        cell = rng.normal(size=(3, 3)) * rng.uniform(1.0, 4.0)
        if abs(np.linalg.det(cell)) > 4.0:
            break
    pbc = rng.random(3) < 0.6
    if rng.random() < 0.5:
        cell = cell * pbc[:, None]
    positions = rng.uniform(-5.0, 5.0, size=(int(rng.integers(1, 7)), 3))
    return positions, cell, pbc, float(rng.uniform(1.5, 4.5))


@pytest.mark.parametrize("block", range(4))
def test_equals_brute_force_in_small_skewed_and_mixed_cells(block: int) -> None:
    several_images = 0
    for seed in range(60 * block, 60 * (block + 1)):
        positions, cell, pbc, cutoff = random_case(seed)
        edges = neighbor_list(positions, cell, pbc, cutoff)
        assert as_set(edges) == as_set(brute_force_neighbor_list(positions, cell, pbc, cutoff)), f"{seed=}"
        assert (np.diff(edges.receivers) >= 0).all()
        several_images += int((abs(edges.cell_shifts) > 1).any())
    assert several_images > 10, "the cells were too large to see second images"


def test_shifts_belong_to_the_sender() -> None:
    positions = np.array([[0.1, 0.0, 0.0], [3.9, 0.0, 0.0]])
    edges = neighbor_list(positions, np.diag([4.0, 0.0, 0.0]), np.array([True, False, False]), 1.0)
    vectors = positions[edges.senders] + edges.cell_shifts @ np.diag([4.0, 0, 0]) - positions[edges.receivers]
    np.testing.assert_allclose(vectors, [[-0.2, 0, 0], [0.2, 0, 0]], atol=1e-12)
    assert edges.receivers.tolist() == [0, 1]


@pytest.mark.parametrize("n_atoms", [0, 1])
def test_no_edges_without_a_pair(n_atoms: int) -> None:
    edges = neighbor_list(np.zeros((n_atoms, 3)), *ISOLATED, 5.0)
    assert edges.senders.shape == (0,)
    assert edges.cell_shifts.shape == (0, 3)


def test_one_atom_in_a_small_cell_sees_its_images() -> None:
    edges = neighbor_list(np.zeros((1, 3)), np.eye(3), np.ones(3, dtype=bool), 1.5)
    assert len(edges.senders) == 6 + 12


def test_atoms_far_apart_and_far_from_the_origin() -> None:
    positions = np.array([[0, 0, 0], [1e5, 0, 0], [1e5 + 1, 0, 0], [-1e5, 1e5, 1e5]], dtype=float)
    edges = neighbor_list(positions, *ISOLATED, 5.0)
    assert as_set(edges) == {(1, 2, 0, 0, 0), (2, 1, 0, 0, 0)}


def test_atoms_outside_their_cell_are_found_through_it() -> None:
    cell, pbc = 3.0 * np.eye(3), np.ones(3, dtype=bool)
    inside = np.array([[0.2, 0.2, 0.2], [1.4, 1.5, 1.6]])
    outside = inside + np.array([[0, 0, 0], [300.0, -60.0, 9.0]])
    shifted = {
        (i, j, sx + (i - j) * 100, sy - (i - j) * 20, sz + (i - j) * 3)
        for i, j, sx, sy, sz in as_set(neighbor_list(inside, cell, pbc, 4.0))
    }
    assert as_set(neighbor_list(outside, cell, pbc, 4.0)) == shifted


def test_results_outlive_the_next_call_and_other_threads() -> None:
    cases = [random_case(seed) for seed in range(40)]
    expected = [as_set(brute_force_neighbor_list(*case)) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: neighbor_list(*case), cases * 5))
    assert [as_set(edges) for edges in found] == expected * 5
