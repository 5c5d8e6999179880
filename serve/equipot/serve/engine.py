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

from equipot.model.batch import Graph, System, build_graphs, collate
from equipot.model.bundle import BundleCard, load_potential, load_uncertainty, read_card
from equipot.model.card import CARD_FILE
from equipot.model.ensemble import Ensemble
from equipot.model.errors import ModelError
from equipot.model.inference import FrozenPotential
from equipot.model.sharding import check_divisible
from equipot.model.skin import SkinnedNeighbors
from equipot.model.uncertainty import Uncertainty
from equipot.model.validate import check_supported
from equipot.serve.card import ModelCard
from equipot.serve.config import RequestLimits, Workers
from equipot.serve.errors import CallError, Fault, RanksExhausted, ServeError
from equipot.serve.memory import is_out_of_memory
from equipot.serve.preparation import Preparation
from equipot.serve.ranks import Ranks

WORK_PER_THREAD = 400e6
"""Floating-point operations that pay for waking one more thread: some 4 ms of one core's work."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One structure's answer.

    Attributes:
        energy: in eV.
        forces: (n_atoms, 3) in eV/Å, None if not asked for.
        stress: (3, 3) in eV/Å³, None if not asked for; NaN if not periodic in all three directions.
        energy_spread: in eV; None of a model that is no ensemble.
        forces_spread: (n_atoms,) in eV/Å; None of a model that is no ensemble, or without forces.
    """

    energy: float
    forces: npt.NDArray[np.float64] | None
    stress: npt.NDArray[np.float64] | None
    energy_spread: float | None = None
    forces_spread: npt.NDArray[np.float64] | None = None


class Engine(Protocol):
    """What computes: one process here, several ranks elsewhere. `prepare` may be called from any thread."""

    @property
    def card(self) -> ModelCard:
        """Of the model it computes with."""

    @property
    def dtype(self) -> str:
        """What the network computes in."""

    @property
    def way(self) -> str:
        """How it computes, for people: "compiled on cpu", "tensor-parallel over 2 ranks on cuda"."""

    @property
    def at_once(self) -> bool:
        """Whether a short batch may be computed in the event loop: nothing in it can hang."""

    @property
    def measurable(self) -> bool:
        """Whether made-up structures tell how long real ones take it, and soon."""

    @property
    def tensor_parallel(self) -> int:
        """Over how many ranks the model is spread."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a structure gets the same bits whatever shares its batch."""

    @property
    def uncertainty(self) -> Uncertainty:
        """What is known of how sure its answers are."""

    @property
    def exhausted(self) -> tuple[int, int] | None:
        """Atoms and edges of the smallest batch that ran out of memory; of one structure only over ranks."""

    def prepare(
        self, systems: Sequence[System], *, neighbors: Sequence[SkinnedNeighbors] | None = None
    ) -> list[Graph | Fault]:
        """Checks structures and finds their edges in one call.

        Args:
            systems: the structures.
            neighbors: the list of each, which the caller keeps between calls as it moves. What was checked
                once is not checked again before its list must be built anew.
        """

    def compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        """Answers a batch, structure by structure; raises nothing that one structure alone caused.

        Raises:
            NotReady: a rank died; the batch may be sent again.
        """

    def check_ready(self) -> None:
        """Raises NotReady, with the time after which to ask again, if it cannot compute now."""

    def close(self) -> None:
        """Lets go of the processes it has, if any."""


class LocalEngine:
    """A bundle whose requests are prepared in this process, and computed here or by ranks of its own."""

    def __init__(
        self,
        potential: Ensemble | Ranks,
        card: BundleCard,
        *,
        uncertainty: Uncertainty | None = None,
        dtype: str,
        device: str,
        limits: RequestLimits,
        threads: int | None = None,
        deterministic: bool = False,
        text: str = "",
        place: str | None = None,
    ) -> None:
        self.card = ModelCard.of_bundle(card, text)
        self._place = place or device
        self.dtype = dtype
        self.at_once = not isinstance(potential, Ranks)
        self.measurable = True
        self.uncertainty = uncertainty or Uncertainty()
        self._config = card.config
        self._potential = potential
        self._deterministic = deterministic
        # Geometry is never less than float32: in bfloat16 an atom would stand on a grid of 0.03 Å. Compiled
        # code reads it in float64, whatever the network computes in.
        exact = self._potential.way == "compiled"
        self._batch_dtype = torch.float64 if exact else torch.promote_types(_DTYPES[dtype], torch.float32)
        self._device = torch.device(device)
        self._prepare = Preparation(
            cutoff=card.config.cutoff,
            limits=limits,
            supported=lambda system: check_supported(system, card.config),
        )
        self._threads = threads
        self._most_threads = threads or torch.get_num_threads()
        self.exhausted: tuple[int, int] | None = None
        self._fatal = math.inf

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str | None,
        device: str,
        limits: RequestLimits,
        threads: int | None = None,
        deterministic: bool = False,
        tensor_parallel: int = 1,
        workers: Workers | None = None,
    ) -> LocalEngine:
        """Loads and verifies a bundle.

        Args:
            path: the bundle's directory.
            dtype: what to compute in; None is what the weights were stored in.
            device: as torch names it.
            limits: of one structure.
            threads: that compute; None lets each batch have as many as its work keeps busy, torch's number
                at most.
            deterministic: whether a structure must get the same bits in any batch, at whatever cost.
            tensor_parallel: over how many processes to spread the weights; they share the threads.
            workers: other machines that take their share of these processes.

        Raises:
            BundleError: it is missing, damaged, or of a newer version.
            ServeError: the device cannot be used, or the model not be spread so.
        """
        check_device(device)
        potential: Ensemble | Ranks
        card = read_card(path)
        if tensor_parallel > 1:
            if card.members > 1:
                raise ServeError(
                    f"{path}: --tensor-parallel {tensor_parallel}: it is an ensemble of {card.members}, and "
                    "ensembles are not spread over ranks; leave --tensor-parallel out"
                )
            try:
                check_divisible(card.config, tensor_parallel)
            except ModelError as error:
                raise ServeError(f"{path}: --tensor-parallel {tensor_parallel}: {error}") from None
            here = tensor_parallel // (workers.hosts + 1 if workers else 1)
            each = max(1, (threads or torch.get_num_threads()) // here)
            potential = Ranks(
                path,
                digest=card.digest,
                size=tensor_parallel,
                dtype=dtype,
                device=device,
                threads=each,
                workers=workers,
            )
        else:
            members = (
                # One after the other: each packs its weights before the next is read.
                load_potential(
                    path, dtype=_DTYPES[dtype] if dtype else None, device=device, verify=k == 0, member=k
                )[0]
                for k in range(card.members)
            )
            potential = Ensemble([FrozenPotential(one) for one in members])
        engine = cls(
            potential,
            card,
            uncertainty=load_uncertainty(path, card),
            dtype=dtype or card.dtype,
            # Ranks take their batches from this process's memory.
            device=device if tensor_parallel == 1 else "cpu",
            limits=limits,
            threads=threads,
            deterministic=deterministic,
            text=(path / CARD_FILE).read_text(encoding="utf-8"),
            place=device,
        )
        engine.warm_up()
        return engine

    @property
    def way(self) -> str:
        """How it computes, see `FrozenPotential` and `Ranks`, and on what."""
        ranks = f" over {self.tensor_parallel} ranks" if self.tensor_parallel > 1 else ""
        return f"{self._potential.way}{ranks} on {self._place}"

    @property
    def tensor_parallel(self) -> int:
        """Over how many ranks the model is spread."""
        return self._potential.size if isinstance(self._potential, Ranks) else 1

    def check_ready(self) -> None:
        """Raises NotReady while ranks are being started again."""
        if isinstance(self._potential, Ranks):
            self._potential.check_ready()

    def close(self) -> None:
        """Ends the ranks, if there are any."""
        if isinstance(self._potential, Ranks):
            self._potential.close()

    @property
    def batch_invariant(self) -> bool:
        """Whether a structure gets the same bits whatever shares its batch."""
        return self._deterministic or self._potential.batch_invariant

    def threads_for(self, n_atoms: int, n_edges: int) -> int:
        """How many threads a batch of this size gets."""
        if self._threads is not None or (self._deterministic and not self._potential.batch_invariant):
            # One number for all: where products are a library's, bits change with it.
            return self._most_threads
        config = self._config
        products = self.uncertainty.members * config.layers * (4 * n_edges + 20 * n_atoms)
        return min(self._most_threads, 1 + int(products * config.width**2 / WORK_PER_THREAD))

    def warm_up(self) -> None:
        """Computes one atom pair, so that no caller waits for what torch does only once."""
        config = self._config
        pair = System(
            atomic_numbers=np.full(2, config.elements[0]),
            positions=np.array([[0.0, 0.0, 0.0], [config.cutoff / 2, 0.0, 0.0]]),
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, dtype=np.bool_),
            charge=config.charges[0],
            spin_multiplicity=config.spin_multiplicities[0],
        )
        self.compute(build_graphs([pair], config.cutoff), forces=True, stress=False)

    def prepare(
        self, systems: Sequence[System], *, neighbors: Sequence[SkinnedNeighbors] | None = None
    ) -> list[Graph | Fault]:
        """Checks structures, refuses those that are too large, and finds the edges of the others at once."""
        return self._prepare(systems, neighbors)

    def compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        """Answers a batch. If it fails whole, halves are tried, until the structure at fault stands alone.

        Ranks that run out of memory are gone, and no half is tried: the batch's size is remembered, and one
        structure's, so that none like it ends them again.
        """
        if any(_cost(graph) >= self._fatal for graph in graphs):
            left = [graph for graph in graphs if _cost(graph) < self._fatal]
            answers = iter(self.compute(left, forces=forces, stress=stress) if left else ())
            return [_too_large(one) if _cost(one) >= self._fatal else next(answers) for one in graphs]
        try:
            return self._compute(graphs, forces=forces, stress=stress)
        except RanksExhausted:
            self._note_exhausted(graphs)
            if len(graphs) > 1:
                raise
            self._fatal = min(self._fatal, _cost(graphs[0]))
            return [_too_large(graphs[0])]
        except CallError:
            # No structure's fault, and no half of the batch would fare better.
            raise
        except Exception as error:
            logger.warning("a batch of %d structures failed: %s", len(graphs), _first_line(error))
            if len(graphs) == 1:
                return [_internal(graphs[0], error)]
            if is_out_of_memory(error):
                self._note_exhausted(graphs)
        # Out of the except block: the traceback would keep the failed batch's memory alive.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(graphs) // 2
        first = self.compute(graphs[:middle], forces=forces, stress=stress)
        return first + self.compute(graphs[middle:], forces=forces, stress=stress)

    def _note_exhausted(self, graphs: Sequence[Graph]) -> None:
        size = sum(graph.n_atoms for graph in graphs), sum(graph.n_edges for graph in graphs)
        self.exhausted = min(self.exhausted or size, size, key=sum)

    def _compute(self, graphs: Sequence[Graph], *, forces: bool, stress: bool) -> list[Result | Fault]:
        batch = collate(graphs, dtype=self._batch_dtype, device=self._device)
        threads = self.threads_for(batch.n_atoms, batch.n_edges)
        if self._potential.way in ("analytic", "autograd") and threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        prediction, spread = self._potential(
            batch, forces=forces, stress=stress, deterministic=self._deterministic, threads=threads
        )
        energy = prediction.energy.double().cpu().numpy()
        all_forces = _numbers(prediction.forces)
        all_stress = _numbers(prediction.stress)
        spreads = None if spread is None else spread.energy.double().cpu().numpy()
        forces_spread = None if spread is None else _numbers(spread.forces)
        results: list[Result | Fault] = []
        start = 0
        for index, graph in enumerate(graphs):
            stop = start + graph.n_atoms
            result = Result(
                float(energy[index]),
                None if all_forces is None else all_forces[start:stop],
                None if all_stress is None else all_stress[index],
                None if spreads is None else float(spreads[index]),
                None if forces_spread is None else forces_spread[start:stop],
            )
            results.append(not_finite(result, graph) or result)
            start = stop
        return results


def use_threads(count: int | None) -> None:
    """Lets torch compute with so many threads when called from this thread; None leaves its default."""
    if count is not None:
        torch.set_num_threads(count)


def check_device(device: str) -> None:
    """Puts one number on the device and reads it back: "meta" takes any and holds none.

    Raises:
        ServeError: torch does not know it or cannot use it.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ServeError(f"device {device!r} cannot be used: {_first_line(error)}") from error


def _numbers(tensor: torch.Tensor | None) -> npt.NDArray[np.float64] | None:
    return None if tensor is None else tensor.double().cpu().numpy()


def not_finite(result: Result, graph: Graph) -> Fault | None:
    """The fault of an answer that is not a number, None if all of it is."""
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


def _cost(graph: Graph) -> int:
    return graph.n_atoms + graph.n_edges


def _too_large(graph: Graph) -> Fault:
    return Fault(
        "too_large",
        "structures.n_atoms",
        f"{graph.n_atoms} atoms with {graph.n_edges} edges take more memory than the model's ranks have",
        "send a smaller structure, or ask the operator for more ranks",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
