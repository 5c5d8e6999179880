"""FIRE and LBFGS on many structures at once, with ASE's arithmetic. Knows no atoms, no cells and no server.

Coordinates of all structures stand one after the other in flat arrays; sums over each structure's own are
taken by segments, in an order that does not depend on the others, so that a course has the same bits in any
company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from equipot.serve.motion.state import FloatArray, State, array_of, number_of

_FIRST_TIMESTEP, _LONGEST_TIMESTEP = 0.1, 1.0
_LONGER, _SHORTER = 1.1, 0.5
_FIRST_MIXING, _LESS_MIXING = 0.1, 0.99
_DOWNHILL_FIRST = 5
"""FIRE's, as ASE sets them; Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006)."""

_MEMORY, _CURVATURE = 100, 70.0
"""LBFGS's: steps that are remembered, and the curvature assumed at first in eV/Å², as ASE sets them."""


class Segments:
    """Parts of flat arrays that lie one after the other, none of them empty.

    Attributes:
        counts: (S,) numbers in each.
        starts: (S,) where each begins.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """Parts of so many numbers each."""
        self.counts = np.array(counts, dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self._ends: list[int] = np.cumsum(self.counts).tolist()

    def spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(S,) as a flat array: each value for all numbers of its part."""
        return np.repeat(values, self.counts)

    def dot(self, one: FloatArray, other: FloatArray) -> FloatArray:
        """(S,) products of the parts."""
        products: FloatArray = np.add.reduceat(one * other, self.starts)
        return products

    def longest(self, vectors: FloatArray) -> FloatArray:
        """(S,) lengths of the longest vector of three in each part."""
        squares = (vectors * vectors).reshape(-1, 3)
        longest: FloatArray = np.maximum.reduceat(
            squares[:, 0] + squares[:, 1] + squares[:, 2], self.starts // 3
        )
        return np.sqrt(longest)

    def split(self, values: FloatArray) -> list[FloatArray]:
        """The parts, as views."""
        return [values[start:end] for start, end in zip([0, *self._ends[:-1]], self._ends, strict=True)]


@dataclass(slots=True, eq=False)
class Fire:
    """What FIRE keeps of one structure.

    Attributes:
        velocity: one for each coordinate; None before the first step.
        timestep: grows downhill.
        mixing: of the forces' direction into the velocity's.
        downhill: steps since the last one uphill.
    """

    velocity: FloatArray | None = None
    timestep: float = _FIRST_TIMESTEP
    mixing: float = _FIRST_MIXING
    downhill: int = 0

    def kept(self) -> tuple[dict[str, Any], dict[str, FloatArray]]:
        """Its numbers and arrays, by ASE's names."""
        words = {"dt": self.timestep, "a": self.mixing, "Nsteps": self.downhill}
        return words, {} if self.velocity is None else {"vel": self.velocity}

    @classmethod
    def restored(cls, state: State, size: int) -> Self:
        """From what was kept of a structure of so many coordinates.

        Raises:
            BadState: something is missing or of another shape.
        """
        velocity = array_of(state, "vel", (size,)) if "vel" in state.arrays else None
        timestep, mixing, downhill = (number_of(state, name) for name in ("dt", "a", "Nsteps"))
        return cls(velocity, timestep, mixing, int(downhill))


def fire(memories: Sequence[Fire], forces: FloatArray, parts: Segments, max_step: float) -> FloatArray:
    """One step of FIRE: (N,) by how much the coordinates change.

    Args:
        memories: of the structures; they move on.
        forces: (N,) on their coordinates.
        parts: whose is whose.
        max_step: how far a structure goes at most, all its coordinates together.
    """
    sizes = parts.counts.tolist()
    velocity = np.concatenate(
        [
            np.zeros(size) if one.velocity is None else one.velocity
            for one, size in zip(memories, sizes, strict=True)
        ]
    )
    moving = np.array([one.velocity is not None for one in memories])
    timestep = np.array([one.timestep for one in memories])
    mixing = np.array([one.mixing for one in memories])
    downhill = np.array([one.downhill for one in memories])
    onward = parts.dot(forces, velocity) > 0.0
    mixed = (1.0 - parts.spread(mixing)) * velocity + parts.spread(mixing) * forces / parts.spread(
        np.sqrt(parts.dot(forces, forces))
    ) * parts.spread(np.sqrt(parts.dot(velocity, velocity)))
    velocity = np.where(parts.spread(onward), mixed, 0.0)
    longer = onward & (downhill > _DOWNHILL_FIRST)
    uphill = moving & ~onward
    timestep = np.where(longer, np.minimum(timestep * _LONGER, _LONGEST_TIMESTEP), timestep)
    timestep = np.where(uphill, timestep * _SHORTER, timestep)
    mixing = np.where(uphill, _FIRST_MIXING, np.where(longer, mixing * _LESS_MIXING, mixing))
    downhill = np.where(onward, downhill + 1, 0)
    velocity += parts.spread(timestep) * forces
    step = parts.spread(timestep) * velocity
    length = np.sqrt(parts.dot(step, step))
    for one, own, *numbers in zip(
        memories, parts.split(velocity), timestep.tolist(), mixing.tolist(), downhill.tolist(), strict=True
    ):
        one.velocity = own
        one.timestep, one.mixing, one.downhill = numbers
    return _shortened(step, length, length > max_step, parts, max_step)


@dataclass(slots=True, eq=False)
class Lbfgs:
    """What LBFGS keeps of one structure.

    Attributes:
        before: coordinates and forces one step ago; None before the first step.
        iteration: steps taken.
        moves: (up to `_MEMORY`, n) changes of coordinates, the newest last.
        turns: changes of the gradient that came with them.
        scales: one over the products of both.
    """

    before: tuple[FloatArray, FloatArray] | None = None
    iteration: int = 0
    moves: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    turns: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    scales: FloatArray = field(default_factory=lambda: np.zeros(0))

    def remember(self, where: FloatArray, forces: FloatArray) -> None:
        """Takes in where the last step led."""
        if self.before is None:
            self.moves = self.turns = np.zeros((0, len(where)))
        else:
            move, turn = where - self.before[0], -forces + self.before[1]
            scale = 1.0 / np.add.reduce(turn * move)
            drop = 1 if len(self.moves) == _MEMORY else 0
            self.moves = np.concatenate([self.moves[drop:], move[None]])
            self.turns = np.concatenate([self.turns[drop:], turn[None]])
            self.scales = np.append(self.scales[drop:], scale)
        self.before = where, forces
        self.iteration += 1

    def kept(self) -> tuple[dict[str, Any], dict[str, FloatArray]]:
        """Its numbers and arrays, by ASE's names."""
        arrays = {"state.s": self.moves, "state.y": self.turns, "state.rho": self.scales}
        if self.before is not None:
            arrays |= {"r0": self.before[0], "f0": self.before[1]}
        return {"state.iteration": self.iteration}, arrays

    @classmethod
    def restored(cls, state: State, size: int) -> Self:
        """From what was kept of a structure of so many coordinates.

        Raises:
            BadState: something is missing or of another shape.
        """
        iteration = int(number_of(state, "state.iteration"))
        length = min(max(iteration - 1, 0), _MEMORY)
        if not iteration:
            return cls()
        return cls(
            (array_of(state, "r0", (size,)), array_of(state, "f0", (size,))),
            iteration,
            array_of(state, "state.s", (length, size)),
            array_of(state, "state.y", (length, size)),
            array_of(state, "state.rho", (length,)),
        )


def lbfgs(
    memories: Sequence[Lbfgs], where: FloatArray, forces: FloatArray, parts: Segments, max_step: float
) -> FloatArray:
    """One step of LBFGS: (N,) by how much the coordinates change.

    Args:
        memories: of the structures; they move on.
        where: (N,) coordinates.
        forces: (N,) on them.
        parts: whose is whose.
        max_step: how far three coordinates of one atom go at most.
    """
    for one, here, pull in zip(memories, parts.split(where), parts.split(forces), strict=True):
        one.remember(here, pull)
    depth = max(len(one.scales) for one in memories)
    moves, turns = np.zeros((2, depth, len(where)))
    scales, shares = np.zeros((2, depth, len(memories)))
    ends = (parts.starts + parts.counts).tolist()
    # The newest last; who remembers less has zeros before, which change nothing.
    for place, (one, start, end) in enumerate(zip(memories, parts.starts.tolist(), ends, strict=True)):
        first = depth - len(one.scales)
        moves[first:, start:end], turns[first:, start:end] = one.moves, one.turns
        scales[first:, place] = one.scales
    rest = -forces
    for age in range(depth - 1, -1, -1):
        shares[age] = scales[age] * parts.dot(moves[age], rest)
        rest -= parts.spread(shares[age]) * turns[age]
    rest *= 1.0 / _CURVATURE
    for age in range(depth):
        shares[age] -= scales[age] * parts.dot(turns[age], rest)
        rest += parts.spread(shares[age]) * moves[age]
    step = -rest
    longest = parts.longest(step)
    return _shortened(step, longest, longest >= max_step, parts, max_step)


def _shortened(
    step: FloatArray, length: FloatArray, too_long: npt.NDArray[np.bool_], parts: Segments, most: float
) -> FloatArray:
    factor: FloatArray = parts.spread(np.where(too_long, most / length, 1.0))
    return step * factor
