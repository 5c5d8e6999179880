"""One structure moved by an algorithm of ASE, which stops wherever it needs forces. Knows no server.

ASE's algorithms ask for forces in the middle of what they do. Each runs in a greenlet of its own: where it
asks, it is set aside with all its state until the forces are there, and a thousand of them need one thread.
That thread must be the same one always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from greenlet import GreenletExit, getcurrent, greenlet

from equipot.serve.errors import Fault
from equipot.serve.motion.progress import Given, Progress, not_finite, out_of_volume
from equipot.serve.motion.state import FloatArray, State


class Halt(Exception):
    """An algorithm goes no further with this structure.

    Attributes:
        fault: why.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


Algorithm = Callable[[Atoms, Progress], None]
"""Moves the atoms in place and asks their calculator; notes what is to be told; may raise `Halt`."""


class Walker:
    """A structure on its way; made, moved and ended in one thread.

    Attributes:
        atoms: where it is now.
        progress: how far it has come.
    """

    def __init__(
        self, atoms: Atoms, algorithm: Algorithm, *, resumed: State | None = None, most_moved: float = np.inf
    ) -> None:
        """A structure that has not moved yet.

        Args:
            atoms: as they were when they first began.
            algorithm: that moves them.
            resumed: the state that it goes on from.
            most_moved: Å that an atom may move between two questions; one that moves more has flown off.

        Raises:
            BadState: the state is not one of such a structure.
        """
        self.atoms = atoms
        self.progress = Progress()
        self._asking = _Asking()
        self._volume = abs(np.linalg.det(atoms.cell[:]))
        if resumed is not None:
            self.progress.resume(resumed, len(atoms))
            assert self.progress.last is not None
            _put_back(atoms, resumed)
            # What was computed there already is not asked for again.
            self._asking.take(atoms, self.progress.last)
        atoms.calc = self._asking
        self._most_moved = most_moved
        self._before: FloatArray = atoms.positions.copy()
        self._greenlet = greenlet(lambda: algorithm(atoms, self.progress))

    @property
    def positions(self) -> FloatArray:
        """(n_atoms, 3) Å."""
        positions: FloatArray = self.atoms.positions
        return positions

    @property
    def cell(self) -> FloatArray:
        """(3, 3) Å."""
        cell: FloatArray = self.atoms.cell.array
        return cell

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
        atoms, steps = self.atoms, self.progress.steps
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell[:]).all()):
            return not_finite(steps)
        if fault := out_of_volume(self._volume, abs(np.linalg.det(atoms.cell[:])), steps):
            return fault
        if np.isfinite(self._most_moved):
            moved = np.linalg.norm(atoms.positions - self._before, axis=1)
            self._before = atoms.positions.copy()
            if len(moved) and moved.max() > self._most_moved:
                return Fault(
                    "unstable",
                    "positions",
                    f"atom {int(moved.argmax())} moved {moved.max():.3g} Å in step {steps + 1}",
                    "take a smaller time step or a gentler start, and check what the model was trained on",
                )
        return None

    def close(self) -> None:
        """Lets the algorithm go where it is."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)


def keep(
    atoms: Atoms, progress: Progress, words: Mapping[str, Any], arrays: Mapping[str, FloatArray]
) -> None:
    """Notes the state of a structure whose algorithm keeps these words and arrays, between two steps."""
    own: dict[str, FloatArray] = {"positions": atoms.positions.copy(), "cell": atoms.cell[:].copy()}
    if atoms.has("momenta"):
        own["momenta"] = atoms.get_momenta()
    progress.keep(words, {**arrays, **own})


def _put_back(atoms: Atoms, state: State) -> None:
    atoms.set_cell(state.arrays["cell"])
    atoms.set_positions(state.arrays["positions"], apply_constraint=False)
    if "momenta" in state.arrays:
        atoms.set_momenta(state.arrays["momenta"], apply_constraint=False)


class _Asking(Calculator):  # type: ignore[misc]  # ASE has no types
    """What an algorithm takes for a calculator: it sets the algorithm aside until forces come."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  # as ASE has it

    def __init__(self) -> None:
        super().__init__()
        self._seen = np.zeros((0, 3)), np.zeros((0, 3))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        parent = getcurrent().parent
        assert parent is not None
        assert atoms is not None
        self.take(atoms, parent.switch())

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What changed since forces last came. ASE's own comparison takes three quarters of a step's time."""
        positions, cell = self._seen
        same = np.array_equal(positions, atoms.positions) and np.array_equal(cell, atoms.cell.array)
        return [] if same else ["positions"]

    def take(self, atoms: Atoms, given: Given) -> None:
        """Makes it what these positions came to."""
        self._seen = atoms.positions.copy(), atoms.cell.array.copy()
        self.results: dict[str, Any] = {
            "energy": given.energy,
            "free_energy": given.energy,
            "forces": given.forces,
        }
        if given.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(given.stress)
