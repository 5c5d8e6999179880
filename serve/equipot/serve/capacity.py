"""What one model's batches may hold, cost and take: measured when it is loaded, learnt while it serves.

Knows no torch: it measures any engine by what it is given, on made-up crystals of the density that the
model's training data had.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np

from equipot.model.batch import Graph, System
from equipot.serve.batcher import Budget
from equipot.serve.engine import Engine, Result
from equipot.serve.machine import MemoryMeter
from equipot.serve.pace import MEMORY, Pace, Size
from equipot.serve.terms import BatchLimit, Terms

CALIBRATION_SECONDS = 2.0
"""A measurement that would take longer than what is left of this is not begun."""

GLANCE_SECONDS = 0.1
"""The same where the operator has settled the batches, and only their time is to be known."""

LEAST_SECONDS = 0.02
"""Batches that take no longer make nobody wait, and handing one over costs a part of this."""

LATENCY_SECONDS = 0.25
"""No batch of several structures should hold the engine for longer: others wait meanwhile."""

GOOD = 0.95
"""The smallest batches of this part of the best speed are chosen: larger ones make others wait for little."""

MEMORY_SHARE = 0.5
"""Part of the free memory that one batch may take."""

MOST_EDGES = 524_288
"""Larger batches are not tried: all processors are busy long before."""

CRYSTAL_SIDE = 2
"""Atoms along each side of a made-up crystal: few, as a billion parameters take seconds for them."""

FEWEST_NEIGHBORS = 12.0
"""That a made-up crystal's atoms have, whatever small molecules the model was trained on."""

FORCES_COST = 2.0
"""Energies with forces take about twice as long as energies alone: what holds until one was seen."""

PRICE_MEMORY = 0.95
"""Weight that a batch keeps with each later one, where the price follows them."""

UNKNOWN_PRICE = 1e-6
"""Seconds for an edge of a small model on one core."""

logger = logging.getLogger(__name__)


class Capacity:
    """Of one served model.

    Attributes:
        terms: limit of its batches, and seconds for each edge of a full one: how dear its edges are beside
            other models'. Where that was not measured it follows what batches take.
        bytes_per_edge: of working memory at its peak; 0 while it is not known.
        neighbors: edges of an atom, in what was asked for lately.
    """

    def __init__(self, limit: BatchLimit, *, neighbors: float) -> None:
        self.terms = Terms(limit, price=UNKNOWN_PRICE, settled=False)
        self.neighbors = neighbors
        self._spent = 0.0, 0.0
        self.bytes_per_edge = 0.0
        self._paces: dict[tuple[bool, bool], Pace] = {}
        self._around = Pace()

    @property
    def limit(self) -> BatchLimit:
        """Of its batches."""
        return self.terms.limit

    def learn(self, size: Size, seconds: float, *, forces: bool, stress: bool) -> None:
        """Takes a computed batch into account."""
        self._paces.setdefault((forces, stress), Pace()).learn(size, seconds)
        if size.atoms:
            self.neighbors += MEMORY * (size.edges / size.atoms - self.neighbors)
        if not self.terms.settled:
            self._follow(size, seconds)

    def _follow(self, size: Size, seconds: float) -> None:
        """Lets the price be what edges took lately, on the whole: the first batch may have been cold."""
        whole_seconds, whole_work = (PRICE_MEMORY * past for past in self._spent)
        self._spent = whole_seconds + seconds, whole_work + size.edges + size.atoms
        if self._spent[1]:
            self.terms.price = self._spent[0] / self._spent[1]

    def settle(self, *, price: float, bytes_per_edge: float) -> None:
        """Notes what was measured; batches do not change it any more."""
        self.terms.price, self.terms.settled = price, True
        self.bytes_per_edge = bytes_per_edge

    def seconds(self, size: Size, *, forces: bool, stress: bool) -> float:
        """How long a batch of this size would take; infinite while nothing is known."""
        known = self._paces.get((forces, stress))
        if known:
            return known.seconds(size)
        for derivatives, pace in self._paces.items():
            cost = (FORCES_COST if forces or stress else 1.0) / (FORCES_COST if any(derivatives) else 1.0)
            return pace.seconds(size) * cost
        return float("inf")

    def learn_around(self, size: Size, seconds: float) -> None:
        """Takes a request into account that took so long beside queue, preparation and engine."""
        self._around.learn(size, seconds)

    def around_seconds(self, size: Size) -> float:
        """What a request takes beside queue, preparation and engine."""
        return self._around.seconds(size) if self._around else 0.0

    def memory_bytes(self, size: Size) -> int:
        """Working memory of such a batch at its peak; 0 if it was not measured."""
        return round(self.bytes_per_edge * (size.edges + size.atoms))


def measure(engine: Engine, budget: Budget, *, calibrate: bool, device: str) -> Capacity:
    """The capacity of an engine, from batches that grow until they gain nothing any more.

    Args:
        engine: loaded and warm.
        budget: what its batches hold if it is not to be calibrated, or cannot be.
        calibrate: whether to find the size of batches; else only a glance is taken at their time.
        device: whose memory counts.
    """
    limit = BatchLimit(edges=budget.batch_edges, atoms=budget.batch_atoms)
    capacity = Capacity(limit, neighbors=engine.card.mean_neighbors)
    if not engine.measurable:
        return capacity
    meter = MemoryMeter(device)
    measured: list[tuple[Size, float]] = []
    most_bytes = 0.0
    try:
        for size, seconds in _growing(engine, meter, CALIBRATION_SECONDS if calibrate else GLANCE_SECONDS):
            measured.append((size, seconds))
            capacity.learn(size, seconds, forces=True, stress=False)
            capacity.neighbors = engine.card.mean_neighbors
            most_bytes = max(most_bytes, meter.grown / (size.edges + size.atoms))
            if calibrate and _saturated(measured):
                break
            if not calibrate and size.edges >= budget.batch_edges:
                break
    except Exception as error:
        # A model that computes real structures is not refused because it dislikes made-up ones.
        logger.info("%s is not measured: %s", engine.card.name, error)
    if not measured:
        return capacity
    best = max(measured, key=lambda one: _speed(*one))
    price = 1.0 / _speed(*best)
    if calibrate:
        chosen = next(size for size, seconds in measured if _speed(size, seconds) >= GOOD * _speed(*best))
        edges = max(chosen.edges, round(LEAST_SECONDS / price))
        edges = max(_within(min(edges, MOST_EDGES), price, most_bytes, meter), measured[0][0].edges)
        density = chosen.edges / chosen.atoms
        # For crowded structures edges bound a batch, for sparse ones atoms.
        limit.edges, limit.atoms = edges, min(budget.batch_atoms, max(1, round(4 * edges / density)))
        logger.info(
            "%s: batches of up to %d edges (%d atoms), %.3g ms each, %.3g edges/s",
            engine.card.name,
            limit.edges,
            limit.atoms,
            1e3 * capacity.seconds(_scaled(chosen, edges), forces=True, stress=False),
            1.0 / price,
        )
    capacity.settle(price=price, bytes_per_edge=most_bytes)
    return capacity


def _growing(engine: Engine, meter: MemoryMeter, budget_seconds: float) -> Iterator[tuple[Size, float]]:
    """Sizes that double, and the seconds each took, as long as the next one can be afforded."""
    begun = time.perf_counter()
    crystal = _crystal(engine)
    graphs = [crystal]
    while True:
        size = Size(len(graphs), len(graphs) * crystal.n_atoms, len(graphs) * crystal.n_edges)
        meter.start()
        seconds = _timed(engine, graphs)
        if 3 * seconds < begun + budget_seconds - time.perf_counter():
            seconds = min(seconds, _timed(engine, graphs))
        meter.stop()
        yield size, seconds
        left = begun + budget_seconds - time.perf_counter()
        if 2 * size.edges > MOST_EDGES or 2 * seconds > left:
            return
        graphs = graphs * 2


def _timed(engine: Engine, graphs: list[Graph]) -> float:
    begun = time.perf_counter()
    results = engine.compute(graphs, forces=True, stress=False)
    seconds = time.perf_counter() - begun
    if not all(isinstance(result, Result) for result in results):
        raise ValueError(f"a made-up crystal cannot be computed: {results[0]}")
    return seconds


def _crystal(engine: Engine) -> Graph:
    """Atoms on a shaken grid, as far apart as the mean number of neighbours says."""
    card = engine.card
    random = np.random.default_rng(0)
    n_atoms = CRYSTAL_SIDE**3
    volume_per_atom = 4.0 / 3.0 * np.pi * card.cutoff**3 / max(card.mean_neighbors, FEWEST_NEIGHBORS)
    spacing = volume_per_atom ** (1.0 / 3.0)
    grid = np.stack(np.meshgrid(*[np.arange(CRYSTAL_SIDE)] * 3, indexing="ij"), -1).reshape(-1, 3)
    elements = np.array(card.elements)
    (graph,) = engine.prepare(
        [
            System(
                atomic_numbers=elements[np.arange(n_atoms) % len(elements)],
                positions=spacing * (grid + random.uniform(-0.1, 0.1, (n_atoms, 3))),
                cell=spacing * CRYSTAL_SIDE * np.eye(3),
                pbc=np.ones(3, dtype=np.bool_),
                charge=card.charges[0],
                spin_multiplicity=card.spin_multiplicities[0],
            )
        ]
    )
    if not isinstance(graph, Graph):
        raise ValueError(f"a made-up crystal is refused: {graph.message}")
    return graph


def _speed(size: Size, seconds: float) -> float:
    return (size.edges + size.atoms) / seconds


def _saturated(measured: list[tuple[Size, float]]) -> bool:
    """Whether the last two doublings gained nothing worth the wait."""
    speeds = [_speed(*one) for one in measured]
    return measured[-1][1] > LEAST_SECONDS and len(speeds) > 2 and max(speeds[-2:]) < max(speeds[:-2]) / GOOD


def _within(edges: int, price: float, bytes_per_edge: float, meter: MemoryMeter) -> int:
    """So many edges, or fewer if they would take too long or too much memory."""
    edges = min(edges, max(1, int(LATENCY_SECONDS / price)))
    free = meter.free_bytes()
    if bytes_per_edge and free:
        edges = min(edges, max(1, int(MEMORY_SHARE * free / bytes_per_edge)))
    return edges


def _scaled(size: Size, edges: int) -> Size:
    part = edges / size.edges
    return Size(max(1, round(size.structures * part)), round(size.atoms * part), edges)
