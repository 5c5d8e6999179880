"""Spaces so long and thin that a cell list would end the process are refused, others are searched."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from equipot.model.errors import StructureError
from equipot.model.neighbors import half_neighbor_list, neighbor_list

CUTOFF = 5.0
ALL, NONE = np.ones(3, dtype=bool), np.zeros(3, dtype=bool)


def atoms(far: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> NDArray[np.float64]:
    """Twenty close together and one that may be far away."""
    positions = np.random.default_rng(0).uniform(0.0, 8.0, (21, 3))
    positions[-1] += far
    return positions


@pytest.mark.parametrize(
    ("positions", "cell", "pbc", "field"),
    [
        (atoms(), np.diag([1e6, 9.6, 9.6]), ALL, "cell"),
        (atoms(), np.diag([2000.0, 2000.0, 5.0]), ALL, "cell"),
        # Long vectors, nearly parallel: between two faces there is next to nothing.
        (atoms(), np.array([[8.5, 1000.0, 0.0], [0.0, 480.0, 0.0], [0.0, 0.0, 6e5]]), ALL, "cell"),
        (atoms((0.0, 0.0, 1e6)), np.zeros((3, 3)), NONE, "positions"),
        (atoms((0.0, 0.0, 1e6)), np.diag([9.6, 9.6, 0.0]), np.array([True, True, False]), "cell"),
    ],
)
def test_what_would_end_the_process_is_refused(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], field: str
) -> None:
    for search in (neighbor_list, half_neighbor_list):
        with pytest.raises(StructureError, match="too long and thin") as caught:
            search(positions, cell, pbc, CUTOFF)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("far", "side"), [((0.0, 0.0, 0.0), 10.0), ((200.0, 0.0, 0.0), 400.0), ((300.0, 300.0, 300.0), 700.0)]
)
def test_others_are_searched(far: tuple[float, float, float], side: float) -> None:
    assert len(neighbor_list(atoms(far), side * np.eye(3), ALL, CUTOFF).senders) > 100
