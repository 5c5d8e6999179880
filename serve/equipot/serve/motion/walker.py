"""One structure moved by an algorithm of ASE, which stops wherever it needs forces. Knows no server.

ASE's optimisers ask for forces in the middle of what they do. Each runs in a greenlet of its own: where it
asks, it is set aside with all its state until the forces are there, and a thousand of them need one thread.
That thread must be the same one always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from greenlet import GreenletExit, getcurrent, greenlet

from equipot.serve.errors import Fault

SMALLEST_VOLUME, LARGEST_VOLUME = 0.2, 5.0
"""Of a cell that moves, as parts of what it began with: beyond it has collapsed or blown up."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a structure's positions came to: eV, (n_atoms, 3) eV/Å, (3, 3) eV/Å³ if it was asked for."""

    energy: float
    forces: FloatArray
    stress: FloatArray | None


@dataclass(slots=True, eq=False)
class Progress:
    """How far a structure has come.

    Attributes:
        steps: taken.
        converged: whether the algorithm reached its aim.
        last: what the present positions came to.
        largest_force: of free atoms, eV/Å.
    """

    steps: int = 0
    converged: bool = False
    last: Given | None = None
    largest_force: float = float("nan")


class Walker:
    """A structure on its way; made, moved and ended in one thread.

    Attributes:
        atoms: where it is now.
        progress: how far it has come.
    """

    def __init__(self, atoms: Atoms, algorithm: Callable[[Atoms, Progress], None]) -> None:
        self.atoms = atoms
        self.progress = Progress()
        self._asking = _Asking()
        self._volume = abs(np.linalg.det(atoms.cell[:]))
        atoms.calc = self._asking
        self._greenlet = greenlet(lambda: algorithm(atoms, self.progress))

    def advance(self, given: Given | None = None) -> bool:
        """Goes on with what was asked for, until it asks again (True) or is done (False).

        Raises:
            Exception: whatever the algorithm raises; the structure is where it was then.
        """
        if given is None:
            self._greenlet.switch()
        else:
            self.progress.last = given
            self._greenlet.switch(given)
        return not self._greenlet.dead

    def fault(self) -> Fault | None:
        """Why it is better not to go on from where it is."""
        if not (np.isfinite(self.atoms.positions).all() and np.isfinite(self.atoms.cell[:]).all()):
            return Fault(
                "not_finite",
                "positions",
                f"step {self.progress.steps} led to positions or a cell that are not finite",
                "the structure is far from what the model was trained on: check its geometry",
            )
        now = abs(np.linalg.det(self.atoms.cell[:]))
        if self._volume and not SMALLEST_VOLUME * self._volume <= now <= LARGEST_VOLUME * self._volume:
            return Fault(
                "invalid_structure",
                "cell",
                f"the cell went from {self._volume:.3g} to {now:.3g} Å³ in {self.progress.steps} steps",
                "check the pressure and the structure, or keep the cell fixed",
            )
        return None

    def close(self) -> None:
        """Lets the algorithm go where it is."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)


class _Asking(Calculator):  # type: ignore[misc]  # ASE has no types
    """What an algorithm takes for a calculator: it sets the algorithm aside until forces come."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  # as ASE has it

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        parent = getcurrent().parent
        assert parent is not None
        given: Given = parent.switch()
        self.results: dict[str, Any] = {
            "energy": given.energy,
            "free_energy": given.energy,
            "forces": given.forces,
        }
        if given.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(given.stress)
