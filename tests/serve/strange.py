"""Structures that leave what a model was trained on, and whether they have."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms, units

from equipot.client import Client, FailureReason, Uncertainty

STRICT = Uncertainty(refuse_outside=True)


def thrown_together(frame: Atoms) -> Atoms:
    """An atom flies at its neighbour."""
    frame = frame.copy()
    distances = frame.get_all_distances() + 9 * np.eye(len(frame))
    one, other = np.unravel_index(distances.argmin(), distances.shape)
    way = np.zeros((len(frame), 3))
    way[one] = 0.05 / distances[one, other] * (frame.positions[other] - frame.positions[one])
    frame.set_velocities(way / units.fs)
    return frame


def is_outside(client: Client, frame: Atoms, positions: Any) -> bool:
    there = Atoms(frame.numbers, positions)
    failure = client.predict(there, uncertainty=STRICT)[0].failure
    return failure is not None and failure.reason is FailureReason.OUTSIDE_DOMAIN
