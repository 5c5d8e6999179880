"""Lists with a skin are exact while atoms move, and are built again only when they must be."""

import dataclasses

import numpy as np
import pytest

from equipot.model.batch import Graph, System, build_graph
from equipot.model.errors import ModelError
from equipot.model.skin import SkinnedNeighbors


def make_systems() -> list[System]:
    rng = np.random.default_rng(4)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
    cluster = 1.7 * grid + rng.uniform(-0.2, 0.2, grid.shape)
    ones = np.ones(27, dtype=np.int64)
    skewed = np.array([[3.0, 0, 0], [0.9, 3.1, 0], [0.3, -0.4, 2.9]])
    return [
        System(ones, cluster, np.zeros((3, 3)), np.zeros(3, dtype=bool)),
        System(ones, cluster, 5.2 * np.eye(3), np.array([True, True, False])),
        System(ones[:2], cluster[:2], skewed, np.ones(3, dtype=bool)),
        System(ones[:1], cluster[:1], np.zeros((3, 3)), np.zeros(3, dtype=bool)),
    ]


def edges(graph: Graph) -> set[tuple[int, ...]]:
    columns = np.column_stack([graph.receivers, graph.senders, graph.cell_shifts])
    return {tuple(row) for row in columns.tolist()}


def moved(system: System, step: np.ndarray) -> System:
    return dataclasses.replace(system, positions=system.positions + step)


def test_lists_are_exact_along_a_random_walk() -> None:
    rng = np.random.default_rng(9)
    systems, kept = make_systems(), SkinnedNeighbors(4.0, skin=0.6)
    calls = 40
    for _ in range(calls):
        found = kept.graphs(systems)
        for graph, system in zip(found, systems, strict=True):
            fresh = build_graph(system, 4.0)
            assert graph.n_edges == fresh.n_edges
            assert edges(graph) == edges(fresh)
            assert (np.diff(graph.receivers) >= 0).all()
        systems = [moved(s, rng.normal(scale=0.03, size=s.positions.shape)) for s in systems]
    assert len(systems) < kept.n_built < len(systems) * calls / 4


def test_what_does_not_follow_is_built_anew() -> None:
    systems, kept = make_systems(), SkinnedNeighbors(4.0)
    kept.graphs(systems)
    kept.graphs(systems)
    assert kept.n_built == len(systems)
    strained = dataclasses.replace(systems[1], cell=1.01 * systems[1].cell)
    assert edges(kept.graphs([systems[0], strained])[1]) == edges(build_graph(strained, 4.0))
    assert kept.n_built == len(systems) + 1
    assert edges(kept.graphs([systems[2]])[0]) == edges(build_graph(systems[2], 4.0))


def test_atoms_moved_in_place_are_noticed() -> None:
    system, kept = make_systems()[0], SkinnedNeighbors(4.0)
    kept.graphs([system])
    system.positions[0] += 1.0
    assert edges(kept.graphs([system])[0]) == edges(build_graph(system, 4.0))
    assert kept.n_built == 2


@pytest.mark.parametrize(("cutoff", "skin"), [(0.0, 0.5), (5.0, -0.1), (float("nan"), 0.5)])
def test_lengths_that_make_no_sense_are_refused(cutoff: float, skin: float) -> None:
    with pytest.raises(ModelError, match="skin"):
        SkinnedNeighbors(cutoff, skin=skin)
