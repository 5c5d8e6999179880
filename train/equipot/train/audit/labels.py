"""Asks of imported labels whether they can be what they are said to be: total energies in eV, forces in eV/Å.

Looks, strongest first; the first that can tell decides:

1. Energy against force. Between two near frames of one structure, ΔE = −½ Σ (F₁ + F₂)·Δr (exact on a
   quadratic surface). The slope of ΔE on that work is 1 for totals, 1/n_atoms for energies per atom, −1 for
   gradients taken for forces, 27.2 or its inverse for a Hartree among eV.
2. Energy against all-electron atoms. Codes without pseudopotentials give totals within a few per cent of the
   sum of free atoms, which the statistical model of the atom knows well enough (Schwinger, Phys. Rev. A 22,
   1827 (1980); 24, 2353 (1981)): E(Z) ≈ −0.7687 Z^(7/3) + 0.5 Z² − 0.2699 Z^(5/3) Hartree.
3. Energy against size. Totals are a sum over atoms and grow with their number, energies per atom are a mean
   and do not.
4. Sheer size: a condensed phase is bound by eV per atom, not by hundredths of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from equipot.model.batch import System
from equipot.train.store import N_ELEMENTS, Labels, Store

HARTREE = 27.211386245988
"""eV, CODATA 2018."""
_ANCHORS, _REACH = 80, 25
_SAMPLE = 3000
_MIN_PAIRS = 12
_NEAR = 0.3  # Å RMS; beyond, the surface is no longer quadratic between two frames
_CLEAR = 0.9  # correlation; sets of far frames give slopes of 0.6 to 2.5 at 0.75, which proves nothing
_ADVICE = "if so, import again into a new store with --energy-per-atom"


@dataclass(frozen=True, slots=True)
class Slope:
    """Energy differences against the work of the forces over pairs of near frames."""

    slope: float
    correlation: float
    pairs: int
    n_atoms: float


def audit_energies(store: Store, indices: NDArray[np.int64]) -> list[str]:
    """Warnings, with their evidence, about the labels of these structures (of one source, in file order)."""
    if not len(indices):
        return []
    slope = energy_force_slope(store, indices)
    if slope is not None and slope.pairs >= _MIN_PAIRS and abs(slope.correlation) >= _CLEAR:
        return _judge_slope(slope)
    sample = indices[np.unique(np.linspace(0, len(indices) - 1, _SAMPLE).astype(int))]
    counts, energy = store.element_counts(sample), store.energies[sample]
    free_atoms = _judge_free_atoms(counts, energy)
    if free_atoms is not None:
        return free_atoms
    if evidence := not_extensive(counts, energy):
        return [f"the energies look like energies per atom: {evidence}; {_ADVICE}"]
    periodic = np.array([store.system(int(i)).pbc.any() for i in sample], dtype=np.bool_)
    if evidence := weakly_bound(counts.sum(axis=1), energy, periodic):
        return [
            f"the energies are small for totals of periodic structures: {evidence}; are they per atom, or "
            f"relative to something? {_ADVICE}"
        ]
    return []


def _judge_slope(found: Slope) -> list[str]:
    evidence = (
        f"over {found.pairs} pairs of near frames the energy changes by {found.slope:.3g} times the work of "
        f"the forces (correlation {found.correlation:.2f}), 1 is right"
    )
    per_atom = 1 / found.n_atoms
    if found.slope < 0.6 and 0.7 < found.slope / per_atom < 1.4:
        return [
            f"the energies look like energies per atom: {evidence}, 1/n_atoms is {per_atom:.3g}; {_ADVICE}"
        ]
    if found.slope < 0:
        return [f"the forces look like gradients, of the wrong sign: {evidence}"]
    if not 0.6 < found.slope < 1.6:
        return [
            f"energies and forces do not fit together: {evidence}; 27.2 or 0.0367 would mean that one of "
            "them is in Hartree, 23.1 or 0.0434 in kcal/mol, 1.89 or 0.529 that forces are per bohr"
        ]
    return []


def energy_force_slope(store: Store, indices: NDArray[np.int64]) -> Slope | None:
    """Slope of ΔE on the trapezoid of the forces, or None without near frames that have forces."""
    anchors = np.unique(np.linspace(0, len(indices) - 1, _ANCHORS).astype(int))
    read = lru_cache(maxsize=4 * _REACH)(lambda index: (store.system(index), store.labels(index)))
    steps = []
    for at in anchors:
        partners = indices[at + 1 : at + 1 + _REACH]
        found = [step for partner in partners if (step := _step(read, int(indices[at]), int(partner)))]
        if found:
            steps.append((*min(found)[1:], store.n_atoms[indices[at]]))
    if not steps:
        return None
    change, work, n_atoms = np.array(steps).T
    norm = float(np.sqrt((change @ change) * (work @ work)))
    if norm == 0:
        return None
    product = float(change @ work)
    return Slope(product / float(work @ work), product / norm, len(steps), float(n_atoms.mean()))


def _step(read: Callable[[int], tuple[System, Labels]], a: int, b: int) -> tuple[float, float, float] | None:
    """(RMS displacement in Å, ΔE, work of the forces) between two frames, None if they are not comparable."""
    (one, first), (two, second) = read(a), read(b)
    if not np.array_equal(one.atomic_numbers, two.atomic_numbers) or len(one.atomic_numbers) < 2:
        return None
    if not np.array_equal(one.pbc, two.pbc):
        return None
    forces = first.forces, second.forces
    if not all(f.any() and np.isfinite(f).all() for f in forces):
        return None
    second_forces = second.forces
    if one.pbc.any():
        if not np.allclose(one.cell, two.cell, atol=1e-6):
            return None
        moved = two.positions - one.positions
        if one.pbc.all():
            fractional = moved @ np.linalg.inv(one.cell)
            moved = (fractional - np.round(fractional)) @ one.cell
    else:
        from_centre = one.positions - one.positions.mean(axis=0)
        centred = two.positions - two.positions.mean(axis=0)
        turn = rotation(centred, from_centre)
        moved = centred @ turn - from_centre
        second_forces = second.forces @ turn
    distance = float(np.sqrt(np.square(moved).sum(axis=1).mean()))
    if not 1e-4 < distance < _NEAR:
        return None
    return (
        distance,
        second.energy - first.energy,
        -0.5 * float(((first.forces + second_forces) * moved).sum()),
    )


def rotation(moving: NDArray[np.float64], fixed: NDArray[np.float64]) -> NDArray[np.float64]:
    """The (3, 3) proper rotation (for row vectors) that lays one set of points on the other (Kabsch 1976)."""
    u, _, vt = np.linalg.svd(moving.T @ fixed)
    handed = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return np.asarray(u @ handed @ vt)


def against_free_atoms(counts: NDArray[np.float64], energy: NDArray[np.float64]) -> tuple[float, float]:
    """Median of energy, and of energy × number of atoms, over the energy of the free all-electron atoms.

    Near 1 the first says all-electron totals in eV, near 1/27.2 in Hartree; the second the same of energies
    per atom. NaN without structures of several atoms.

    Args:
        counts: (n, 119) atoms of each element.
        energy: (n,) as stored.
    """
    n = counts.sum(axis=1)
    several = (n > 1) & np.isfinite(energy)
    if not several.any():
        return np.nan, np.nan
    z = np.arange(N_ELEMENTS, dtype=np.float64)
    atom = HARTREE * (-0.7687 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3))
    ratio = energy[several] / (counts[several] @ atom)
    return float(np.median(ratio)), float(np.median(ratio * n[several]))


def _judge_free_atoms(counts: NDArray[np.float64], energy: NDArray[np.float64]) -> list[str] | None:
    """A verdict where the energies are all-electron ones, None where they are not."""
    as_total, as_mean = against_free_atoms(counts, energy)
    if abs(as_total - 1) < 0.05:
        return []
    if abs(as_mean - 1) < 0.05:
        return [
            f"the energies look like energies per atom: they are {as_total:.3f} of the total energy of the "
            f"free atoms, but times the number of atoms {as_mean:.3f} of it; {_ADVICE}"
        ]
    return None


def not_extensive(counts: NDArray[np.float64], energy: NDArray[np.float64]) -> str:
    """Evidence that energies (n,) of element counts (n, 119) are means over atoms, not sums; "" if none."""
    n = counts.sum(axis=1)
    if not len(n) or n.max() < 1.5 * n.min() or n.std() < 0.1 * n.mean() or len(np.unique(n)) < 3:
        return ""
    counts = counts[:, counts.any(axis=0)]
    growth = float(np.polyfit(n, energy, 1)[0] * n.mean() / energy.mean())
    as_sum, as_mean = _misfit(counts, energy), _misfit(counts / n[:, None], energy)
    undecided = abs(as_mean - as_sum) < 1e-3 * as_sum  # fewer compositions than elements: both fit alike
    if (as_mean < 0.9 * as_sum and growth < 0.5) or (undecided and abs(growth) < 0.2):
        return (
            f"over {len(n)} structures of {n.min():.0f} to {n.max():.0f} atoms, 1 % more atoms change "
            "them by "
            f"{growth:.2f} % (totals: by 1), and a mean over atoms fits to {as_mean:.3g} eV RMS, a sum over "
            f"atoms to {as_sum:.3g} eV"
        )
    return ""


def _misfit(features: NDArray[np.float64], energy: NDArray[np.float64]) -> float:
    """RMS in eV that the best element energies leave, per degree of freedom."""
    solution, _, rank, _ = np.linalg.lstsq(features, energy, rcond=1e-10)
    left = energy - features @ solution
    return float(np.sqrt(left @ left / max(len(energy) - int(rank), 1)))


def weakly_bound(n: NDArray[np.float64], energy: NDArray[np.float64], periodic: NDArray[np.bool_]) -> str:
    """Evidence that periodic structures of n (k,) atoms have small energies (k,) for totals; "" if none."""
    large = periodic & (n >= 8)
    if not large.any() or large.sum() < 0.5 * len(n):
        return ""
    total = float(np.median(np.abs(energy[large])))
    each = float(np.median(np.abs(energy[large]) / n[large]))
    if each < 0.3 and 0.5 < total < 20:
        return f"in the median {total:.3g} eV, {each:.2g} eV per atom, where a solid is bound by 1 to 10"
    return ""
