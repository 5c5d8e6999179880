"""One request on its way: what it asks, what is open, the answers as they come. Knows no queue."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from equipot.model.batch import Graph, System
from equipot.model.skin import SkinnedNeighbors
from equipot.serve.call import Call
from equipot.serve.certainty import Gathered, Judged, Wish, judged
from equipot.serve.engine import Result
from equipot.serve.errors import CallError, Fault
from equipot.serve.models import ServedModel
from equipot.serve.pace import Size
from equipot.serve.shares import Priority
from equipot.wire.v1.codec import Failure, FailureReason, PredictionArrays, StructureArrays

CHUNK_ATOMS = 1_024
"""Atoms prepared in one go in a thread, some 10 ms."""

LEAST_EFFORT = 32
"""A structure of fewer atoms takes as long to prepare as one of so many: calls cost more than atoms."""


@dataclass(frozen=True, slots=True)
class Key:
    """What structures share that are computed in one batch; their levels of theory may differ."""

    model: ServedModel
    forces: bool
    stress: bool


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Work:
    """One request, understood.

    Attributes:
        key: the model and what is wanted of it besides the energy.
        structures: to be answered, S of them.
        level: index of the level of theory.
        deadline: by `time.monotonic`; None if the caller waits for ever.
        neighbors: of each structure, kept between requests as it moves; None if there are no others.
        call: that it came with: who asks, and what it may ask for.
        priority: as asked for; the batcher lowers it to what the identity may have.
        certainty: what the caller wants to know of how sure the answer is; None: nothing.
        offsets: S+1 places where each structure's atoms begin, and where the last one's end.
    """

    key: Key
    structures: StructureArrays
    level: int
    deadline: float | None
    neighbors: Sequence[SkinnedNeighbors] | None = None
    call: Call = field(default_factory=Call)
    priority: Priority = Priority.NORMAL
    certainty: Wish | None = None
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", list(accumulate(self.structures.n_atoms.tolist(), initial=0)))

    @property
    def size(self) -> Size:
        """Structures and atoms; its edges are not known."""
        return Size(len(self.structures), self.offsets[-1], 0)

    @property
    def effort(self) -> int:
        """What it takes to prepare all structures, in atoms."""
        return sum(_effort(count) for count in self.structures.n_atoms.tolist())

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of structures (start, stop), each about as much effort as `CHUNK_ATOMS` atoms."""
        start = atoms = 0
        for stop, count in enumerate(self.structures.n_atoms.tolist(), 1):
            atoms += _effort(count)
            if atoms >= CHUNK_ATOMS:
                yield start, stop
                start, atoms = stop, 0
        if start < len(self.structures):
            yield start, len(self.structures)

    def prepare(self, start: int, stop: int) -> list[Graph | Fault]:
        """Checks these structures and finds their edges; safe in any thread."""
        neighbors = None if self.neighbors is None else self.neighbors[start:stop]
        engine = self.key.model.engine
        prepared = engine.prepare(list(self._systems(start, stop)), neighbors=neighbors)
        domain = engine.uncertainty.domain
        if self.certainty is None or domain is None:
            return prepared
        return judged(prepared, domain, refuse_outside=self.certainty.refuse_outside)

    def _systems(self, start: int, stop: int) -> Iterator[System]:
        arrays, first = self.structures, self.offsets[start]
        numbers = arrays.atomic_numbers[first : self.offsets[stop]].astype(np.int64)
        charges = arrays.charge[start:stop].tolist()
        spins = arrays.spin_multiplicity[start:stop].tolist()
        for index, charge, spin in zip(range(start, stop), charges, spins, strict=True):
            begin, end = self.offsets[index], self.offsets[index + 1]
            yield System(
                atomic_numbers=numbers[begin - first : end - first],
                positions=arrays.positions[begin:end],
                cell=arrays.cell[index],
                pbc=arrays.pbc[index],
                charge=charge,
                spin_multiplicity=spin,
                level_of_theory=self.level,
            )


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Predictions for one request; seconds that it was prepared, waited (the longest) and was computed."""

    predictions: PredictionArrays
    prepare_seconds: float
    queue_seconds: float
    compute_seconds: float


class Job:
    """The state of one request.

    Attributes:
        work: what is asked.
        in_company: whether others are known to ask soon.
        done: resolved when every structure has its answer; fails with a `CallError`.
        room: set when the request may prepare more.
        graphs: the prepared structures that wait, by index.
    """

    def __init__(self, work: Work, *, in_company: bool = False) -> None:
        self.work, self.in_company = work, in_company
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.room = asyncio.Event()
        self.graphs: dict[int, Graph] = {}
        self._open = len(work.structures)
        self._energy = np.full(self._open, np.nan)
        self._forces = np.full(work.structures.positions.shape, np.nan) if work.key.forces else None
        self._stress = np.full((self._open, 3, 3), np.nan) if work.key.stress else None
        self._gathered: Gathered | None = None
        if work.certainty is not None:
            model = work.key.model
            self._gathered = Gathered(
                work.certainty,
                model.engine.uncertainty,
                model.card.levels_of_theory[work.level],
                work.offsets,
                forces=work.key.forces,
            )
        self._failures: list[Failure] = []
        self._prepare_seconds = 0.0
        self._queue_seconds = 0.0
        self._compute_seconds = 0.0
        if not self._open:
            self.done.set_result(None)

    def answer(self, index: int, result: Result | Fault) -> None:
        """Notes one structure's answer; the last one resolves `done`."""
        if isinstance(result, Fault):
            self._failures.append(
                Failure(index, FailureReason(result.reason), result.field, result.message, result.remedy)
            )
        else:
            self._energy[index] = result.energy
            if self._forces is not None:
                offsets = self.work.offsets
                self._forces[offsets[index] : offsets[index + 1]] = result.forces
            if self._stress is not None:
                self._stress[index] = result.stress
            if self._gathered is not None:
                self._gathered.answered(index, result)
        self._open -= 1
        if not self._open and not self.done.done():
            self.done.set_result(None)

    def waits(self, index: int, graph: Graph) -> bool:
        """Notes a structure that is ready to be computed; says whether it is known to be outside."""
        self.graphs[index] = graph
        if self._gathered is None or not isinstance(graph, Judged):
            return False
        self._gathered.judged(index, graph.verdict)
        return graph.verdict.outside

    def prepared(self, seconds: float) -> None:
        """Notes how long some of its structures took to prepare."""
        self._prepare_seconds += seconds

    def waited(self, seconds: float) -> None:
        """Notes how long one of its structures waited."""
        self._queue_seconds = max(self._queue_seconds, seconds)

    def computed(self, seconds: float) -> None:
        """Notes a batch that it took part in."""
        self._compute_seconds += seconds

    def fail(self, error: CallError) -> None:
        """Ends the whole request."""
        if not self.done.done():
            self.done.set_exception(error)
            # Read here, lest a caller that was cancelled at the same moment leaves it unread in the log.
            self.done.exception()
        self.room.set()

    def result(self) -> Answer:
        """The whole answer, once `done`."""
        failures = tuple(sorted(self._failures, key=lambda failure: failure.index))
        uncertainty = None if self._gathered is None else self._gathered.arrays()
        predictions = PredictionArrays(self._energy, self._forces, self._stress, failures, uncertainty)
        return Answer(predictions, self._prepare_seconds, self._queue_seconds, self._compute_seconds)


def _effort(n_atoms: int) -> int:
    return max(LEAST_EFFORT, n_atoms)
