"""How sure an answer is: what was asked, what each structure comes to, and what is told of all together.

The domain is looked at where structures are prepared, and costs those alone who ask. Knows no gRPC or queue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from equipot.model.batch import Graph
from equipot.model.conformal import DEFAULT_COVERAGE, LevelCalibration, percent_of
from equipot.model.domain import Domain, Neighborhoods, Verdict
from equipot.model.uncertainty import Uncertainty
from equipot.serve.engine import Result
from equipot.serve.errors import Fault, InvalidRequest
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import OutsideDomain, UncertaintyArrays

NO_SPREAD = "spread: the model is one potential, no ensemble"
NO_INTERVALS = "intervals: the model is not calibrated"
NO_LEVEL = "intervals: the model is not calibrated at this level of theory"
TOO_FEW = "intervals of {}: too few structures settled them for this coverage"
NO_DOMAIN = "domain: the model does not know where its training ended"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller wants to know.

    Attributes:
        coverage: how often intervals are to hold the truth.
        refuse_outside: whether structures outside the domain are not to be computed.
    """

    coverage: float
    refuse_outside: bool


@dataclass(frozen=True, slots=True, eq=False)
class Judged(Graph):
    """A graph of which is known whether it is inside."""

    verdict: Verdict


def understood(options: pb.UncertaintyOptions) -> Wish:
    """A caller's options, checked.

    Raises:
        InvalidRequest: no interval covers as much as asked for.
    """
    try:
        percent = percent_of(options.coverage or DEFAULT_COVERAGE)
    except ValueError as error:
        raise InvalidRequest(str(error), field="uncertainty.coverage") from None
    return Wish(percent / 100, options.refuse_outside)


def judged(prepared: Iterable[Graph | Fault], domain: Domain, *, refuse_outside: bool) -> list[Graph | Fault]:
    """The same with a verdict for each graph, or a fault in the place of those outside."""
    found = list(prepared)
    graphs = [(place, one) for place, one in enumerate(found) if isinstance(one, Graph)]
    if not graphs:
        return found
    verdicts = domain(Neighborhoods.of_graphs([graph for _, graph in graphs], domain.elements))
    for (place, graph), verdict in zip(graphs, verdicts, strict=True):
        if verdict.outside and refuse_outside:
            found[place] = Fault(
                "outside_domain",
                "positions",
                f"it is outside what the model was trained on: {verdict.reason}",
                "check its geometry, ask another model, or leave refuse_outside out to get a guess",
            )
        else:
            found[place] = Judged(graph.system, graph.senders, graph.receivers, graph.cell_shifts, verdict)
    return found


class Gathered:
    """What is known of the structures of one request, as it comes."""

    def __init__(
        self, wish: Wish, known: Uncertainty, level_of_theory: str, offsets: list[int], *, forces: bool
    ) -> None:
        """Nothing yet.

        Args:
            wish: of the caller.
            known: of the model.
            level_of_theory: that was asked for.
            offsets: S+1 places where each structure's atoms begin.
            forces: whether these were asked for.
        """
        self._wish, self._known, self._offsets, self._forces = wish, known, offsets, forces
        self._level: LevelCalibration | None = None
        if known.calibration is not None:
            self._level = known.calibration.by_level_of_theory.get(level_of_theory)
        n_structures, n_atoms = len(offsets) - 1, offsets[-1]
        self._answered = np.zeros(n_structures, dtype=np.bool_)
        self._energy = np.full(n_structures, np.nan)
        self._of_forces = np.full(n_atoms, np.nan)
        self._score = np.full(n_structures, np.nan)
        self._outside: dict[int, OutsideDomain] = {}

    def judged(self, index: int, verdict: Verdict) -> None:
        """Notes a verdict."""
        self._score[index] = verdict.score
        if verdict.outside:
            self._outside[index] = OutsideDomain(index, verdict.atom, verdict.score, verdict.reason)

    def answered(self, index: int, result: Result) -> None:
        """Notes a result; of a model without a spread it is taken as zero."""
        self._answered[index] = True
        self._energy[index] = result.energy_spread or 0.0
        atoms = slice(self._offsets[index], self._offsets[index + 1])
        self._of_forces[atoms] = 0.0 if result.forces_spread is None else result.forces_spread

    def arrays(self) -> UncertaintyArrays:
        """All of it, with NaN for structures that were not answered."""
        lacking: list[str] = []
        several = self._known.members > 1
        if not several:
            lacking.append(NO_SPREAD)
        energy_interval, forces_interval = self._intervals(lacking)
        if self._known.domain is None:
            lacking.append(NO_DOMAIN)
        score = np.where(self._answered, self._score, np.nan)
        return UncertaintyArrays(
            members=self._known.members,
            coverage=self._wish.coverage,
            energy_spread=self._energy if several else None,
            forces_spread=self._of_forces if several and self._forces else None,
            energy_interval=energy_interval,
            forces_interval=forces_interval,
            domain_score=None if self._known.domain is None else score,
            outside=tuple(one for k, one in sorted(self._outside.items()) if self._answered[k]),
            not_available=tuple(lacking),
        )

    def _intervals(
        self, lacking: list[str]
    ) -> tuple[npt.NDArray[np.float64] | None, npt.NDArray[np.float64] | None]:
        if self._level is None:
            lacking.append(NO_INTERVALS if self._known.calibration is None else NO_LEVEL)
            return None, None
        energy = forces = None
        if self._level.energy is not None:
            n_atoms = np.diff(self._offsets)
            per_atom = self._level.energy.half_width(self._energy / n_atoms, self._wish.coverage)
            energy = _told(per_atom * n_atoms, self._answered, TOO_FEW.format("the energy"), lacking)
        if self._level.forces is not None and self._forces:
            widths = self._level.forces.half_width(self._of_forces, self._wish.coverage)
            forces = _told(widths, self._answered, TOO_FEW.format("forces"), lacking)
        return energy, forces


def _told(
    widths: npt.NDArray[np.float64], answered: npt.NDArray[np.bool_], why: str, lacking: list[str]
) -> npt.NDArray[np.float64] | None:
    if answered.any() and not np.isfinite(widths).any():
        lacking.append(why)
        return None
    return widths
