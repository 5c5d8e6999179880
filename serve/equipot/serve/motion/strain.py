"""Cells that move along with their atoms, many at once, as in ASE's `FrechetCellFilter`. Knows no server.

A structure's coordinates are its atoms' positions in the cell it began with, and three rows more: the
logarithm U of the deformation that its cell has had since, times the number of atoms. With D = exp(U), cell
and positions are those of the beginning by Dᵀ, and the force on U is the adjoint of the exponential's
derivative, applied to the virial (Higham, Functions of Matrices, 2008, section 10.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import expm

from equipot.serve.motion.state import FloatArray

CellMotion = Literal["fixed", "full", "isotropic", "constant_volume"]

ROWS = 3
"""That a cell has in the coordinates."""


@dataclass(frozen=True, slots=True, eq=False)
class Lattices:
    """Cells of S structures of so many atoms, which have N together.

    Attributes:
        n_atoms: (S,).
        first: (S, 3, 3) Å, as they began.
        of_atom: (N,) whose atom it is.
        is_atom: (N + 3·S,) which rows of the coordinates are atoms.
    """

    n_atoms: npt.NDArray[np.int64]
    first: FloatArray
    of_atom: npt.NDArray[np.int64]
    is_atom: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, n_atoms: npt.NDArray[np.int64], first: FloatArray) -> Lattices:
        """Those that began with these cells."""
        is_atom = np.ones(int(n_atoms.sum()) + ROWS * len(n_atoms), dtype=bool)
        ends = np.cumsum(n_atoms + ROWS)
        for back in range(1, ROWS + 1):
            is_atom[ends - back] = False
        return cls(n_atoms, first, np.repeat(np.arange(len(n_atoms)), n_atoms), is_atom)

    def deformations(self, coordinates: FloatArray) -> FloatArray:
        """(S, 3, 3): D of these (N + 3·S, 3) coordinates."""
        deformations: FloatArray = expm(self._logarithms(coordinates))
        return deformations

    def place(self, coordinates: FloatArray, deformations: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Positions (N, 3) and cells (S, 3, 3) in Å."""
        turned = deformations.transpose(0, 2, 1)
        return _each(coordinates[self.is_atom], turned[self.of_atom]), _product(self.first, turned)

    def forces(
        self,
        forces: FloatArray,
        stress: FloatArray,
        coordinates: FloatArray,
        deformations: FloatArray,
        *,
        pressure: float,
        motion: CellMotion,
    ) -> FloatArray:
        """(N + 3·S, 3) forces on the coordinates.

        Args:
            forces: (N, 3) on atoms, eV/Å.
            stress: (S, 3, 3) eV/Å³.
            coordinates: where they are.
            deformations: D there.
            pressure: eV/Å³, from outside.
            motion: what the cells may do.
        """
        cells = _product(self.first, deformations.transpose(0, 2, 1))
        volumes = np.abs(np.linalg.det(cells))[:, None, None]
        symmetric = (stress + stress.transpose(0, 2, 1)) / 2.0
        virial = -volumes * (symmetric + pressure * np.eye(3))
        if motion == "isotropic":
            virial = _mean_diagonal(virial)
        inverse = np.linalg.inv(deformations).astype(np.float64, copy=False)
        slope = _product(virial, inverse.transpose(0, 2, 1))
        logarithms = self._logarithms(coordinates).transpose(0, 2, 1)
        blocks = np.zeros((len(cells), 6, 6))
        blocks[:, :3, :3] = blocks[:, 3:, 3:] = logarithms
        blocks[:, :3, 3:] = slope
        on_cells = expm(blocks)[:, :3, 3:]
        if motion == "constant_volume":
            on_cells = on_cells - _mean_diagonal(on_cells)
        found = np.zeros((len(self.is_atom), 3))
        found[self.is_atom] = _each(forces, deformations[self.of_atom])
        found[~self.is_atom] = (on_cells / self.n_atoms[:, None, None]).reshape(-1, 3)
        return found

    def _logarithms(self, coordinates: FloatArray) -> FloatArray:
        return coordinates[~self.is_atom].reshape(-1, 3, 3) / self.n_atoms[:, None, None]


def _mean_diagonal(matrices: FloatArray) -> FloatArray:
    mean = (matrices[:, 0, 0] + matrices[:, 1, 1] + matrices[:, 2, 2]) / 3.0
    return mean[:, None, None] * np.eye(3)


# Written out: a library's products need not have the same bits in a batch of another size.


def _each(vectors: FloatArray, matrices: FloatArray) -> FloatArray:
    """(N, 3) row vectors, each times its own (N, 3, 3)."""
    x, y, z = vectors[:, 0, None], vectors[:, 1, None], vectors[:, 2, None]
    return x * matrices[:, 0] + y * matrices[:, 1] + z * matrices[:, 2]


def _product(one: FloatArray, other: FloatArray) -> FloatArray:
    """(S, 3, 3) times (S, 3, 3)."""
    return (
        one[:, :, 0, None] * other[:, 0, None, :]
        + one[:, :, 1, None] * other[:, 1, None, :]
        + one[:, :, 2, None] * other[:, 2, None, :]
    )
