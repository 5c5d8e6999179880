"""Structures on their way to rest, moved together. Knows neither ASE nor server.

What one of them comes to does not depend on the others, to the bit; see `descent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from equipot.serve.errors import Fault
from equipot.serve.motion.descent import Fire, Lbfgs, Segments, fire, lbfgs
from equipot.serve.motion.notes import Advance, Place
from equipot.serve.motion.progress import Progress, not_finite, out_of_volume
from equipot.serve.motion.relaxing import Relaxing
from equipot.serve.motion.state import FloatArray, State, array_of
from equipot.serve.motion.strain import ROWS, Lattices


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """What is noted on the way.

    Attributes:
        every: how many steps apart progress is noted; 0: never.
        frames: whether that has where the atoms are.
        keep_every: how many steps apart the state is noted; 0: never.
    """

    every: int = 0
    frames: bool = False
    keep_every: int = 0


@dataclass(slots=True, eq=False)
class Relaxation:
    """One structure.

    Attributes:
        positions: (n, 3) Å, where it is.
        cell: (3, 3) Å.
        first_cell: with which it began.
        fixed: (n,) atoms that stay; None if none does.
        coordinates: what the optimiser moves: the positions, or with a cell as `strain` has them, flat.
        deformation: of the cell since it began, (3, 3).
        memory: the optimiser's.
        progress: how far it has come.
        stepped: whether it was moved since it began or was resumed.
        goes_on: whether it is to be computed where it is now.
        fault: why it goes no further.
    """

    positions: FloatArray
    cell: FloatArray
    first_cell: FloatArray
    fixed: npt.NDArray[np.bool_] | None
    coordinates: FloatArray
    deformation: FloatArray
    memory: Fire | Lbfgs
    progress: Progress = field(default_factory=Progress)
    stepped: bool = False
    goes_on: bool = True
    fault: Fault | None = None

    def close(self) -> None:
        """Nothing is held."""


def begun(
    how: Relaxing,
    positions: FloatArray,
    cell: FloatArray,
    fixed: npt.NDArray[np.bool_],
    resumed: State | None = None,
) -> Relaxation:
    """A structure that is to be relaxed so.

    Args:
        how: to relax it.
        positions: (n, 3) Å, as it began.
        cell: (3, 3) Å, as it began.
        fixed: (n,) atoms that stay.
        resumed: the state that it goes on from.

    Raises:
        BadState: the state is not one of such a structure.
    """
    coordinates = positions.ravel()
    if how.moves_cell:
        coordinates = np.concatenate([coordinates, np.zeros(3 * ROWS)])
    memory: Fire | Lbfgs = Fire() if how.optimizer == "fire" else Lbfgs()
    one = Relaxation(positions, cell, cell, fixed if fixed.any() else None, coordinates, np.eye(3), memory)
    if resumed is not None:
        one.progress.resume(resumed, len(positions))
        one.memory = type(memory).restored(resumed, coordinates.size)
        one.positions, one.cell = resumed.arrays["positions"].copy(), resumed.arrays["cell"].copy()
        one.coordinates = one.positions.ravel()
        if how.moves_cell:
            one.coordinates = array_of(resumed, "coordinates", coordinates.shape)
            # It moves by what the stress was there, beside forces.
            array_of(resumed, "stress", (3, 3))
            one.deformation = _lattices([one]).deformations(one.coordinates.reshape(-1, 3))[0]
    return one


def advance(some: Sequence[Relaxation], how: Relaxing, telling: Telling) -> None:
    """Takes in what the structures' positions came to, and moves those on that are not at their end.

    Those of which nothing is known yet stay where they are, to be computed.
    """
    reached = [one for one in some if one.progress.last is not None]
    if not reached:
        return
    with np.errstate(all="ignore"):
        on_atoms, parts = _forces_on_atoms(reached)
        forces, largest = on_atoms, parts.longest(on_atoms)
        most = largest
        if how.moves_cell:
            forces, parts = _forces_on_coordinates(reached, on_atoms, how)
            most = parts.longest(forces)
    for one, largest_force, converged in zip(
        reached, largest.tolist(), (most < how.fmax).tolist(), strict=True
    ):
        _arrive(one, largest_force, telling, how)
        one.progress.converged = converged
        one.goes_on = not converged and one.progress.steps < how.steps
    going = [one for one in reached if one.goes_on]
    if not going:
        return
    if len(going) < len(reached):
        forces = forces[parts.spread(np.array([one.goes_on for one in reached]))]
        parts = Segments([one.coordinates.size for one in going])
    # Whoever goes beyond numbers is told so itself.
    with np.errstate(all="ignore"):
        _step(going, forces, parts, how)


def _arrive(one: Relaxation, largest_force: float, telling: Telling, how: Relaxing) -> None:
    """Notes where a step led."""
    progress = one.progress
    progress.largest_force = largest_force
    if not one.stepped:
        return
    progress.steps += 1
    step, last = progress.steps, progress.last
    assert last is not None
    if telling.every and step % telling.every == 0:
        frame = Place(one.positions, one.cell, last.forces) if telling.frames else None
        progress.notes.append(Advance(step, last.energy, largest_force, frame))
    if telling.keep_every and step % telling.keep_every == 0:
        words, arrays = one.memory.kept()
        arrays |= {"positions": one.positions, "cell": one.cell}
        if how.moves_cell:
            arrays["coordinates"] = one.coordinates
        progress.keep(words, arrays)


def _step(going: Sequence[Relaxation], forces: FloatArray, parts: Segments, how: Relaxing) -> None:
    """Moves structures by one step of their optimiser."""
    here = np.concatenate([one.coordinates for one in going])
    if how.optimizer == "fire":
        memories = [one.memory for one in going if isinstance(one.memory, Fire)]
        there = here + fire(memories, forces, parts, how.max_step)
    else:
        remembered = [one.memory for one in going if isinstance(one.memory, Lbfgs)]
        there = here + lbfgs(remembered, here, forces, parts, how.max_step)
    finite = np.logical_and.reduceat(np.isfinite(there), parts.starts)
    if not finite.all():
        there = np.where(parts.spread(finite), there, here)
    for one, good, coordinates in zip(going, finite.tolist(), parts.split(there), strict=True):
        one.stepped, one.coordinates = True, coordinates
        if not good:
            one.fault = not_finite(one.progress.steps)
    if how.moves_cell:
        _deform(going, there)
    else:
        for one in going:
            one.positions = one.coordinates.reshape(-1, 3)


def _deform(some: Sequence[Relaxation], coordinates: FloatArray) -> None:
    """Places atoms and cells where the coordinates have them."""
    lattices, rows = _lattices(some), coordinates.reshape(-1, 3)
    deformations = lattices.deformations(rows)
    positions, cells = lattices.place(rows, deformations)
    before, now = (np.abs(np.linalg.det(one)).tolist() for one in (lattices.first, cells))
    placed = Segments((3 * lattices.n_atoms).tolist()).split(positions.ravel())
    for place, one in enumerate(some):
        one.positions = placed[place].reshape(-1, 3)
        one.cell, one.deformation = cells[place], deformations[place]
        one.fault = one.fault or out_of_volume(before[place], now[place], one.progress.steps)


def _forces_on_atoms(some: Sequence[Relaxation]) -> tuple[FloatArray, Segments]:
    """Flat, those of fixed atoms zero."""
    forces = np.concatenate([one.progress.last.forces for one in some if one.progress.last is not None])
    if any(one.fixed is not None for one in some):
        fixed = [np.zeros(len(one.positions), bool) if one.fixed is None else one.fixed for one in some]
        forces[np.concatenate(fixed)] = 0.0
    return forces.ravel(), Segments([one.positions.size for one in some])


def _forces_on_coordinates(
    some: Sequence[Relaxation], on_atoms: FloatArray, how: Relaxing
) -> tuple[FloatArray, Segments]:
    """Flat, of structures whose cells move."""
    given = [one.progress.last for one in some]
    stress = np.concatenate([last.stress for last in given if last is not None and last.stress is not None])
    forces = _lattices(some).forces(
        on_atoms.reshape(-1, 3),
        stress.reshape(-1, 3, 3),
        np.concatenate([one.coordinates for one in some]).reshape(-1, 3),
        np.stack([one.deformation for one in some]),
        pressure=how.pressure,
        motion=how.cell,
    )
    return forces.ravel(), Segments([one.coordinates.size for one in some])


def _lattices(some: Sequence[Relaxation]) -> Lattices:
    n_atoms = np.array([len(one.positions) for one in some])
    return Lattices.of(n_atoms, np.stack([one.first_cell for one in some]))
