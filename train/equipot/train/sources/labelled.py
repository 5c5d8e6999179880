"""Makes a checked `Frame` out of the raw arrays of a release. Knows nothing of files or units."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipot.model.batch import System
from equipot.train.sources.base import Frame, FrameError, Note, Reason
from equipot.train.sources.structure import check_structure

NO_CELL: NDArray[np.float64] = np.zeros((3, 3))
ISOLATED: NDArray[np.bool_] = np.zeros(3, dtype=np.bool_)
PERIODIC: NDArray[np.bool_] = np.ones(3, dtype=np.bool_)
NO_FORCES = "forces: absent, the energy alone is kept"


def labelled_frame(
    index: int,
    *,
    atomic_numbers: ArrayLike,
    positions: ArrayLike,
    energy: ArrayLike | None,
    forces: ArrayLike | None,
    cell: ArrayLike = NO_CELL,
    pbc: NDArray[np.bool_] = ISOLATED,
    stress: ArrayLike | None = None,
    charge: int = 0,
    spin_multiplicity: int = 0,
    group: tuple[str, str] | None = None,
    name: str = "",
    extras: Mapping[str, ArrayLike | None] | None = None,
    notes: Sequence[Note] = (),
) -> Frame:
    """Checks structure and labels, all in eV and Å, and puts them into a frame.

    Raises:
        FrameError: what is wrong: shapes, non-finite numbers, no energy, an impossible structure.
    """
    numbers = _whole("atomic_numbers", atomic_numbers)
    n_atoms = len(numbers)
    system = System(
        atomic_numbers=numbers,
        positions=_floats("positions", positions, (n_atoms, 3), Reason.INVALID),
        cell=_floats("cell", cell, (3, 3), Reason.INVALID),
        pbc=pbc,
    )
    check_structure(system)
    if energy is None:
        raise FrameError(Reason.NO_LABEL, "no energy is given")
    noted = list(notes)
    checked = float(
        _finite("energy", np.reshape(_numbers("energy", energy, Reason.WRONG_SHAPE), -1), (1,))[0]
    )
    forces_checked = None if forces is None else _finite("forces", forces, (n_atoms, 3))
    stress_checked = None if stress is None else _finite("stress", stress, (3, 3))
    if forces_checked is None:
        noted.append(Note(NO_FORCES, f"{n_atoms} atoms"))
    elif n_atoms > 1 and not forces_checked.any():
        noted.append(Note("forces: all zero in a frame of several atoms", f"{n_atoms} atoms"))
    return Frame(
        index=index,
        atomic_numbers=system.atomic_numbers,
        positions=system.positions,
        cell=system.cell,
        pbc=system.pbc,
        energy=checked,
        forces=forces_checked,
        stress=stress_checked,
        charge=charge,
        spin_multiplicity=spin_multiplicity,
        group=group,
        notes=tuple(noted),
        name=name,
        extras={
            key: _extra(key, value, n_atoms) for key, value in (extras or {}).items() if value is not None
        },
    )


def _numbers(what: str, value: ArrayLike, reason: Reason) -> NDArray[Any]:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise FrameError(reason, f"{what} does not hold numbers: {value!r:.60}") from None
    return array


def _floats(what: str, value: ArrayLike, shape: tuple[int, ...], reason: Reason) -> NDArray[np.float64]:
    array = _numbers(what, value, reason)
    if array.shape != shape:
        raise FrameError(reason, f"{what} has shape {array.shape}, expected {shape}")
    return np.asarray(array, dtype=np.float64)


def _finite(what: str, value: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    array = _floats(what, value, shape, Reason.WRONG_SHAPE)
    finite = np.isfinite(array)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        at = "" if shape == (1,) else f" at {where}"
        raise FrameError(Reason.NON_FINITE_LABEL, f"{what} holds {array[where]}{at}")
    return array


def _whole(what: str, value: ArrayLike) -> NDArray[np.int64]:
    array = _numbers(what, value, Reason.INVALID)
    if array.ndim != 1:
        raise FrameError(Reason.INVALID, f"{what} has shape {array.shape}, expected (n_atoms,)")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        raise FrameError(Reason.INVALID, f"{what} are not whole numbers: {array[:4]}")
    return array.astype(np.int64)


def _extra(what: str, value: ArrayLike, n_atoms: int) -> NDArray[Any]:
    array = _numbers(what, value, Reason.WRONG_SHAPE)
    if array.shape != (n_atoms,):
        raise FrameError(Reason.WRONG_SHAPE, f"{what} has shape {array.shape}, expected ({n_atoms},)")
    return array
