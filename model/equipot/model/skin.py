"""Neighbour lists of structures that move little between calls. Knows nothing of torch.

A list is built for the cutoff and a skin around it, and serves, filtered by distance, until an atom has moved
half the skin since then (Verlet, "Computer experiments on classical fluids", 1967). It is exact at any time,
and its edges have one order whenever it was built, so that sums over them have the same bits.

A cell may deform meanwhile. With F what turns the old lattice vectors into the new ones, two images at a
distance d stand at σ_min(F)·d or more where atoms follow the cell, so a list of reach c + s has all pairs
within c as long as σ_min(F)·(c + s) − 2u ≥ c for atoms that have gone u astray from that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import Graph, System
from equipot.model.errors import ModelError
from equipot.model.neighbors import NeighborList, neighbor_list

RefusalT = TypeVar("RefusalT")

Claim = Callable[[int], bool]
"""Asks whether so many bytes more may be kept, or says that so many less are: then True."""

OWN_BYTES = 2_000
"""That a list takes beside its numbers."""


class SkinnedNeighbors:
    """The neighbour list of one structure that its owner keeps between calls.

    One for each structure of a trajectory or relaxation, used by one thread at a time.
    """

    def __init__(self, cutoff: float, *, skin: float = 0.5, claim: Claim | None = None) -> None:
        """A list for a cutoff in Å.

        Args:
            cutoff: the model's.
            skin: in Å; more means rarer rebuilding and more pairs to filter. 0 rebuilds on every move.
            claim: asked, in any thread, before what was built is kept; refused, it serves once. None: always.

        Raises:
            ModelError: a cutoff that is not positive, or a negative skin.
        """
        if not cutoff > 0 or not skin >= 0:
            raise ModelError(
                f"neighbours: cutoff is {cutoff} Å and skin {skin} Å; give cutoff > 0 and skin ≥ 0"
            )
        self.cutoff, self.skin = cutoff, skin
        self.n_built = 0
        """How many lists were built since the start."""
        self._reference: _Reference | None = None
        self._claim = claim
        self._claimed = 0

    @property
    def reach(self) -> float:
        """Å, of the cutoff and the skin."""
        return self.cutoff + self.skin

    @property
    def reference(self) -> "_Reference":
        """What was built last."""
        assert self._reference is not None
        return self._reference

    def like(self, system: System) -> bool:
        """Whether the system is, but for where its atoms and lattice vectors are, the one of the list."""
        if self._reference is None:
            return False
        old = self._reference.given
        return (
            bool(old.n_atoms)
            and system.positions.shape == old.positions.shape
            and system.cell.shape == (3, 3)
            and system.atomic_numbers.tobytes() == old.atomic_numbers.tobytes()
            and system.pbc.tobytes() == old.pbc.tobytes()
            and system.charge == old.charge
            and system.spin_multiplicity == old.spin_multiplicity
            and system.level_of_theory == old.level_of_theory
        )

    def build(self, given: System, admitted: System, reach: float) -> None:
        """Makes the list anew where the atoms are now, of all pairs within so many Å."""
        self.n_built += 1
        wide = _ordered(neighbor_list(given.positions, given.cell, given.pbc, reach))
        # A copy: the caller may move atoms in place.
        then = replace(
            given,
            atomic_numbers=given.atomic_numbers.copy(),
            positions=given.positions.copy(),
            cell=given.cell.copy(),
            pbc=given.pbc.copy(),
        )
        spin = admitted.spin_multiplicity
        self._reference = _Reference(then, spin, reach, wide, wide.cell_shifts @ then.cell)

    def settle(self) -> None:
        """Keeps what was built if there is room for it, and forgets it else."""
        if self._claim is None:
            return
        n_bytes = self.reference.n_bytes
        if self._claim(n_bytes - self._claimed):
            self._claimed = n_bytes
            return
        self.forget()

    def forget(self) -> None:
        """Keeps nothing; what comes next is built anew."""
        if self._claim is not None:
            self._claim(-self._claimed)
        self._reference, self._claimed = None, 0


class Followed(NamedTuple):
    """A system with its edges, and the square of the shortest of them in Å² (infinite without any)."""

    graph: Graph
    shortest_squared: float


def follow(
    systems: Sequence[System],
    kept: Sequence[SkinnedNeighbors],
    admit: Callable[[System], System | RefusalT],
    reach: Callable[[System, SkinnedNeighbors], float] = lambda _, one: one.reach,
) -> list[Followed | RefusalT]:
    """The systems with all their edges shorter than the cutoff, as `build_graph` finds them.

    Args:
        systems: where they are now.
        kept: the list of each, all of one cutoff. One that does not serve is built anew.
        admit: called with a system before its list is built: the system as the model is to see it, or why it
            is refused, which then stands in its place. One that has moved little since is admitted unseen.
        reach: called with one that was admitted and its list: how far that is to reach, in Å; by default as
            far as cutoff and skin, never less than the cutoff.
    """
    admitted: list[System | RefusalT] = list(systems)
    serves, built = _serve(systems, kept), []
    for place, (system, one) in enumerate(zip(systems, kept, strict=True)):
        if not serves[place]:
            answer = admitted[place] = admit(system)
            if isinstance(answer, System):
                one.build(system, answer, reach(system, one))
                built.append(one)
        elif (spin := one.reference.spin_multiplicity) != system.spin_multiplicity:
            admitted[place] = replace(system, spin_multiplicity=spin)
    good = [(one, of) for one, of in zip(admitted, kept, strict=True) if isinstance(one, System)]
    found = iter(_within([system for system, _ in good], [of for _, of in good]))
    for one in built:
        one.settle()
    return [next(found) if isinstance(one, System) else one for one in admitted]


def follow_all(systems: Sequence[System], kept: Sequence[SkinnedNeighbors]) -> list[Graph]:
    """`follow` for systems that are known to be good."""
    return [one.graph for one in follow(systems, kept, lambda system: system) if isinstance(one, Followed)]


@dataclass(frozen=True, slots=True, eq=False)
class _Reference:
    """One structure as it was when its list was built, and that list."""

    given: System
    spin_multiplicity: int
    reach: float
    """Å."""
    wide: NeighborList
    shifts: NDArray[np.float64]
    """(n_edges, 3) Å: what the shifts came to with its cell."""

    @property
    def n_bytes(self) -> int:
        """Of memory."""
        own = (self.given.atomic_numbers, self.given.positions, *self.wide, self.shifts)
        return OWN_BYTES + sum(array.nbytes for array in own)


def _serve(systems: Sequence[System], kept: Sequence[SkinnedNeighbors]) -> NDArray[np.bool_]:
    """Which of the lists have all neighbours of where the systems are now."""
    serves = np.array([one.like(system) for one, system in zip(kept, systems, strict=True)], dtype=bool)
    places: list[int] = np.flatnonzero(serves).tolist()
    if not places:
        return serves
    now = [systems[place] for place in places]
    then = [kept[place].reference.given for place in places]
    counts = np.array([system.n_atoms for system in now])
    old_positions = np.concatenate([system.positions for system in then])
    cells = np.concatenate([system.cell for system in now]).reshape(-1, 3, 3)
    old_cells = np.concatenate([system.cell for system in then]).reshape(-1, 3, 3)
    narrowed = np.ones(len(places))
    starts = np.cumsum(counts) - counts
    for place in np.flatnonzero((cells != old_cells).any(axis=(1, 2))):
        atoms = slice(starts[place], starts[place] + counts[place])
        deformation, narrowed[place] = _deformation(old_cells[place], cells[place], now[place].pbc)
        old_positions[atoms] = old_positions[atoms] @ deformation
    moved = ((np.concatenate([system.positions for system in now]) - old_positions) ** 2).sum(axis=1)
    astray = np.sqrt(np.maximum.reduceat(moved, starts))
    reach = np.array([kept[place].reference.reach for place in places])
    # What is not finite compares as False.
    serves[places] = narrowed * reach - 2.0 * astray > kept[0].cutoff
    return serves


def _deformation(
    old: NDArray[np.float64], new: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], float]:
    """What turns one cell into the other, and by how much it draws things together at most.

    A cell that has no images in some direction says nothing there: its lists serve no other cell.
    """
    if not (pbc.all() and np.isfinite(new).all()):
        return np.eye(3), -np.inf
    deformation: NDArray[np.float64] = np.linalg.solve(old, new).astype(np.float64, copy=False)
    return deformation, float(np.linalg.svd(deformation, compute_uv=False)[-1])


def _ordered(edges: NeighborList) -> NeighborList:
    """By receiver, sender and image: the search's own order depends on where atoms were in space."""
    order = np.lexsort((*edges.cell_shifts.T, edges.senders, edges.receivers))
    return NeighborList(edges.senders[order], edges.receivers[order], edges.cell_shifts[order])


def _within(systems: Sequence[System], kept: Sequence[SkinnedNeighbors]) -> list[Followed]:
    """Each system with those edges of its list that are shorter than the cutoff, in one go."""
    if not systems:
        return []
    lists = [one.reference.wide for one in kept]
    senders, receivers, cell_shifts = (
        np.concatenate([edges[field] for edges in lists]) for field in range(3)
    )
    n_edges = np.array([len(edges.senders) for edges in lists])
    n_atoms = np.array([system.n_atoms for system in systems])
    ends = np.cumsum(n_edges)
    first_atom = np.repeat(np.cumsum(n_atoms) - n_atoms, n_edges)
    positions = np.concatenate([system.positions for system in systems])
    shifts = np.concatenate(
        [
            one.reference.shifts
            if np.array_equal(system.cell, one.reference.given.cell)
            else one.reference.wide.cell_shifts @ system.cell
            for system, one in zip(systems, kept, strict=True)
        ]
    )
    vectors = positions[senders + first_atom] + shifts - positions[receivers + first_atom]
    squared: NDArray[np.float64] = np.einsum("ek,ek->e", vectors, vectors)
    near = squared < kept[0].cutoff ** 2
    senders, receivers, cell_shifts = senders[near], receivers[near], cell_shifts[near]
    # One more than the last, so that a list without edges at the end has something to point to.
    shortest: NDArray[np.float64] = np.minimum.reduceat(np.append(squared, np.inf), ends - n_edges)
    shortest[n_edges == 0] = np.inf
    bounds = np.concatenate([[0], np.cumsum(near)])[np.concatenate([[0], ends])].tolist()
    return [
        Followed(
            Graph(system, senders[start:stop], receivers[start:stop], cell_shifts[start:stop]), squared_length
        )
        for system, start, stop, squared_length in zip(
            systems, bounds[:-1], bounds[1:], shortest.tolist(), strict=True
        )
    ]
