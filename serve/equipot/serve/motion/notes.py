"""What is told of structures on their way. Knows neither ASE nor server."""

from __future__ import annotations

from dataclasses import dataclass

from equipot.serve.motion.state import FloatArray, State


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where atoms are: (n, 3) Å, (3, 3) Å, and the forces there, (n, 3) eV/Å."""

    positions: FloatArray
    cell: FloatArray
    forces: FloatArray


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a relaxation has come: energy in eV, largest force in eV/Å; where it is, if that is wanted."""

    step: int
    energy: float
    largest_force: float
    frame: Place | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A state to go on from."""

    state: State


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Frame:
    """A step of a trajectory, in Å, Å/fs, eV, K, eV/Å and eV/Å³; None for what was not asked for."""

    step: int
    positions: FloatArray
    velocities: FloatArray
    cell: FloatArray
    energy: float
    kinetic_energy: float
    temperature: float
    forces: FloatArray | None
    stress: FloatArray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a step of a trajectory comes to, in eV, K, Å³, eV/Å³ and eV/Å."""

    step: int
    energy: float
    kinetic_energy: float
    temperature: float
    volume: float
    pressure: float
    largest_force: float


Note = Advance | Kept | Frame | Observation
