"""One model that is served: an engine, its name and version, who uses it now. Knows nothing of the queue."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from equipot.serve.capacity import Capacity, measure
from equipot.serve.card import ModelCard, listed
from equipot.serve.config import RequestLimits, ServeConfig
from equipot.serve.engine import Engine, LocalEngine
from equipot.serve.errors import InvalidRequest, NotReady, NotServed
from equipot.serve.foreign.engine import ForeignEngine
from equipot.serve.foreign.spec import CalculatorSpec
from equipot.serve.memory import give_back
from equipot.wire.v1 import potential_pb2 as pb

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, weakref_slot=True)
class ServedModel:
    """One version of a model in memory.

    Attributes:
        engine: computes.
        name: what callers ask for.
        capacity: what its batches may hold, cost and take.
        version: in the repository it came from; empty if from none.
        users: requests that are under way with it.
        used: when it was loaded or a request with it ended, by `time.monotonic`.
        when_idle: called once after it is retired and its last request is done.
    """

    engine: Engine
    name: str
    capacity: Capacity
    version: str = ""
    users: int = field(default=0, init=False)
    used: float = field(default_factory=time.monotonic, init=False)
    when_idle: Callable[[], None] | None = field(default=None, init=False)

    @property
    def card(self) -> ModelCard:
        """What is known of it."""
        return self.engine.card

    @property
    def full_name(self) -> str:
        """Its name with its version, if it has one."""
        return f"{self.name}@{self.version}" if self.version else self.name

    @property
    def ready(self) -> bool:
        """Whether its engine can compute now."""
        try:
            self.engine.check_ready()
        except NotReady:
            return False
        return True

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps it in memory meanwhile, whatever the repository says."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.used = time.monotonic()
            self._tell_idle()

    def retire(self, when_idle: Callable[[], None]) -> None:
        """Calls back once no request uses it, which may be at once."""
        self.when_idle = when_idle
        self._tell_idle()

    def _tell_idle(self) -> None:
        if not self.users and self.when_idle is not None:
            told, self.when_idle = self.when_idle, None
            told()

    def level_index(self, level_of_theory: str) -> int:
        """The index of a level of theory; empty asks for the only one.

        Raises:
            InvalidRequest: none is named and there are several.
            NotServed: the model does not know it.
        """
        levels = self.card.levels_of_theory
        if not level_of_theory:
            if len(levels) == 1:
                return 0
            raise InvalidRequest(
                f"{self.name} knows several levels of theory: name one of {listed(levels)}",
                field="level_of_theory",
            )
        if level_of_theory not in levels:
            raise NotServed(
                f"{self.name} does not know the level of theory {level_of_theory[:100]!r};"
                f" it knows {listed(levels)}",
                field="level_of_theory",
            )
        return levels.index(level_of_theory)

    def reference(self, level: int) -> pb.ModelReference:
        """What a reply says of the model that computed it."""
        return pb.ModelReference(
            name=self.name,
            digest=self.card.digest,
            level_of_theory=self.card.levels_of_theory[level],
            dtype=self.engine.dtype,
            tensor_parallel=self.engine.tensor_parallel,
            batch_invariant=self.engine.batch_invariant,
            version=self.version,
        )


def describe(card: ModelCard, limits: RequestLimits) -> pb.Model:
    """What a card says, on the wire."""
    return pb.Model(
        name=card.name,
        digest=card.digest,
        levels_of_theory=card.levels_of_theory,
        elements=card.elements,
        charges=card.charges,
        spin_multiplicities=card.spin_multiplicities,
        cutoff=card.cutoff,
        force_mode=card.force_mode,
        has_stress=card.has_stress,
        dtype=card.dtype,
        n_parameters=card.n_parameters,
        limits=pb.Limits(
            max_atoms_per_structure=limits.structure_atoms,
            max_structures_per_request=limits.request_structures,
            max_atoms_per_request=limits.request_atoms,
            max_message_bytes=limits.message_bytes,
        ),
        card_json=card.text,
        members=card.members,
        is_calibrated=card.is_calibrated,
        has_domain=card.has_domain,
    )


def load_bundle(path: Path, config: ServeConfig, *, name: str = "", version: str = "") -> ServedModel:
    """Loads a bundle and computes with it once.

    Args:
        path: its folder.
        config: how to load it.
        name: what callers ask for; empty is the bundle's own name.
        version: in the repository it comes from.

    Raises:
        BundleError: it is missing, damaged, or of a newer version.
        ServeError: the device cannot be used, or the model not be spread as asked.
    """
    started = time.perf_counter()
    engine = LocalEngine.load(
        path,
        dtype=config.dtype,
        device=config.device,
        limits=config.limits,
        threads=config.threads,
        deterministic=config.deterministic,
        tensor_parallel=config.tensor_parallel,
        workers=config.workers,
    )
    capacity = measure(engine, config.budget, calibrate=config.calibrate, device=config.device)
    model = ServedModel(engine, name or engine.card.name, capacity, version)
    # What was only on the way: the weights as they were read, and the batches of the measurement.
    give_back()
    tell_loaded(model, str(path), time.perf_counter() - started)
    return model


def load_calculator(spec: CalculatorSpec, config: ServeConfig) -> ServedModel:
    """Starts somebody else's potential.

    Raises:
        ServeError: it cannot be made.
    """
    started = time.perf_counter()
    engine = ForeignEngine(spec, device=config.device, limits=config.limits, threads=config.threads)
    capacity = measure(engine, config.budget, calibrate=config.calibrate, device=config.device)
    model = ServedModel(engine, spec.shown_name, capacity)
    tell_loaded(model, spec.calculator, time.perf_counter() - started)
    return model


def tell_loaded(model: ServedModel, where: str, seconds: float) -> None:
    """One line of the log for a model that can answer."""
    card, engine = model.card, model.engine
    logger.info(
        "loaded %s from %s: %s, %d parameters, %s (%s), %.1f s",
        model.full_name,
        where,
        card.digest,
        card.n_parameters,
        engine.dtype,
        engine.way,
        seconds,
    )
