"""Computes batches of graphs with one loaded bundle, in this process. Knows nothing of requests or gRPC."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from equipot.model.batch import Graph, System, build_graph, collate
from equipot.model.bundle import BundleCard, load_potential
from equipot.model.errors import StructureError
from equipot.model.potential import Potential
from equipot.model.validate import check_graph, check_supported, check_system
from equipot.serve.config import RequestLimits
from equipot.serve.errors import Fault, ServeError
from equipot.serve.footprint import footprint

ESTIMATE_MARGIN = 2.0
"""A structure is refused unbuilt if its estimated edges are this many times the limit."""

MOST_PAIRS = 1e9
"""Pairs beyond which the search for neighbours alone would hold a core for seconds."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One structure's answer.

    Attributes:
        energy: in eV.
        forces: (n_atoms, 3) in eV/Å, None if not asked for.
        stress: (3, 3) in eV/Å³, None if not asked for; NaN if not periodic in all three directions.
    """

    energy: float
    forces: npt.NDArray[np.float64] | None
    stress: npt.NDArray[np.float64] | None


class Engine(Protocol):
    """What computes: one process here, several ranks elsewhere. `prepare` may be called from any thread."""

    @property
    def card(self) -> BundleCard:
        """Of the bundle it computes with."""

    @property
    def dtype(self) -> str:
        """What the network computes in."""

    @property
    def tensor_parallel(self) -> int:
        """Over how many ranks the model is spread."""

    def prepare(self, system: System) -> Graph | Fault:
        """Checks one structure and finds its edges."""

    def compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        """Answers a batch, structure by structure; raises nothing that one structure alone caused."""


class LocalEngine:
    """A bundle loaded whole into this process."""

    tensor_parallel = 1

    def __init__(self, potential: Potential, card: BundleCard, *, dtype: str, limits: RequestLimits) -> None:
        self.card = card
        self.dtype = dtype
        self._potential = potential.eval().requires_grad_(False)
        # Geometry is never less than float32: in bfloat16 an atom would stand on a grid of 0.03 Å.
        self._batch_dtype = torch.promote_types(_DTYPES[dtype], torch.float32)
        self._device = next(potential.parameters()).device
        self._limits = limits

    @classmethod
    def load(cls, path: Path, *, dtype: str | None, device: str, limits: RequestLimits) -> LocalEngine:
        """Loads and verifies a bundle.

        Args:
            path: the bundle's directory.
            dtype: what to compute in; None is what the weights were stored in.
            device: as torch names it.
            limits: of one structure.

        Raises:
            BundleError: it is missing, damaged, or of a newer version.
            ServeError: the device cannot be used.
        """
        check_device(device)
        potential, card = load_potential(path, dtype=_DTYPES[dtype] if dtype else None, device=device)
        engine = cls(potential, card, dtype=dtype or card.dtype, limits=limits)
        engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Computes one atom pair, so that no caller waits for what torch does only once."""
        config = self.card.config
        pair = System(
            atomic_numbers=np.full(2, config.elements[0]),
            positions=np.array([[0.0, 0.0, 0.0], [config.cutoff / 2, 0.0, 0.0]]),
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, dtype=np.bool_),
            charge=config.charges[0],
            spin_multiplicity=config.spin_multiplicities[0],
        )
        self.compute([build_graph(pair, config.cutoff)], forces=True, stress=False)

    def prepare(self, system: System) -> Graph | Fault:
        """Checks one structure, refuses it if it is too large, and finds its edges."""
        try:
            if fault := self._too_many_atoms(system):
                return fault
            check_system(system)
            supported = check_supported(system, self.card.config)
            if fault := self._too_dense(system):
                return fault
            graph = build_graph(supported, self.card.config.cutoff)
            if graph.n_edges > self._limits.structure_edges:
                return self._too_many_edges(graph.n_edges, "")
            check_graph(graph)
        except StructureError as error:
            return Fault(error.reason, error.field, error.message, error.remedy)
        return graph

    def compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        """Answers a batch. If it fails whole, halves are tried, until the structure at fault stands alone."""
        try:
            return self._compute(graphs, forces=forces, stress=stress)
        except Exception as error:
            logger.warning("a batch of %d structures failed: %s", len(graphs), _first_line(error))
            if len(graphs) == 1:
                return [_internal(graphs[0], error)]
        # Out of the except block: the traceback would keep the failed batch's memory alive.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(graphs) // 2
        first = self.compute(graphs[:middle], forces=forces, stress=stress)
        return first + self.compute(graphs[middle:], forces=forces, stress=stress)

    def _compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        batch = collate(graphs, dtype=self._batch_dtype, device=self._device)
        with torch.no_grad():
            prediction = self._potential(batch, forces=forces, stress=stress)
        energy = prediction.energy.double().cpu().numpy()
        all_forces = prediction.forces.double().cpu().numpy() if forces else None
        all_stress = prediction.stress.double().cpu().numpy() if stress else None
        results: list[Result | Fault] = []
        start = 0
        for index, graph in enumerate(graphs):
            stop = start + graph.n_atoms
            result = Result(
                float(energy[index]),
                None if all_forces is None else all_forces[start:stop],
                None if all_stress is None else all_stress[index],
            )
            results.append(_not_finite(result, graph) or result)
            start = stop
        return results

    def _too_many_atoms(self, system: System) -> Fault | None:
        n_atoms, limit = len(system.atomic_numbers), self._limits.structure_atoms
        if n_atoms <= limit:
            return None
        return Fault(
            "too_large",
            "n_atoms",
            f"has {n_atoms} atoms, the limit is {limit}",
            "split it, or raise the server's --max-atoms",
        )

    def _too_dense(self, system: System) -> Fault | None:
        limit = self._limits.structure_edges
        cost = footprint(system, self.card.config.cutoff, enough=limit)
        if cost.edges > ESTIMATE_MARGIN * limit or cost.pairs > MOST_PAIRS:
            return self._too_many_edges(cost.edges, "about ")
        return None

    def _too_many_edges(self, n_edges: float, about: str) -> Fault:
        return Fault(
            "too_large",
            "positions",
            f"has {about}{n_edges:.3g} pairs of atoms within {self.card.config.cutoff:g} Å,"
            f" the limit is {self._limits.structure_edges}",
            "check cell and units (Å), send a smaller structure, or raise the server's --max-edges",
        )


def use_threads(count: int | None) -> None:
    """Lets torch compute with so many threads when called from this thread; None leaves its default."""
    if count is not None:
        torch.set_num_threads(count)


def check_device(device: str) -> None:
    """Puts one number on the device.

    Raises:
        ServeError: torch does not know it or cannot use it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ServeError(f"device {device!r} cannot be used: {_first_line(error)}") from error


def _not_finite(result: Result, graph: Graph) -> Fault | None:
    if not math.isfinite(result.energy):
        what = "energy"
    elif result.forces is not None and not np.isfinite(result.forces).all():
        what = "forces"
    elif result.stress is not None and graph.system.pbc.all() and not np.isfinite(result.stress).all():
        what = "stress"
    else:
        return None
    return Fault(
        "not_finite",
        "",
        f"the model's {what} is not a finite number",
        "the structure is far from what the model was trained on: check its geometry",
    )


def _internal(graph: Graph, error: Exception) -> Fault:
    return Fault(
        "internal",
        "",
        f"the server failed on this structure of {graph.n_atoms} atoms and {graph.n_edges} edges:"
        f" {type(error).__name__}",
        "the server's log has the reason; if it was out of memory, send a smaller structure",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
