"""How far a structure has come, and when it had better stop. Knows neither ASE nor server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from equipot.serve.errors import Fault
from equipot.serve.motion.notes import Kept, Note
from equipot.serve.motion.state import BadState, FloatArray, State, number_of

SMALLEST_VOLUME, LARGEST_VOLUME = 0.2, 5.0
"""Of a cell that moves, as parts of what it began with: beyond it has collapsed or blown up."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a structure's positions came to: eV, (n_atoms, 3) eV/Å, (3, 3) eV/Å³ if it was asked for.

    The stress of what is not periodic in all three directions is NaN.
    """

    energy: float
    forces: FloatArray
    stress: FloatArray | None

    @property
    def known_stress(self) -> FloatArray | None:
        """The stress, if it is one in numbers."""
        return self.stress if self.stress is not None and np.isfinite(self.stress).all() else None


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

    def keep(self, words: Mapping[str, Any], arrays: Mapping[str, FloatArray]) -> None:
        """Notes the state between two steps: these words and arrays, and what the positions came to."""
        assert self.last is not None
        own = {"forces": self.last.forces}
        if (stress := self.last.known_stress) is not None:
            own["stress"] = stress
        words = {**words, "energy": self.last.energy}
        self.notes.append(Kept(State(step=self.steps, words=words, arrays={**arrays, **own})))

    def resume(self, state: State, n_atoms: int) -> None:
        """Goes on from a state of a structure of so many atoms.

        Raises:
            BadState: it is not one of such a structure.
        """
        per_atom = (n_atoms, 3)
        shapes = {"positions": per_atom, "forces": per_atom, "cell": (3, 3)}
        for name, shape in {"momenta": per_atom, "stress": (3, 3)}.items():
            if name in state.arrays:
                shapes[name] = shape
        for name, shape in shapes.items():
            if name not in state.arrays or state.arrays[name].shape != shape:
                raise BadState(f"has no {name} of shape {shape}", "begin this structure without a token")
        self.resumed, self.steps = state, state.step
        arrays = state.arrays
        self.last = Given(number_of(state, "energy"), arrays["forces"].copy(), arrays.get("stress"))


def not_finite(steps: int) -> Fault:
    """Of a structure whose positions or cell became so."""
    return Fault(
        "not_finite",
        "positions",
        f"step {steps} led to positions or a cell that are not finite",
        "the structure is far from what the model was trained on: check its geometry",
    )


def out_of_volume(before: float, now: float, steps: int) -> Fault | None:
    """Of a cell that collapsed or blew up; volumes in Å³, 0 where there is none."""
    if SMALLEST_VOLUME * before <= now <= LARGEST_VOLUME * before or not before:
        return None
    return Fault(
        "unstable",
        "cell",
        f"the cell went from {before:.3g} to {now:.3g} Å³ in {steps} steps",
        "check the pressure and the structure, or keep the cell fixed",
    )
