"""The bound on a structure's edges is a bound, and it is cheap for structures that are not."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from equipot.model.batch import System, build_graph
from equipot.serve.footprint import footprint

CUTOFF = 4.0


def system(positions: np.ndarray, cell: np.ndarray, pbc: list[bool]) -> System:
    numbers = np.ones(len(positions), dtype=np.int64)
    return System(atomic_numbers=numbers, positions=positions, cell=cell, pbc=np.array(pbc))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_atoms=st.integers(1, 40),
    size=st.floats(1.0, 30.0),
    skew=st.floats(0.0, 0.8),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    spread=st.floats(0.1, 3.0),
)
def test_no_structure_has_more_edges_than_counted_pairs(
    seed: int, n_atoms: int, size: float, skew: float, pbc: tuple[bool, bool, bool], spread: float
) -> None:
    random = np.random.default_rng(seed)
    cell = size * (np.diag(random.uniform(0.5, 2.0, 3)) + skew * np.triu(random.uniform(-1, 1, (3, 3)), 1))
    some = system(random.uniform(-spread, spread, (n_atoms, 3)) @ cell, cell, list(pbc))
    n_edges = build_graph(some, CUTOFF).n_edges
    assert n_edges <= footprint(some, CUTOFF, enough=0).pairs
    assert n_edges <= footprint(some, CUTOFF, enough=np.inf).pairs


def test_the_estimate_is_right_for_an_even_crystal() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(10)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for pbc in ([True] * 3, [True, True, False]):
        some = system(2.0 * grid, 20.0 * np.eye(3), pbc)
        n_edges = build_graph(some, CUTOFF).n_edges
        assert 0.5 * n_edges < footprint(some, CUTOFF, enough=0).edges < 2.0 * n_edges


def test_a_cell_shorter_than_the_cutoff_is_estimated_by_its_images() -> None:
    some = system(np.zeros((1, 3)), 0.5 * np.eye(3), [True] * 3)
    n_edges = build_graph(some, CUTOFF).n_edges
    assert n_edges > 2_000
    assert 0.8 * n_edges < footprint(some, CUTOFF, enough=0).edges < 1.2 * n_edges


def test_hostile_structures_are_counted_at_once() -> None:
    random = np.random.default_rng(0)
    hostile = [
        system(random.uniform(0, 0.2, (5, 3)), 0.02 * np.eye(3), [True] * 3),
        system(np.zeros((1, 3)), 1e-6 * np.eye(3), [True, False, False]),
        system(random.uniform(0, 3, (20_000, 3)), np.zeros((3, 3)), [False] * 3),
        system(random.uniform(-1e6, 1e6, (20_000, 3)), np.zeros((3, 3)), [False] * 3),
        system(random.uniform(0, 100, (20_000, 3)), 100 * np.eye(3), [True] * 3),
    ]
    started = time.perf_counter()
    counted = [footprint(some, CUTOFF, enough=1e6) for some in hostile]
    assert time.perf_counter() - started < 2.0
    assert [cost.edges > 1e6 for cost in counted] == [True, True, True, False, False]
