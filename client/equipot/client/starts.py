"""How structures begin to move: velocities and masses that they bring. Knows no server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import FloatArray

PLAIN_SHARE, SIMULATION_SHARE, RESUMED_SHARE = 9 / 8, 3.0, 12.0
"""So many times the bytes of its positions alone does a structure take that is moved, at most: with the atoms
that stay and a seed; with velocities and masses, too; with the state that it goes on from, too."""


def share_of(items: Sequence[Any]) -> float:
    """That of these structures, which begin to move."""
    brought = (getattr(item, "arrays", {}) for item in items)
    return SIMULATION_SHARE if any("momenta" in one or "masses" in one for one in brought) else PLAIN_SHARE


def put_start(
    request: pb.SimulateRequest,
    velocities: Sequence[FloatArray | None],
    masses: Sequence[FloatArray] | None,
    n_atoms: Sequence[int],
) -> None:
    """Writes velocities, where they are to be drawn, and masses of structures of so many atoms."""
    if any(one is not None for one in velocities):
        request.velocities = b"".join(
            (np.zeros((count, 3)) if one is None else one).astype("<f8").tobytes()
            for one, count in zip(velocities, n_atoms, strict=True)
        )
        request.drawn = bytes(one is None for one in velocities)
    if masses is not None:
        request.masses = b"".join(one.astype("<f8").tobytes() for one in masses)


def velocities_of(item: Any) -> FloatArray | None:  # noqa: ANN401  # ASE's Atoms, or anything else
    """(n, 3) in Å/fs of `ase.Atoms` that have momenta; None: they are to be drawn."""
    momenta = getattr(item, "arrays", {}).get("momenta")
    if momenta is None or not np.any(momenta):
        return None
    from ase.units import fs

    velocities: FloatArray = item.get_velocities() * fs
    return velocities


def masses_of(
    items: Sequence[Any], atomic_numbers: Sequence[npt.NDArray[np.int32]]
) -> list[FloatArray] | None:
    """(n,) in unified atomic mass units of each item; None if none of them has its own."""
    own = [getattr(item, "arrays", {}).get("masses") for item in items]
    if all(one is None for one in own):
        return None
    from ase.data import atomic_masses

    return [
        np.asarray(
            atomic_masses[np.clip(numbers, 0, len(atomic_masses) - 1)] if one is None else one,
            dtype=np.float64,
        )
        for one, numbers in zip(own, atomic_numbers, strict=True)
    ]
