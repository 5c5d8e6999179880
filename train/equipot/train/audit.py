"""Asks of imported labels whether they can be what they are said to be: total energies in eV, forces in eV/Å.

Three independent looks, strongest first:

1. Energy against force. Between two near frames of one structure, ΔE = −½ Σ (F₁ + F₂)·Δr (exact on a
   quadratic surface). The slope of ΔE on that work is 1 for totals, 1/n_atoms for energies per atom, −1 for
   gradients taken for forces, 27.2 or its inverse for a Hartree among eV.
2. Energy against size. Totals are a sum over atoms, energies per atom a mean; whichever fits clearly better.
3. Energy against all-electron atoms. Codes without pseudopotentials give totals within a few per cent of the
   sum of free atoms, which the statistical model of the atom knows well enough (Schwinger, Phys. Rev. A 22,
   1827 (1980); 24, 2353 (1981)): E(Z) ≈ −0.7687 Z^(7/3) + 0.5 Z² − 0.2699 Z^(5/3) Hartree.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipot.train.store import N_ELEMENTS, Store

HARTREE = 27.211386245988
"""eV, CODATA 2018."""
_ANCHORS = 300
_REACH = 12
_SAMPLE = 3000
_MIN_PAIRS = 12


@dataclass(frozen=True, slots=True)
class Slope:
    """Energy differences against the work of the forces: slope, correlation, number of pairs, mean n_atoms."""

    slope: float
    correlation: float
    pairs: int
    n_atoms: float


def audit_energies(store: Store, indices: NDArray[np.int64]) -> list[str]:
    """Warnings, with their evidence, about the labels of these structures (of one source, in file order)."""
    if not len(indices):
        return []
    slope = energy_force_slope(store, indices)
    if slope is not None:
        return _judge_slope(slope)
    sample = indices[np.unique(np.linspace(0, len(indices) - 1, _SAMPLE).astype(int))]
    found = _judge_size(store, sample) or _judge_all_electron(store, sample)
    return [found] if found else []


def _judge_slope(found: Slope) -> list[str]:
    evidence = (
        f"over {found.pairs} pairs of near frames the energy changes by {found.slope:.3g} times the work of the "
        f"forces (correlation {found.correlation:.2f}), 1 is right"
    )
    per_atom = 1 / found.n_atoms
    if found.n_atoms > 2 and 0.5 < found.slope / per_atom < 2 and found.slope < 0.7:
        return [
            f"the energies look like energies per atom: {evidence}, 1/n_atoms is {per_atom:.3g}; "
            "if so, import again with --energy-per-atom"
        ]
    if found.slope < -0.5:
        return [f"the forces look like gradients, of the wrong sign: {evidence}"]
    if not 0.6 < found.slope < 1.6:
        return [
            f"energies and forces do not fit together: {evidence} (27.2 or 0.0367: one of them is in Hartree, "
            "0.0434 or 23.1: in kcal/mol, 0.529 or 1.89: forces per bohr)"
        ]
    return []


def energy_force_slope(store: Store, indices: NDArray[np.int64]) -> Slope | None:
    """Slope of ΔE on the trapezoid of the forces, or None if there are too few near frames to tell."""
    anchors = indices[np.unique(np.linspace(0, len(indices) - 1, _ANCHORS).astype(int))]
    place = {int(index): k for k, index in enumerate(indices)}
    differences, works, sizes = [], [], []
    for anchor in anchors:
        at = place[int(anchor)]
        best = min(
            (
                step
                for partner in indices[at + 1 : at + 1 + _REACH]
                if (step := _step(store, int(anchor), int(partner))) is not None
            ),
            key=lambda step: step[0],
            default=None,
        )
        if best is not None:
            differences.append(best[1])
            works.append(best[2])
            sizes.append(store.n_atoms[anchor])
    if len(works) < _MIN_PAIRS:
        return None
    d, w = np.array(differences), np.array(works)
    keep = np.abs(w) <= 5 * np.median(np.abs(w))  # a jump to another basin is no small step
    d, w = d[keep], w[keep]
    norm = float(np.sqrt((d @ d) * (w @ w)))
    if norm == 0 or len(w) < _MIN_PAIRS:
        return None
    correlation = float(d @ w) / norm
    if abs(correlation) < 0.7:
        return None
    return Slope(float(d @ w / (w @ w)), correlation, len(w), float(np.mean(sizes)))


def _step(store: Store, a: int, b: int) -> tuple[float, float, float] | None:
    """(RMS displacement in Å, ΔE, work of the forces) from structure a to b, or None if they are not comparable."""
    one, two = store.system(a), store.system(b)
    if not np.array_equal(one.atomic_numbers, two.atomic_numbers) or len(one.atomic_numbers) < 2:
        return None
    if not np.array_equal(one.pbc, two.pbc):
        return None
    first, second = store.labels(a), store.labels(b)
    if not (np.isfinite(first.forces).all() and np.isfinite(second.forces).all()):
        return None
    if not (first.forces.any() and second.forces.any()):
        return None
    forces = second.forces
    if one.pbc.any():
        if not np.allclose(one.cell, two.cell, atol=1e-6):
            return None
        moved = two.positions - one.positions
        if one.pbc.all():
            fractional = moved @ np.linalg.inv(one.cell)
            moved = (fractional - np.round(fractional)) @ one.cell
    else:
        centre = two.positions.mean(axis=0)
        rotation = _rotation(two.positions - centre, one.positions - one.positions.mean(axis=0))
        moved = (two.positions - centre) @ rotation - (one.positions - one.positions.mean(axis=0))
        forces = forces @ rotation
    distance = float(np.sqrt(np.square(moved).sum(axis=1).mean()))
    if not 1e-4 < distance < 0.6:
        return None
    return distance, second.energy - first.energy, -0.5 * float(((first.forces + forces) * moved).sum())


def _rotation(moving: NDArray[np.float64], fixed: NDArray[np.float64]) -> NDArray[np.float64]:
    """The proper rotation (for row vectors) that lays one set of points on the other (Kabsch 1976)."""
    u, _, vt = np.linalg.svd(moving.T @ fixed)
    handed = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return np.asarray(u @ handed @ vt)


def _judge_size(store: Store, sample: NDArray[np.int64]) -> str | None:
    n = store.n_atoms[sample].astype(np.float64)
    energy = store.energies[sample]
    if n.max() < 1.5 * n.min():
        return None
    counts = store.element_counts(sample)
    counts = counts[:, counts.any(axis=0)]
    if len(np.unique(counts, axis=0)) < 3 * counts.shape[1] and counts.shape[1] < 20:
        return None
    as_sum, as_mean = _misfit(counts, energy), _misfit(counts / n[:, None], energy)
    if as_mean < 0.5 * as_sum:
        return (
            f"the energies look like energies per atom: over {len(sample)} structures of {n.min():.0f} to "
            f"{n.max():.0f} atoms a mean over atoms fits them to {as_mean:.3g} eV RMS, a sum over atoms only to "
            f"{as_sum:.3g} eV; if so, import again with --energy-per-atom"
        )
    return None


def _misfit(features: NDArray[np.float64], energy: NDArray[np.float64]) -> float:
    """RMS in eV that the best sum of element energies leaves, per degree of freedom."""
    solution, _, rank, _ = np.linalg.lstsq(features, energy, rcond=1e-10)
    left = energy - features @ solution
    return float(np.sqrt(left @ left / max(len(energy) - int(rank), 1)))


def _judge_all_electron(store: Store, sample: NDArray[np.int64]) -> str | None:
    z = np.arange(N_ELEMENTS, dtype=np.float64)
    atom = HARTREE * (-0.7687 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3))
    several = sample[store.n_atoms[sample] > 1]
    if not len(several):
        return None
    free_atoms = store.element_counts(several) @ atom
    n, energy = store.n_atoms[several], store.energies[several]
    as_total, as_mean = float(np.median(energy / free_atoms)), float(np.median(energy * n / free_atoms))
    if abs(as_mean - 1) < 0.05 and abs(as_total - 1) > 0.05:
        return (
            f"the energies look like energies per atom: they are {as_total:.3f} of the total energy of the free "
            f"atoms, times the number of atoms {as_mean:.3f} of it; if so, import again with --energy-per-atom"
        )
    return None
