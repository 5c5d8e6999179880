"""Near frames of one trajectory: does the energy change as forces and stress say it should?

Between two near frames ΔE = −½ Σ (F₁ + F₂)·Δr + ½ V (σ₁ + σ₂):ε, exact on a quadratic surface. Each pair is
laid on each other by the nearest periodic images, or by the best rotation where nothing is periodic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import System
from equipot.train.audit.labels import rotation
from equipot.train.store import Labels, Store

_NEAR = 0.3  # Å RMS; beyond, the surface is no longer quadratic between two frames
_SMALL_STRAIN, _LARGE_STRAIN = 0.04, 0.3  # to the latter only pressure and density are compared
_PARTNERS = 8
CLEAR = 0.55
"""Share of the changes that a slope has to explain to be believed; a correlation of about 0.9."""


@dataclass(frozen=True, slots=True)
class Step:
    """From one frame to a near one.

    Attributes:
        distance: RMS displacement in Å, strain apart; infinite where only pressure and density compare.
        change: of the energy, eV.
        force_work, stress_work: what forces and stress say of it, eV; stress_work is NaN without a stress,
            0 in an unchanged cell.
        stiffness: −ΔF·Δr/Δr² in eV/Å².
        strain: largest component.
        n_atoms: of the structure.
        volume: Å³, NaN unless periodic.
        density_change, pressure_change: relative, and in eV/Å³ (NaN without a stress).
    """

    distance: float
    change: float
    force_work: float
    stress_work: float
    stiffness: float
    strain: float
    n_atoms: int
    volume: float
    density_change: float
    pressure_change: float


@dataclass(frozen=True, slots=True)
class Regression:
    """Slope through the origin, share of the changes it explains, and how many pairs it rests on."""

    slope: float
    explained: float
    pairs: int


@dataclass(frozen=True, slots=True)
class PairStatistics:
    """Over near frames of one store.

    Attributes:
        energy_force: change of energy against the work of the forces; 1 is right. None without pairs.
        per_atom: the same for energies times the number of atoms; 1 says that they are per atom.
        energy_stress: what forces do not explain against the work of the stress; 1 is right.
        pressure_density: change of pressure against change of density; positive is right.
        stiffness: median, eV/Å², NaN without pairs.
        n_atoms, volume: means over the pairs.
        points: (k, 2) work of the forces and change of energy, for a picture.
        strain_points: (k, 2) the same for the stress.
    """

    energy_force: Regression | None
    per_atom: Regression | None
    energy_stress: Regression | None
    pressure_density: Regression | None
    stiffness: float
    n_atoms: float
    volume: float
    points: NDArray[np.float64]
    strain_points: NDArray[np.float64]


def near_steps(
    store: Store,
    indices: NDArray[np.int64],
    groups: NDArray[np.int64],
    check: Callable[[], None] = lambda: None,
) -> list[Step]:
    """For each of these structures the step to its nearest partner among the next few of its group."""
    order = np.lexsort((indices, groups))
    indices, groups = indices[order], groups[order]
    read = lru_cache(maxsize=4 * _PARTNERS)(lambda index: (store.system(index), store.labels(index)))
    steps = []
    for k, index in enumerate(indices.tolist()):
        check()
        ahead = [j for j in range(k + 1, min(k + 1 + _PARTNERS, len(indices))) if groups[j] == groups[k]]
        found = [step for j in ahead if (step := _step(*read(index), *read(int(indices[j])))) is not None]
        for chosen in (  # a strained partner must not hide one of the same cell, nor the other way round
            [step for step in found if step.strain == 0],
            [step for step in found if step.strain > 0],
        ):
            if chosen:
                steps.append(min(chosen, key=lambda step: (step.distance, step.strain)))
    return steps


def summarise(steps: Sequence[Step]) -> PairStatistics:
    """Regressions over the steps."""
    still = [s for s in steps if s.strain == 0 and s.force_work != 0 and s.distance > 1e-4]
    energy_force = _regress([(s.force_work, s.change, s.distance) for s in still])
    scale = energy_force.slope if energy_force and energy_force.explained > CLEAR else 1.0
    strained = [s for s in steps if s.strain > 0 and np.isfinite(s.stress_work)]
    energy_stress = _regress(
        [(s.stress_work, s.change - scale * s.force_work, s.strain + s.distance) for s in strained]
    )
    dense = [s for s in steps if abs(s.density_change) > 2e-3 and np.isfinite(s.pressure_change)]
    pressure = _regress([(s.density_change, s.pressure_change, s.strain) for s in dense])
    used = still or strained
    return PairStatistics(
        energy_force=energy_force,
        per_atom=_regress([(s.force_work, s.change * s.n_atoms, s.distance) for s in still]),
        energy_stress=energy_stress,
        pressure_density=pressure,
        stiffness=float(np.median([s.stiffness for s in still])) if still else np.nan,
        n_atoms=float(np.mean([s.n_atoms for s in used])) if used else np.nan,
        volume=float(np.mean([s.volume for s in used])) if used else np.nan,
        points=np.array([(s.force_work, s.change) for s in still]).reshape(-1, 2),
        strain_points=np.array([(s.stress_work, s.change - scale * s.force_work) for s in strained]).reshape(
            -1, 2
        ),
    )


def _regress(points: Sequence[tuple[float, float, float]]) -> Regression | None:
    """Of (x, y, how far): least absolute deviations, per distance, of the nearer half if all are not clear.

    The error of the trapezoid grows with the distance, and a few frames of a relaxation's violent start would
    rule a least squares fit.
    """
    if not points:
        return None
    x, y, far = np.array(points).T
    x, y = x / far, y / far
    if not x.any() or not y.any():
        return None
    moving = x != 0
    ratio, weight = (y[moving] / x[moving]), np.abs(x[moving])
    order = np.argsort(ratio)
    reached = np.cumsum(weight[order])
    slope = float(ratio[order][np.searchsorted(reached, reached[-1] / 2)])
    explained = 1 - float(np.abs(y - slope * x).sum() / np.abs(y).sum())
    found = Regression(slope, explained, len(x))
    if explained < CLEAR and len(x) >= 24:
        closer = _regress([point for point in points if point[2] <= np.median(far)])
        if closer is not None and closer.pairs < len(x) and closer.explained > explained:
            return closer
    return found


def _step(one: System, first: Labels, two: System, second: Labels) -> Step | None:
    """None if the two are not comparable, not near, or have no energies or forces."""
    if not np.array_equal(one.atomic_numbers, two.atomic_numbers) or len(one.atomic_numbers) < 2:
        return None
    if not np.array_equal(one.pbc, two.pbc) or one.charge != two.charge:
        return None
    if not (np.isfinite(first.forces).all() and np.isfinite(second.forces).all()):
        return None
    one_forces, two_forces = first.forces, second.forces
    strain, volume, stress_work, densified, squeezed = 0.0, np.nan, 0.0, 0.0, np.nan
    if not one.pbc.any():
        if not (one_forces.any() and two_forces.any()):
            return None
        fixed = one.positions - one.positions.mean(axis=0)
        centred = two.positions - two.positions.mean(axis=0)
        turn = rotation(centred, fixed)
        moved, two_forces = centred @ turn - fixed, two_forces @ turn
    elif np.allclose(one.cell, two.cell, rtol=0, atol=1e-6):
        if not (one_forces.any() and two_forces.any()):
            return None
        lattice = one.cell[one.pbc]
        moved = two.positions - one.positions
        moved = moved - np.round(moved @ np.linalg.pinv(lattice)) @ lattice
        volume = abs(float(np.linalg.det(one.cell))) if one.pbc.all() else np.nan
    elif one.pbc.all():
        inverse = np.linalg.pinv(one.cell)
        gradient = inverse @ two.cell - np.eye(3)
        tensor = (gradient + gradient.T) / 2
        strain = float(np.abs(gradient).max())
        if strain > _LARGE_STRAIN:
            return None
        fractional = two.positions @ np.linalg.pinv(two.cell) - one.positions @ inverse
        moved = (fractional - np.round(fractional)) @ ((one.cell + two.cell) / 2)
        volume = abs(float(np.linalg.det((one.cell + two.cell) / 2)))
        densified = -float(np.trace(tensor))
        stress_work = np.nan
        if first.stress is not None and second.stress is not None:
            stress_work = 0.5 * volume * float(((first.stress + second.stress) * tensor).sum())
            squeezed = -float(np.trace(second.stress - first.stress)) / 3
    else:
        return None
    square = float(np.square(moved).sum())
    distance = float(np.sqrt(square / len(moved)))
    if distance > _NEAR or strain > _SMALL_STRAIN:
        if not np.isfinite(squeezed):
            return None
        distance, stress_work = np.inf, np.nan
    return Step(
        distance=distance,
        change=second.energy - first.energy,
        force_work=-0.5 * float(((one_forces + two_forces) * moved).sum()),
        stress_work=stress_work,
        stiffness=-float(((two_forces - one_forces) * moved).sum()) / square if square else np.nan,
        strain=strain,
        n_atoms=len(moved),
        volume=volume,
        density_change=densified,
        pressure_change=squeezed,
    )
