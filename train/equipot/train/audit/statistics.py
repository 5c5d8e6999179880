"""What a store holds, in numbers, gathered by blocks in two passes: as it lies, then against references."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from equipot.train.audit.blocks import Block
from equipot.train.audit.sketch import Extremes, Sketch
from equipot.train.store import N_ELEMENTS

_CONDENSED = 0.04  # atoms/Å³; a molecule in its box has less, a solid or liquid hardly so
_EXAMPLES = 20


class Places:
    """How many structures something is true of, and the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, block: Block, which: NDArray[np.bool_]) -> None:
        """Takes the structures of the block for which it is true."""
        self.count += int(which.sum())
        if len(self.first) < _EXAMPLES:
            self.first += block.indices[which][: _EXAMPLES - len(self.first)].tolist()


class StoreStatistics:
    """Distributions over one store. Sketches are of structures unless they say of atoms.

    Attributes:
        structures, atoms: how many.
        elements: (119,) atoms; structures_with: (119,) structures with the element.
        sizes: atoms per structure.
        charges, spins: value → structures; periodicity: "ttf" and the like → structures.
        energy_per_atom: raw, eV.
        number_density: 1/Å³ of the fully periodic.
        force_components, force_sizes: eV/Å, of atoms; force_of: per element; largest_force: of structures.
        net_force, torque: of the whole over the root of the sum of squares, 0 is right, 1 is random.
        pressure: −tr σ/3 in eV/Å³; stress_components; pressure_energy: |p| V/n in eV per atom.
        residual: eV per atom that the reference energies leave; residual_of: element → structures with it.
        no_forces, zero_forces, no_cell, lost_periodicity: where.
    """

    def __init__(self) -> None:
        self.structures = self.atoms = 0
        self.elements = np.zeros(N_ELEMENTS, np.int64)
        self.structures_with = np.zeros(N_ELEMENTS, np.int64)
        self.charges: Counter[int] = Counter()
        self.spins: Counter[int] = Counter()
        self.periodicity: Counter[str] = Counter()
        self.sizes, self.energy_per_atom, self.number_density = Sketch(), Sketch(), Sketch()
        self.force_components, self.force_sizes, self.largest_force = Sketch(), Sketch(), Sketch()
        self.force_of: dict[int, Sketch] = {}
        self.net_force, self.torque = Sketch(), Sketch()
        self.pressure, self.stress_components, self.pressure_energy = Sketch(), Sketch(), Sketch()
        self.residual = Sketch()
        self.residual_of: dict[int, Sketch] = {}
        self.no_forces, self.zero_forces = Places(), Places()
        self.no_cell, self.lost_periodicity = Places(), Places()
        self.large_forces, self.high_residuals, self.low_residuals = Extremes(), Extremes(), Extremes()

    def add(self, block: Block) -> None:
        """First pass: everything but the residuals."""
        self.structures += len(block)
        self.atoms += len(block.atomic_numbers)
        self.elements += block.counts.sum(axis=0).astype(np.int64)
        self.structures_with += (block.counts > 0).sum(axis=0)
        self.sizes.add(block.n_atoms.astype(np.float64))
        self.energy_per_atom.add(block.energy / block.n_atoms)
        for values, counter in ((block.charge, self.charges), (block.spin_multiplicity, self.spins)):
            for value, count in zip(*np.unique(values, return_counts=True), strict=True):
                counter[int(value)] += int(count)
        for pattern, count in zip(*np.unique(block.pbc, axis=0, return_counts=True), strict=True):
            self.periodicity["".join("t" if axis else "f" for axis in pattern)] += int(count)
        self._add_cells(block)
        self._add_forces(block)
        trace = np.trace(block.stress, axis1=1, axis2=2)
        self.pressure.add(-trace / 3)
        self.stress_components.add(block.stress.ravel())
        self.pressure_energy.add(np.abs(trace) / 3 * block.volume / block.n_atoms)

    def _add_cells(self, block: Block) -> None:
        self.number_density.add(block.n_atoms / block.volume)
        lengths = np.linalg.norm(block.cell, axis=2)
        self.no_cell.add(block, np.asarray((block.pbc & (lengths < 1e-6)).any(axis=1)))
        volume = np.abs(np.linalg.det(block.cell))
        dense = block.n_atoms > _CONDENSED * np.where(volume > 0, volume, np.inf)
        self.lost_periodicity.add(block, ~block.pbc.any(axis=1) & dense & (block.n_atoms > 1))

    def _add_forces(self, block: Block) -> None:
        there: NDArray[np.bool_] = np.asarray(np.isfinite(block.sums(block.forces)).all(axis=1))
        self.no_forces.add(block, ~there)
        sizes = np.linalg.norm(block.forces, axis=1)
        largest = block.largest(sizes)
        zero = there & (largest == 0) & (block.n_atoms > 1)
        self.zero_forces.add(block, zero)
        self.large_forces.add(largest, block.indices)
        self.largest_force.add(largest)
        self.force_components.add(block.forces.ravel())
        self.force_sizes.add(sizes)
        for z in np.unique(block.atomic_numbers).tolist():
            self.force_of.setdefault(z, Sketch()).add(sizes[block.atomic_numbers == z])
        moving = there & ~zero & (block.n_atoms > 1)
        square = block.sums(np.square(sizes))
        with np.errstate(invalid="ignore", divide="ignore"):
            net = np.linalg.norm(block.sums(block.forces), axis=1) / np.sqrt(square)
            self.net_force.add(net[moving])
            free = moving & ~block.pbc.any(axis=1) & (block.n_atoms > 2)
            if free.any():
                centre = block.sums(block.positions) / block.n_atoms[:, None]
                arms = block.positions - centre[block.owner]
                torque = np.linalg.norm(block.sums(np.cross(arms, block.forces)), axis=1)
                lever = np.square(np.linalg.norm(arms, axis=1) * sizes)
                self.torque.add((torque / np.sqrt(block.sums(lever)))[free])

    def add_residuals(self, block: Block, references: NDArray[np.float64]) -> None:
        """Second pass: what (119,) reference energies in eV leave."""
        left = (block.energy - block.counts @ references) / block.n_atoms
        self.residual.add(left)
        self.high_residuals.add(left, block.indices)
        self.low_residuals.add(-left, block.indices)
        for z in np.flatnonzero(block.counts.any(axis=0)).tolist():
            self.residual_of.setdefault(z, Sketch()).add(left[block.counts[:, z] > 0])
