"""One structure moved by an algorithm of ASE, which stops wherever it needs forces. Knows no server.

ASE's algorithms ask for forces in the middle of what they do. Each runs in a greenlet of its own: where it
asks, it is set aside with all its state until the forces are there, and a thousand of them need one thread.
That thread must be the same one always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from greenlet import GreenletExit, getcurrent, greenlet

from equipot.serve.errors import Fault
from equipot.serve.motion.notes import Kept, Note
from equipot.serve.motion.state import BadState, FloatArray, State

SMALLEST_VOLUME, LARGEST_VOLUME = 0.2, 5.0
"""Of a cell that moves, as parts of what it began with: beyond it has collapsed or blown up."""


class Halt(Exception):
    """An algorithm goes no further with this structure.

    Attributes:
        fault: why.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


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
        notes: that nobody was told yet.
        resumed: the state that it goes on from; None if it begins.
    """

    steps: int = 0
    converged: bool = False
    last: Given | None = None
    largest_force: float = float("nan")
    notes: list[Note] = field(default_factory=list)
    resumed: State | None = None


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
        self.progress = Progress(resumed=resumed)
        self._asking = _Asking()
        self._volume = abs(np.linalg.det(atoms.cell[:]))
        if resumed is not None:
            self.progress.steps = resumed.step
            self.progress.last = _put_back(atoms, resumed, self._asking)
        atoms.calc = self._asking
        self._most_moved = most_moved
        self._before: FloatArray = atoms.positions.copy()
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
        atoms, steps = self.atoms, self.progress.steps
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell[:]).all()):
            return Fault(
                "not_finite",
                "positions",
                f"step {steps} led to positions or a cell that are not finite",
                "the structure is far from what the model was trained on: check its geometry",
            )
        now = abs(np.linalg.det(atoms.cell[:])) if self._volume else 0.0
        if not SMALLEST_VOLUME * self._volume <= now <= LARGEST_VOLUME * self._volume:
            return Fault(
                "unstable",
                "cell",
                f"the cell went from {self._volume:.3g} to {now:.3g} Å³ in {steps} steps",
                "check the pressure and the structure, or keep the cell fixed",
            )
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


def kept(
    atoms: Atoms, progress: Progress, words: Mapping[str, Any], arrays: Mapping[str, FloatArray]
) -> Kept:
    """The state of a structure whose algorithm keeps these words and arrays, between two steps."""
    last = progress.last
    assert last is not None
    own: dict[str, FloatArray] = {
        "positions": atoms.positions.copy(),
        "cell": atoms.cell[:].copy(),
        "forces": last.forces,
    }
    if last.stress is not None:
        own["stress"] = last.stress
    if atoms.has("momenta"):
        own["momenta"] = atoms.get_momenta()
    return Kept(State(step=progress.steps, words={**words, "energy": last.energy}, arrays={**arrays, **own}))


def _put_back(atoms: Atoms, state: State, calculator: _Asking) -> Given:
    per_atom = (len(atoms), 3)
    shapes = {"positions": per_atom, "forces": per_atom, "cell": (3, 3)}
    for name, shape in {"momenta": per_atom, "stress": (3, 3)}.items():
        if name in state.arrays:
            shapes[name] = shape
    for name, shape in shapes.items():
        if name not in state.arrays or state.arrays[name].shape != shape:
            raise BadState(f"has no {name} of shape {shape}", "begin this structure without a token")
    atoms.set_cell(state.arrays["cell"])
    atoms.set_positions(state.arrays["positions"], apply_constraint=False)
    if "momenta" in state.arrays:
        atoms.set_momenta(state.arrays["momenta"], apply_constraint=False)
    given = Given(float(state.words["energy"]), state.arrays["forces"].copy(), state.arrays.get("stress"))
    # What was computed there already is not asked for again.
    calculator.take(atoms, given)
    return given


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
