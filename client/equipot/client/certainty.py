"""How sure answers are: what is asked, and what is known of one structure or of many. No gRPC."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import OutsideDomain, UncertaintyArrays
from equipot.wire.v1.codec import FloatArray, Int64Array

OUTSIDE = "equipot_outside_domain"
"""Where `atoms.info` says why a structure is unlike any in training."""

ENERGY_NUMBERS = ("energy_spread", "energy_interval")
FORCES_NUMBERS = ("forces_spread", "forces_interval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """What is wanted to be known of how sure an answer is.

    Attributes:
        coverage: how often intervals are to hold the truth, 0.01 to 0.99.
        refuse_outside: whether a structure unlike any in training gets a failure and no answer.
    """

    coverage: float = 0.9
    refuse_outside: bool = False

    def options(self) -> pb.UncertaintyOptions:
        """The same on the wire."""
        return pb.UncertaintyOptions(coverage=self.coverage, refuse_outside=self.refuse_outside)


def wanted(asked: bool | Uncertainty) -> Uncertainty | None:
    """What a caller's word means: True for the defaults, False for nothing."""
    if isinstance(asked, bool):
        return Uncertainty() if asked else None
    return asked


@dataclass(frozen=True, slots=True)
class DomainVerdict:
    """Whether a structure is like what the model was trained on.

    Attributes:
        score: of its strangest atom's surroundings: 1 at the border of what training saw; NaN if it failed.
        outside: whether it is beyond: its numbers are a guess then, and intervals do not hold.
        atom: which atom makes it so; None if it is inside.
        reason: in words; empty if it is inside.
    """

    score: float
    outside: bool
    atom: int | None
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Certainty:
    """How sure the answer for one structure is; None: the model cannot tell, see `not_available`.

    Attributes:
        members: potentials in the ensemble, whose mean is the prediction.
        coverage: how often the intervals hold the truth of structures like those in training.
        energy_spread: eV, standard deviation of the members' total energies.
        forces_spread: (n,) eV/Å, root mean square distance of the members' forces on an atom to their mean.
        energy_interval: eV: the true total energy is within ± this.
        forces_interval: (n,) eV/Å: the true force on an atom is within this distance of the predicted one.
        domain: whether it is like what the model was trained on.
        not_available: what the model cannot tell, and why.
    """

    members: int
    coverage: float
    energy_spread: float | None
    forces_spread: FloatArray | None
    energy_interval: float | None
    forces_interval: FloatArray | None
    domain: DomainVerdict | None
    not_available: tuple[str, ...]

    def numbers(self) -> dict[str, float | FloatArray]:
        """What the model can tell, by name; arrays have a value for each atom."""
        found = {name: getattr(self, name) for name in (*ENERGY_NUMBERS, *FORCES_NUMBERS)}
        if self.domain is not None:
            found["domain_score"] = self.domain.score
        return {name: value for name, value in found.items() if value is not None}


@dataclass(slots=True)
class Tally:
    """What is said of many answers together.

    Attributes:
        n_outside: how many are of structures unlike any in training.
        lacking: what the model could not tell, and why.
    """

    n_outside: int = 0
    lacking: tuple[str, ...] = ()

    def add(self, known: Certainty | None) -> None:
        """Takes one answer into account."""
        if known is not None:
            self.lacking = known.not_available
            self.n_outside += known.domain is not None and known.domain.outside

    def lines(self) -> Iterator[str]:
        """The same for people."""
        for why in self.lacking:
            yield f"not available: {why}"
        if self.n_outside:
            yield f"outside the training domain: {self.n_outside} (see {OUTSIDE} in the results)"


def certainty_of(arrays: UncertaintyArrays, index: int, atoms: slice) -> Certainty:
    """That of one structure of a batch, whose atoms are these."""
    one = arrays.of(index, atoms)
    domain = None
    if one.domain_score is not None:
        domain = DomainVerdict(float(one.domain_score[0]), outside=False, atom=None, reason="")
        for beyond in one.outside:
            domain = DomainVerdict(beyond.score, outside=True, atom=beyond.atom, reason=beyond.reason)
    return Certainty(
        members=one.members,
        coverage=one.coverage,
        energy_spread=None if one.energy_spread is None else float(one.energy_spread[0]),
        forces_spread=one.forces_spread,
        energy_interval=None if one.energy_interval is None else float(one.energy_interval[0]),
        forces_interval=one.forces_interval,
        domain=domain,
        not_available=one.not_available,
    )


def among(arrays: UncertaintyArrays, places: Sequence[int], n_atoms: Int64Array) -> UncertaintyArrays:
    """The same of a larger batch, of which these were sent; NaN for the others.

    Args:
        arrays: of the structures that were sent.
        places: of these among all.
        n_atoms: (S,) of all.
    """
    if len(places) == len(n_atoms):
        return arrays
    sent = np.zeros(len(n_atoms), dtype=np.bool_)
    sent[list(places)] = True
    of_sent = np.repeat(sent, n_atoms)

    def spread(
        values: FloatArray | None, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]
    ) -> FloatArray | None:
        if values is None:
            return None
        full = np.full(len(rows), math.nan)
        full[rows] = values
        return full

    return UncertaintyArrays(
        members=arrays.members,
        coverage=arrays.coverage,
        energy_spread=spread(arrays.energy_spread, sent),
        forces_spread=spread(arrays.forces_spread, of_sent),
        energy_interval=spread(arrays.energy_interval, sent),
        forces_interval=spread(arrays.forces_interval, of_sent),
        domain_score=spread(arrays.domain_score, sent),
        outside=tuple(
            OutsideDomain(places[one.index], one.atom, one.score, one.reason) for one in arrays.outside
        ),
        not_available=arrays.not_available,
    )


def concatenated(
    parts: Sequence[tuple[UncertaintyArrays | None, Int64Array]],
) -> UncertaintyArrays | None:
    """Of the parts of one batch, each with its (S,) numbers of atoms; None if nothing was answered."""
    known = [arrays for arrays, _ in parts if arrays is not None]
    if not known:
        return None
    first = known[0]
    nothing = UncertaintyArrays(
        members=first.members,
        coverage=first.coverage,
        energy_spread=None if first.energy_spread is None else np.empty(0),
        forces_spread=None if first.forces_spread is None else np.empty(0),
        energy_interval=None if first.energy_interval is None else np.empty(0),
        forces_interval=None if first.forces_interval is None else np.empty(0),
        domain_score=None if first.domain_score is None else np.empty(0),
    )
    filled = [arrays or among(nothing, [], n_atoms) for arrays, n_atoms in parts]
    starts = np.cumsum([0, *(len(n_atoms) for _, n_atoms in parts)]).tolist()

    def join(name: str) -> FloatArray | None:
        arrays = [getattr(part, name) for part in filled]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    return UncertaintyArrays(
        members=first.members,
        coverage=first.coverage,
        energy_spread=join("energy_spread"),
        forces_spread=join("forces_spread"),
        energy_interval=join("energy_interval"),
        forces_interval=join("forces_interval"),
        domain_score=join("domain_score"),
        outside=tuple(
            OutsideDomain(one.index + start, one.atom, one.score, one.reason)
            for part, start in zip(filled, starts, strict=False)
            for one in part.outside
        ),
        not_available=tuple(dict.fromkeys(why for part in filled for why in part.not_available)),
    )
