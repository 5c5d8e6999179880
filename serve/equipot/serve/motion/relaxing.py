"""How a structure is relaxed, in words: an optimiser, and what its cell may do. Knows no server."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from equipot.serve.errors import InvalidRequest
from equipot.serve.motion.state import Origin, digest_of
from equipot.serve.motion.strain import CellMotion

OptimizerName = Literal["fire", "lbfgs"]

MOST_STEPS = 100_000
LARGEST_STEP = 1.0
"""Å by which no optimiser should ever move an atom at once."""


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


def _refused(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value}: give {allowed}", field=name)
