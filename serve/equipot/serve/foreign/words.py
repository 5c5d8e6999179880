"""What server and calculator process say to each other: plain bytes and numbers, whatever numpy each has."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Reason = Literal["invalid_structure", "unsupported", "internal"]


class Structure(NamedTuple):
    """One structure on its way: arrays as bytes of int64 and float64."""

    atomic_numbers: bytes
    positions: bytes
    cell: bytes
    pbc: tuple[bool, bool, bool]
    charge: int
    spin_multiplicity: int

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """(n,)."""
        return np.frombuffer(self.atomic_numbers, dtype=np.int64)

    @property
    def places(self) -> npt.NDArray[np.float64]:
        """(n, 3) in Å."""
        return np.frombuffer(self.positions, dtype=np.float64).reshape(-1, 3)

    @property
    def lattice(self) -> npt.NDArray[np.float64]:
        """(3, 3) in Å, rows are vectors."""
        return np.frombuffer(self.cell, dtype=np.float64).reshape(3, 3)


class Answered(NamedTuple):
    """Energy in eV; forces (n, 3) in eV/Å and stress (3, 3) in eV/Å³ as bytes, empty if not asked for."""

    energy: float
    forces: bytes
    stress: bytes


class Refused(NamedTuple):
    """Why one structure, or the whole potential, cannot be computed."""

    reason: Reason
    message: str


class Facts(NamedTuple):
    """What a potential says of itself; empty or 0 where it says nothing.

    `charge` is how it is told of charges, "refuse" if it is not. `batched` says whether structures are
    computed together. `versions` are those of its packages, `weights` sums of its files, by name.
    """

    elements: tuple[int, ...]
    cutoff: float
    level_of_theory: str
    has_forces: bool
    has_stress: bool
    conservative: bool
    dtype: str
    n_parameters: int
    charge: str
    batched: bool
    versions: dict[str, str]
    weights: dict[str, str]


class Backend(Protocol):
    """What computes, in the process of the calculator."""

    def facts(self) -> Facts:
        """What it says of itself."""

    def compute(self, structures: list[Structure], *, forces: bool, stress: bool) -> list[Answered | Refused]:
        """Answers in order; raises only if none could be answered."""


def answered(energy: float, forces: Any, stress: Any) -> Answered:  # noqa: ANN401  # whatever array a package has
    """An answer from numbers and arrays of any type; None is left out."""
    return Answered(
        float(energy),
        b"" if forces is None else np.ascontiguousarray(forces, dtype=np.float64).tobytes(),
        b"" if stress is None else np.ascontiguousarray(stress, dtype=np.float64).tobytes(),
    )
