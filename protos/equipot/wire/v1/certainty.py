"""How sure an answer is, on the wire and off it: arrays and words. Knows no physics and no gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.arrays import CodecError, FloatArray, Int64Array, array_from, bytes_of


@dataclass(frozen=True, slots=True)
class OutsideDomain:
    """A structure unlike any in training.

    Attributes:
        index: in the request.
        atom: index within the structure of the one that makes it so.
        score: 1 at the border, more beyond.
        reason: for people.
    """

    index: int
    atom: int
    score: float
    reason: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class UncertaintyArrays:
    """Of S structures with N atoms in all; NaN where a structure failed; None where it is not available.

    Attributes:
        members: potentials in the ensemble.
        coverage: how often intervals are to hold the truth.
        energy_spread: (S,) eV, standard deviation of the members' total energies.
        forces_spread: (N,) eV/Å, root mean square distance of the members' forces to their mean.
        energy_interval: (S,) eV, half-width around the total energy.
        forces_interval: (N,) eV/Å, radius around the force on an atom.
        domain_score: (S,), 1 at the border of what training saw.
        outside: one entry for each structure beyond it.
        not_available: what the model cannot tell, and why.
    """

    members: int
    coverage: float
    energy_spread: FloatArray | None = None
    forces_spread: FloatArray | None = None
    energy_interval: FloatArray | None = None
    forces_interval: FloatArray | None = None
    domain_score: FloatArray | None = None
    outside: tuple[OutsideDomain, ...] = ()
    not_available: tuple[str, ...] = ()

    def of(self, index: int, atoms: slice) -> UncertaintyArrays:
        """The same of one structure alone, whose atoms are these."""
        rows = slice(index, index + 1)
        return UncertaintyArrays(
            members=self.members,
            coverage=self.coverage,
            energy_spread=_part(self.energy_spread, rows),
            forces_spread=_part(self.forces_spread, atoms),
            energy_interval=_part(self.energy_interval, rows),
            forces_interval=_part(self.forces_interval, atoms),
            domain_score=_part(self.domain_score, rows),
            outside=tuple(
                OutsideDomain(0, one.atom, one.score, one.reason)
                for one in self.outside
                if one.index == index
            ),
            not_available=self.not_available,
        )


def encode_uncertainty(arrays: UncertaintyArrays) -> pb.Uncertainty:
    """The wire form."""

    def raw(array: FloatArray | None) -> bytes:
        return b"" if array is None else bytes_of(array, np.float64)

    return pb.Uncertainty(
        members=arrays.members,
        coverage=arrays.coverage,
        energy_spread=raw(arrays.energy_spread),
        forces_spread=raw(arrays.forces_spread),
        energy_interval=raw(arrays.energy_interval),
        forces_interval=raw(arrays.forces_interval),
        domain_score=raw(arrays.domain_score),
        outside=[
            pb.OutsideDomain(index=one.index, atom=one.atom, score=one.score, reason=one.reason)
            for one in arrays.outside
        ],
        not_available=arrays.not_available,
    )


def decode_uncertainty(message: pb.Uncertainty, n_atoms: Sequence[int] | Int64Array) -> UncertaintyArrays:
    """Of structures that have `n_atoms` (S,) atoms.

    Raises:
        CodecError: a length that does not fit, or a structure or atom that is not there.
    """
    counts = np.asarray(n_atoms, dtype=np.int64)
    total = int(counts.sum())

    def read(name: str, length: int) -> FloatArray | None:
        raw: bytes = getattr(message, name)
        return array_from(f"uncertainty.{name}", raw, np.float64, (length,)) if raw else None

    for one in message.outside:
        if one.index >= len(counts) or one.atom >= counts[one.index]:
            raise CodecError(
                "uncertainty.outside",
                f"names atom {one.atom} of structure {one.index}, which is not there",
                "number structures and atoms from 0",
            )
    return UncertaintyArrays(
        members=message.members,
        coverage=message.coverage,
        energy_spread=read("energy_spread", len(counts)),
        forces_spread=read("forces_spread", total),
        energy_interval=read("energy_interval", len(counts)),
        forces_interval=read("forces_interval", total),
        domain_score=read("domain_score", len(counts)),
        outside=tuple(OutsideDomain(one.index, one.atom, one.score, one.reason) for one in message.outside),
        not_available=tuple(message.not_available),
    )


def _part(array: FloatArray | None, rows: slice) -> FloatArray | None:
    return None if array is None else array[rows]
