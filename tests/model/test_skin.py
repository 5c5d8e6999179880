"""Lists with a skin are exact while atoms move, and are built again only when they must be."""

import dataclasses

import numpy as np
import pytest

from equipot.model.batch import Graph, System, build_graph
from equipot.model.errors import ModelError
from equipot.model.skin import Followed, SkinnedNeighbors, follow, follow_all


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


def lists(count: int, skin: float = 0.5) -> list[SkinnedNeighbors]:
    return [SkinnedNeighbors(4.0, skin=skin) for _ in range(count)]


def assert_exact(found: list[Graph], systems: list[System]) -> None:
    for graph, system in zip(found, systems, strict=True):
        fresh = build_graph(system, 4.0)
        assert graph.n_edges == fresh.n_edges
        assert edges(graph) == edges(fresh)
        assert (np.diff(graph.receivers) >= 0).all()


def test_lists_are_exact_along_a_random_walk_of_atoms_and_cells_in_changing_company() -> None:
    rng = np.random.default_rng(9)
    systems = make_systems()
    kept, calls = lists(len(systems), 0.6), 40
    for call in range(calls):
        # Whoever comes, in whatever order: each list is its structure's own.
        some = rng.permutation(len(systems))[: rng.integers(1, len(systems) + 1)] if call else range(4)
        assert_exact(
            follow_all([systems[place] for place in some], [kept[place] for place in some]),
            [systems[place] for place in some],
        )
        systems = [moved(s, rng.normal(scale=0.03, size=s.positions.shape)) for s in systems]
        strain = np.eye(3) + rng.normal(scale=2e-3, size=(3, 3))
        # With its atoms and without them.
        systems[2] = dataclasses.replace(
            systems[2],
            cell=systems[2].cell @ strain,
            positions=systems[2].positions @ (strain if call % 2 else np.eye(3)),
        )
    built = [one.n_built for one in kept]
    assert all(1 <= count < calls / 3 for count in built)
    assert sum(built) > len(kept)


@pytest.mark.parametrize("squeeze", [0.85, 0.9, 1.03, 1.2])
def test_a_cell_that_changes_at_once_hides_no_pair(squeeze: float) -> None:
    system = make_systems()[2]
    kept = lists(1)
    follow_all([system], kept)
    strain = np.diag([squeeze, 1.0, 1.0])
    strained = dataclasses.replace(system, cell=system.cell @ strain, positions=system.positions @ strain)
    assert_exact(follow_all([strained], kept), [strained])
    assert kept[0].n_built == (2 if squeeze < 4.0 / 4.5 else 1)


def test_what_does_not_follow_is_built_anew_and_admitted_anew() -> None:
    systems = make_systems()
    kept = lists(len(systems))
    seen: list[System] = []

    def admit(system: System) -> System | str:
        seen.append(system)
        return "too many" if system.n_atoms == 2 else dataclasses.replace(system, spin_multiplicity=1)

    for _ in range(2):
        found = follow(systems, kept, admit)
        assert found[2] == "too many"
        graphs = [one.graph for one in found if isinstance(one, Followed)]
        assert_exact(graphs, [systems[place] for place in (0, 1, 3)])
        assert {graph.system.spin_multiplicity for graph in graphs} == {1}
    assert [one.n_built for one in kept] == [1, 1, 0, 1]
    # Whoever was refused is looked at again, the others are not.
    assert [system.n_atoms for system in seen] == [27, 27, 2, 1, 2]
    strained = dataclasses.replace(systems[1], cell=1.01 * systems[1].cell)
    renamed = dataclasses.replace(systems[0], atomic_numbers=systems[0].atomic_numbers + 1)
    found = follow([renamed, strained], kept[:2], admit)
    assert_exact([one.graph for one in found if isinstance(one, Followed)], [renamed, strained])
    assert [one.n_built for one in kept[:2]] == [2, 2]


def test_the_shortest_edge_is_told() -> None:
    systems = make_systems()
    found = follow(systems, lists(len(systems)), lambda system: system)
    for one, system in zip(found, systems, strict=True):
        assert isinstance(one, Followed)
        vectors = build_graph(system, 4.0).vectors()
        expected = (vectors**2).sum(1).min() if len(vectors) else np.inf
        assert one.shortest_squared == pytest.approx(expected, rel=1e-12)


def test_atoms_moved_in_place_are_noticed() -> None:
    system, kept = make_systems()[0], lists(1)
    follow_all([system], kept)
    system.positions[0] += 1.0
    assert_exact(follow_all([system], kept), [system])
    assert kept[0].n_built == 2


@pytest.mark.parametrize(("cutoff", "skin"), [(0.0, 0.5), (5.0, -0.1), (float("nan"), 0.5)])
def test_lengths_that_make_no_sense_are_refused(cutoff: float, skin: float) -> None:
    with pytest.raises(ModelError, match="skin"):
        SkinnedNeighbors(cutoff, skin=skin)
