"""How a structure is relaxed: ASE's optimisers and cell filters, chosen by words. Knows no server."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE, LBFGS

from equipot.serve.errors import InvalidRequest
from equipot.serve.motion.notes import Advance, Place
from equipot.serve.motion.state import Origin, capture, digest_of, restore
from equipot.serve.motion.walker import Given, Progress, kept

OptimizerName = Literal["fire", "lbfgs"]
CellMotion = Literal["fixed", "full", "isotropic", "constant_volume"]

MOST_STEPS = 100_000
LARGEST_STEP = 1.0
"""Å by which no optimiser should ever move an atom at once."""

_OPTIMIZERS: dict[OptimizerName, Callable[..., Any]] = {"fire": FIRE, "lbfgs": LBFGS}
_STATE: dict[OptimizerName, tuple[str, ...]] = {
    "fire": ("vel", "dt", "a", "Nsteps"),
    "lbfgs": ("r0", "f0", "state.iteration", "state.s", "state.y", "state.rho"),
}
"""What these keep from step to step."""

_FILTERS: dict[CellMotion, dict[str, Any]] = {
    "full": {},
    "isotropic": {"hydrostatic_strain": True},
    "constant_volume": {"constant_volume": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxing:
    """How to relax.

    Attributes:
        optimizer: "fire" (Bitzek, Phys. Rev. Lett. 97, 170201, 2006) or "lbfgs".
        fmax: the largest force in eV/Å at which a structure counts as relaxed, the cell's included.
        steps: after which it is given up.
        max_step: Å that an atom moves at most in one step.
        cell: whether and how the cell moves along.
        pressure: in eV/Å³, from outside upon a cell that moves.

    Raises:
        InvalidRequest: a value out of its range, by its name on the wire.
    """

    optimizer: OptimizerName = "fire"
    fmax: float = 0.05
    steps: int = 500
    max_step: float = 0.2
    cell: CellMotion = "fixed"
    pressure: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise _refused("optimizer", self.optimizer, f"one of {', '.join(get_args(OptimizerName))}")
        if self.cell not in get_args(CellMotion):
            raise _refused("cell", self.cell, f"one of {', '.join(get_args(CellMotion))}")
        if not (math.isfinite(self.fmax) and self.fmax > 0):
            raise _refused("fmax", self.fmax, "a force above 0 in eV/Å")
        if not 1 <= self.steps <= MOST_STEPS:
            raise _refused("max_steps", self.steps, f"1 to {MOST_STEPS}")
        if not 0 < self.max_step <= LARGEST_STEP:
            raise _refused("max_step", self.max_step, f"above 0 and at most {LARGEST_STEP:g} Å")
        if not math.isfinite(self.pressure):
            raise _refused("pressure", self.pressure, "a pressure in eV/Å³")
        if self.pressure and self.cell not in ("full", "isotropic"):
            raise _refused("pressure", self.pressure, "0 for a cell whose volume does not move")

    @property
    def moves_cell(self) -> bool:
        """Whether stress is needed."""
        return self.cell != "fixed"

    def algorithm(
        self, *, tell_every: int = 0, frames: bool = False, keep_every: int = 0
    ) -> Callable[[Atoms, Progress], None]:
        """Relaxes atoms in place, asking their calculator once a step.

        Args:
            tell_every: how many steps apart progress is noted; 0: never.
            frames: whether that has where the atoms are.
            keep_every: how many steps apart the state is noted; 0: never.
        """

        def relax(atoms: Atoms, progress: Progress) -> None:
            target: Any = atoms
            if self.moves_cell:
                target = FrechetCellFilter(atoms, scalar_pressure=self.pressure, **_FILTERS[self.cell])
            optimizer = _OPTIMIZERS[self.optimizer](target, logfile=None, maxstep=self.max_step)
            paths = _STATE[self.optimizer]
            begun = progress.steps
            if progress.resumed is not None:
                restore(optimizer, paths, progress.resumed)
                optimizer.nsteps = begun
                if self.moves_cell:
                    target.orig_cell = progress.resumed.arrays["orig_cell"]
            for converged in optimizer.irun(fmax=self.fmax, steps=max(0, self.steps - begun)):
                progress.steps = step = optimizer.nsteps
                progress.converged = bool(converged)
                free = atoms.get_forces()
                progress.largest_force = float(np.sqrt((free**2).sum(axis=1).max()))
                if step == begun:
                    continue
                if tell_every and step % tell_every == 0:
                    assert progress.last is not None
                    frame = _frame(atoms, progress.last) if frames else None
                    progress.notes.append(Advance(step, progress.last.energy, progress.largest_force, frame))
                if keep_every and step % keep_every == 0:
                    words, arrays = capture(optimizer, paths)
                    if self.moves_cell:
                        arrays["orig_cell"] = np.array(target.orig_cell)
                    progress.notes.append(kept(atoms, progress, words, arrays))

        return relax

    def origin(self, model: str, level_of_theory: str, structure: str) -> Origin:
        """To what the state of a structure belongs that is relaxed so; more steps may be added to it."""
        settings = asdict(self)
        del settings["steps"]
        return Origin(
            model=model,
            level_of_theory=level_of_theory,
            algorithm=f"relax {self.optimizer}",
            settings=digest_of(settings),
            structure=structure,
        )


def with_fixed_atoms(atoms: Atoms, fixed: np.ndarray[Any, np.dtype[np.bool_]]) -> Atoms:
    """The same atoms, of which these do not move."""
    if fixed.any():
        atoms.set_constraint(FixAtoms(mask=fixed))
    return atoms


def _frame(atoms: Atoms, given: Given) -> Place:
    return Place(np.array(atoms.positions), np.array(atoms.cell[:]), given.forces)


def _refused(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value}: give {allowed}", field=name)
