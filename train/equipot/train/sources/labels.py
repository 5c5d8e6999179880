"""Finds a frame's labels among the many keys that the field uses. Knows nothing of files.

Priority, most trusted first: keys that say "reference" (REF_…), keys that say "DFT", ASE's own names, other
names of the total energy, a virial, an energy per atom, and the free energy last. When two keys are present
and differ, the first in this order is taken and a note says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.train.sources.base import FrameError, Note, ReadOptions, Reason

_PREFIXES = ("REF_", "ref_", "reference_", "DFT_", "dft_")
ENERGY_KEYS = (
    *(p + "energy" for p in _PREFIXES),
    "energy_dft",
    "energy",
    "Energy",
    "TotEnergy",
    "total_energy",
    "potential_energy",
    "energy_per_atom",
    "e_per_atom",
    "free_energy",
)
FORCES_KEYS = (
    *(p + name for p in _PREFIXES for name in ("forces", "force")),
    "forces_dft",
    "forces",
    "force",
    "Forces",
)
STRESS_KEYS = (
    *(p + name for p in _PREFIXES for name in ("stress", "virial", "virials")),
    "stress",
    "virial",
    "virials",
)
PER_ATOM_KEYS = ("energy_per_atom", "e_per_atom")
CHARGE_KEYS = ("charge", "total_charge")
SPIN_KEYS = ("spin_multiplicity", "multiplicity", "spin")
UNIT_KEYS = {
    "energy_unit": ("ev",),
    "energy_units": ("ev",),
    "forces_unit": ("ev/a", "ev/å", "ev/ang", "ev/angstrom"),
    "forces_units": ("ev/a", "ev/å", "ev/ang", "ev/angstrom"),
    "stress_unit": ("ev/a^3", "ev/å^3", "ev/å³", "ev/ang^3", "ev/angstrom^3", "ev/a**3", "ev/a3"),
    "stress_units": ("ev/a^3", "ev/å^3", "ev/å³", "ev/ang^3", "ev/angstrom^3", "ev/a**3", "ev/a3"),
}
_VOIGT_ROWS, _VOIGT_COLUMNS = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)  # ASE's order: xx yy zz yz xz xy


@dataclass(frozen=True, slots=True, eq=False)
class FrameLabels:
    """Energy (eV), and forces (n_atoms, 3) (eV/Å) and stress (3, 3) (eV/Å³), None where absent."""

    energy: float
    forces: NDArray[np.float64] | None
    stress: NDArray[np.float64] | None
    notes: tuple[Note, ...]


def _number(key: str, value: object) -> float:
    try:
        return float(_array(key, value).reshape(()))
    except (TypeError, ValueError):
        raise FrameError(Reason.WRONG_SHAPE, f"{key} is {value!r}, expected one number") from None


def _array(key: str, value: object) -> NDArray[np.float64]:
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise FrameError(Reason.WRONG_SHAPE, f"{key} does not hold numbers: {value!r:.60}") from None


def _candidates(keys: Sequence[str], explicit: str | None, values: Mapping[str, Any]) -> list[str]:
    """Keys present, best first. A key given by the user is the only one."""
    wanted = keys if explicit is None else (explicit,)
    return [key for key in wanted if key in values and values[key] is not None]


def _differing(what: str, found: Mapping[str, NDArray[np.float64]]) -> tuple[Note, ...]:
    """A note if a key that was passed over holds other values than the one taken."""
    taken, *others = found
    for key in others:
        a, b = found[taken], found[key]
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True):
            show = f"{a.ravel()[0]:.6g} against {b.ravel()[0]:.6g}" if a.size and b.size else "other shape"
            return (Note(f"{what}: {taken} taken, {key} differs (--{what}-key chooses)", show),)
    return ()


def _as_tensor(key: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voigt-6 (ASE's order), nine numbers, or 3×3 → a symmetric 3×3."""
    if value.size == 9:
        matrix = value.reshape(3, 3)
        return np.asarray(0.5 * (matrix + matrix.T))
    if value.size == 6:
        matrix = np.zeros((3, 3))
        matrix[_VOIGT_ROWS, _VOIGT_COLUMNS] = value.ravel()
        matrix[_VOIGT_COLUMNS, _VOIGT_ROWS] = value.ravel()
        return matrix
    raise FrameError(Reason.WRONG_SHAPE, f"{key} has shape {value.shape}, expected (6,), (9,) or (3, 3)")


def check_units(values: Mapping[str, Any]) -> None:
    """Raises if the frame itself states a unit that is not ours: a silent factor of 27 is the worst label."""
    for key, ours in UNIT_KEYS.items():
        stated = values.get(key)
        if isinstance(stated, str) and stated.strip().lower() not in ours:
            raise FrameError(Reason.UNIT, f"{key}={stated}; convert the file to eV, eV/Å, eV/Å³ first")


def find_labels(
    values: Mapping[str, Any],
    n_atoms: int,
    cell: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    options: ReadOptions,
) -> FrameLabels:
    """The labels of one frame from all its keys (calculator results, info, arrays).

    Raises:
        FrameError: none there, of the wrong shape, not finite, or of a stated unit that is not ours.
    """
    check_units(values)
    notes: list[Note] = []

    energies = {
        k: np.asarray(_number(k, values[k]) * (n_atoms if k in PER_ATOM_KEYS else 1))
        for k in _candidates(ENERGY_KEYS, options.energy_key, values)
    }
    if "free_energy" in energies and len(energies) > 1:
        del energies["free_energy"]  # differs from the energy by design (electronic entropy)
    energy: float | None = None
    if energies:
        key = next(iter(energies))
        energy = float(energies[key])
        notes += _differing("energy", energies)
        if key == "free_energy":
            notes.append(Note("energy: free_energy taken, no other energy is there", f"{energy:.6g} eV"))
        if key in PER_ATOM_KEYS:
            notes.append(Note(f"energy: {key} times the number of atoms taken", f"{energy:.6g} eV"))
        elif options.energy_per_atom:
            energy *= n_atoms

    all_forces = {k: _array(k, values[k]) for k in _candidates(FORCES_KEYS, options.forces_key, values)}
    forces: NDArray[np.float64] | None = None
    if all_forces:
        key, forces = next(iter(all_forces.items()))
        if forces.shape != (n_atoms, 3):
            raise FrameError(Reason.WRONG_SHAPE, f"{key} has shape {forces.shape}, expected ({n_atoms}, 3)")
        notes += _differing("forces", all_forces)

    stress = _find_stress(values, cell, pbc, options, notes)
    if energy is None:
        raise FrameError(Reason.NO_LABEL, _what_is_there(values, options))
    if forces is None:
        notes.append(Note("forces: absent, the energy alone is kept", _what_is_there(values, options)))
    for name, label in (("energy", energy), ("forces", forces), ("stress", stress)):
        if label is not None and not np.isfinite(label).all():
            raise FrameError(Reason.NON_FINITE_LABEL, f"{name} holds {_first_bad(np.asarray(label))}")
    return FrameLabels(energy, forces, stress, tuple(notes))


def _find_stress(
    values: Mapping[str, Any],
    cell: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    options: ReadOptions,
    notes: list[Note],
) -> NDArray[np.float64] | None:
    keys = _candidates(STRESS_KEYS, options.stress_key, values)
    if not keys:
        return None
    if not pbc.all():
        notes.append(Note("stress: left out where not periodic in all three directions", keys[0]))
        return None
    volume = abs(float(np.linalg.det(cell)))
    found = {}
    for key in keys:
        tensor = _as_tensor(key, _array(key, values[key]))
        # virial = −stress · volume: what GAP and MACE write beside ASE's stress
        found[key] = -tensor / volume if "virial" in key.lower() else tensor
    notes += _differing("stress", found)
    return next(iter(found.values()))


def _first_bad(label: NDArray[np.float64]) -> str:
    where = np.argwhere(~np.isfinite(label))[0]
    at = f" at {tuple(int(i) for i in where)}" if label.ndim else ""
    return f"{label[tuple(where)]}{at}"


def _what_is_there(values: Mapping[str, Any], options: ReadOptions) -> str:
    wanted = [key for key in (options.energy_key, options.forces_key) if key and key not in values]
    there = ", ".join(sorted(k for k in values if k not in ("numbers", "positions"))) or "none"
    return f"{'no ' + ' and no '.join(wanted) + '; ' if wanted else ''}keys there: {there}"


def find_charge_and_spin(info: Mapping[str, Any]) -> tuple[int, int]:
    """(total charge in e, spin multiplicity 2S+1 or 0 when not stated); "spin" means the multiplicity.

    Raises:
        FrameError: either is no whole number, or the multiplicity is negative.
    """
    found = []
    for keys in (CHARGE_KEYS, SPIN_KEYS):
        key = next((k for k in keys if info.get(k) is not None), None)
        number = 0.0 if key is None else _number(key, info[key])
        if not np.isfinite(number) or number != round(number) or abs(number) > 1000:
            raise FrameError(Reason.CHARGE_OR_SPIN, f"{key}={info[key or '']}, expected a whole number")
        if keys is SPIN_KEYS and number < 0:
            raise FrameError(
                Reason.CHARGE_OR_SPIN, f"{key}={number:.0f}, expected 2S+1 ≥ 1, or 0: not stated"
            )
        found.append(int(number))
    return found[0], found[1]
