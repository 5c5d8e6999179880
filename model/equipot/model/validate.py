"""Refuses structures without a meaningful energy, naming field, value and remedy. Knows no torch."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import Graph, System
from equipot.model.config import ModelConfig
from equipot.model.elements import symbol
from equipot.model.errors import StructureError

MIN_DISTANCE = 0.1
"""Å; closer than this, two atoms are one atom written twice."""
MAX_COORDINATE = 1e6
"""Å; beyond this a float64 difference is worse than 1e-10 Å, and it is a mistake of units anyway."""
MAX_DENSITY = 10.0
"""Atoms per Å³; diamond has 0.18, solid hydrogen at 500 GPa about 1."""
MIN_SPACING = 0.1
"""Å between lattice planes of a periodic direction."""


def check_system(system: System) -> None:
    """Refuses a malformed structure before any neighbour is looked for.

    The density limits also keep a small hostile request from growing into a list of 1e8 edges.

    Raises:
        StructureError: no atoms, wrong shapes, numbers that are not finite or absurdly large, a periodic cell
            that is singular or flat, or atoms packed beyond any real density.
    """
    _check_shapes(system)
    for field in ("positions", "cell"):
        _check_numbers(field, getattr(system, field))
    heights = _check_cell(system)
    _check_crowding(system, heights)


def check_graph(graph: Graph) -> None:
    """Refuses two atoms on one spot, periodic images included.

    Raises:
        StructureError: two atoms are closer than `MIN_DISTANCE`; the pair and the distance are named.
    """
    if graph.n_edges == 0:
        return
    vectors = graph.vectors()
    squared = np.einsum("ek,ek->e", vectors, vectors)
    worst = int(squared.argmin())
    if squared[worst] >= MIN_DISTANCE**2:
        return
    pair = sorted((int(graph.receivers[worst]), int(graph.senders[worst])))
    whom = f"atoms {pair[0]} and {pair[1]}" if pair[0] != pair[1] else f"atom {pair[0]} and its own image"
    image = " (through the periodic boundary)" if graph.cell_shifts[worst].any() else ""
    raise StructureError(
        field="positions",
        message=f"{whom} are {squared[worst] ** 0.5:.3g} Å apart{image}, the least is {MIN_DISTANCE} Å",
        remedy="remove the duplicate, or check the cell and the unit of length",
    )


def check_supported(system: System, config: ModelConfig) -> System:
    """Refuses what a model was not trained for; returns the system as the model is to see it.

    A spin multiplicity that is not stated (0) becomes the model's only one, if it has just one.

    Raises:
        StructureError: reason ``unsupported``: an element, charge, spin multiplicity or level of theory that
            the model does not know.
    """
    if not set(config.elements).issuperset(system.atomic_numbers.tolist()):
        unknown = np.flatnonzero(~np.isin(system.atomic_numbers, config.elements))
        known = " ".join(symbol(number) for number in config.elements)
        raise StructureError(
            field="atomic_numbers",
            message=f"atom {unknown[0]} is {symbol(int(system.atomic_numbers[unknown[0]]))}, "
            f"which this model does not know; it knows {known}",
            remedy="use a model trained with this element",
            reason="unsupported",
        )
    if system.charge not in config.charges:
        raise _unsupported("charge", system.charge, config.charges, "a total charge in units of e")
    if not 0 <= system.level_of_theory < len(config.levels_of_theory):
        raise _unsupported(
            "level_of_theory", system.level_of_theory, config.levels_of_theory, "an index into this list"
        )
    known_spins = config.spin_multiplicities
    if system.spin_multiplicity == 0 and len(known_spins) == 1 and known_spins != (0,):
        return dataclasses.replace(system, spin_multiplicity=known_spins[0])
    if system.spin_multiplicity not in known_spins:
        meaning = "2S + 1, 0 if not stated"
        raise _unsupported("spin_multiplicity", system.spin_multiplicity, known_spins, meaning)
    return system


def _unsupported(field: str, value: int, known: tuple[object, ...], meaning: str) -> StructureError:
    return StructureError(
        field=field,
        message=f"is {value} ({meaning}), which this model does not know",
        remedy=f"use one of {', '.join(map(str, known))}, or another model",
        reason="unsupported",
    )


def _check_shapes(system: System) -> None:
    n = system.atomic_numbers.size
    if n == 0:
        raise StructureError(
            field="atomic_numbers", message="there are no atoms", remedy="give at least one atom"
        )
    for field, shape in {"atomic_numbers": (n,), "positions": (n, 3), "cell": (3, 3), "pbc": (3,)}.items():
        actual = getattr(system, field).shape
        if actual != shape:
            raise StructureError(
                field=field,
                message=f"has shape {actual}, expected {shape}",
                remedy="give one atomic number and three coordinates per atom, a 3×3 cell, three pbc flags",
            )


def _check_numbers(field: str, values: NDArray[np.float64]) -> None:
    row = np.flatnonzero(~(np.abs(values) <= MAX_COORDINATE).all(axis=-1))
    if len(row):
        what = f"atom {row[0]}" if field == "positions" else f"lattice vector {row[0]}"
        limit = f"the limit is ±{MAX_COORDINATE:g} Å"
        raise StructureError(
            field=field,
            message=f"{what} is {values[row[0]].tolist()}; {limit}",
            remedy="give finite numbers in Å",
        )


def _check_cell(system: System) -> NDArray[np.float64]:
    """Distances between lattice planes (n_periodic,), in Å."""
    vectors = system.cell[system.pbc]
    if not len(vectors):
        return np.zeros(0)
    lengths = np.linalg.norm(vectors, axis=-1)
    # A relative test: the smallest singular value of unit vectors is 0 for a flat cell of whatever size.
    flat = not lengths.all() or np.linalg.svd(vectors / lengths[:, None], compute_uv=False)[-1] < 1e-6
    if flat:
        raise StructureError(
            field="cell",
            message=f"pbc is {system.pbc.tolist()}, but the periodic lattice vectors {vectors.tolist()} "
            "are zero or linearly dependent",
            remedy="give a cell that spans the periodic directions, or set pbc to False there",
        )
    heights: NDArray[np.float64] = 1.0 / np.linalg.norm(np.linalg.pinv(vectors), axis=0)
    if heights.min() < MIN_SPACING:
        raise StructureError(
            field="cell",
            message=f"its lattice planes are {heights.min():.3g} Å apart, the least is {MIN_SPACING} Å",
            remedy="check the unit of length, or reduce the cell (Niggli)",
        )
    return heights


def _check_crowding(system: System, heights: NDArray[np.float64]) -> None:
    n = len(system.atomic_numbers)
    if len(heights) == 3:
        volume = abs(float(np.linalg.det(system.cell)))
        if n > MAX_DENSITY * volume:
            raise StructureError(
                field="cell",
                message=f"{n} atoms in {volume:.3g} Å³, the limit is {MAX_DENSITY:g} per Å³",
                remedy="check the unit of length",
            )
    if n <= _CROWD:
        return
    positions = system.positions
    if len(heights):
        reciprocal = np.linalg.pinv(system.cell[system.pbc])
        positions = positions - np.floor(positions @ reciprocal) @ system.cell[system.pbc]
    _, counts = np.unique(np.floor(positions / 2.0), axis=0, return_counts=True)
    if counts.max() > _CROWD:
        raise StructureError(
            field="positions",
            message=f"{counts.max()} atoms lie within one cube of 2 Å, the limit is {_CROWD}",
            remedy="remove duplicates, or check the unit of length",
        )


_CROWD = int(MAX_DENSITY * 2.0**3)
