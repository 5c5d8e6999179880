"""The models of one server, by name and digest. Knows nothing of the queue."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipot.model.bundle import BundleCard, read_card
from equipot.serve.config import RequestLimits, ServeConfig
from equipot.serve.engine import Engine, LocalEngine
from equipot.serve.errors import InvalidRequest, NotReady, NotServed, ServeError
from equipot.wire.v1 import potential_pb2 as pb

SHORTEST_DIGEST = 8
"""Hexadecimal digits of a digest that a caller must give at least."""

_DIGEST = re.compile(rf"sha256:[0-9a-f]{{{SHORTEST_DIGEST},64}}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """One bundle and the engine that computes with it.

    Attributes:
        engine: computes.
        card_json: the bundle's whole model.json.
    """

    engine: Engine
    card_json: str

    @property
    def card(self) -> BundleCard:
        """The bundle's card."""
        return self.engine.card

    @property
    def name(self) -> str:
        """What callers ask for."""
        return self.card.name

    @property
    def ready(self) -> bool:
        """Whether its engine can compute now."""
        try:
            self.engine.check_ready()
        except NotReady:
            return False
        return True

    @property
    def has_stress(self) -> bool:
        """Stress is a derivative of the energy: a direct head has none."""
        return self.card.config.forces == "conservative"

    def level_index(self, level_of_theory: str) -> int:
        """The index of a level of theory; empty asks for the only one.

        Raises:
            InvalidRequest: none is named and there are several.
            NotServed: the model does not know it.
        """
        levels = self.card.config.levels_of_theory
        if not level_of_theory:
            if len(levels) == 1:
                return 0
            raise InvalidRequest(
                f"{self.name} knows several levels of theory: name one of {_listed(levels)}",
                field="level_of_theory",
            )
        if level_of_theory not in levels:
            raise NotServed(
                f"{self.name} does not know the level of theory {level_of_theory[:100]!r};"
                f" it knows {_listed(levels)}",
                field="level_of_theory",
            )
        return levels.index(level_of_theory)

    def reference(self, level: int) -> pb.ModelReference:
        """What a reply says of the model that computed it."""
        return pb.ModelReference(
            name=self.name,
            digest=self.card.digest,
            level_of_theory=self.card.config.levels_of_theory[level],
            dtype=self.engine.dtype,
            tensor_parallel=self.engine.tensor_parallel,
            batch_invariant=self.engine.batch_invariant,
        )

    def describe(self, limits: RequestLimits, *, is_default: bool) -> pb.Model:
        """The model's whole description on the wire."""
        config = self.card.config
        return pb.Model(
            name=self.name,
            digest=self.card.digest,
            levels_of_theory=config.levels_of_theory,
            elements=config.elements,
            charges=config.charges,
            spin_multiplicities=config.spin_multiplicities,
            cutoff=config.cutoff,
            force_mode=config.forces,
            has_stress=self.has_stress,
            dtype=self.engine.dtype,
            n_parameters=self.card.n_parameters,
            is_default=is_default,
            limits=pb.Limits(
                max_atoms_per_structure=limits.structure_atoms,
                max_structures_per_request=limits.request_structures,
                max_atoms_per_request=limits.request_atoms,
                max_message_bytes=limits.message_bytes,
            ),
            card_json=self.card_json,
        )


class Registry:
    """What a server serves; the first model is the default.

    Raises:
        ServeError: two models have the same name.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        check_names([model.name for model in models])
        self._models = {model.name: model for model in models}
        self.default = models[0]

    @classmethod
    def load(cls, config: ServeConfig) -> Registry:
        """Loads every bundle; cards first, so that a wrong name costs no time.

        Raises:
            BundleError: a bundle is missing, damaged, or of a newer version.
            ServeError: two bundles have the same name, or the device cannot be used.
        """
        check_names([read_card(path).name for path in config.bundles])
        return cls([_load(path, config) for path in config.bundles])

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def find(self, wanted: str) -> ServedModel:
        """The model that a caller names: "", "name" or "name@sha256:…", whose digest may be cut short.

        Raises:
            NotServed: nothing of that name or digest is served.
            InvalidRequest: what follows the @ is no digest.
        """
        if not wanted:
            return self.default
        name, at, digest = wanted.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise InvalidRequest(
                f"{digest[:100]!r} is no digest: write name@sha256: and at least {SHORTEST_DIGEST} digits",
                field="model",
            )
        model = self._models.get(name)
        if model is None or not model.card.digest.startswith(digest):
            served = ", ".join(f"{model.name}@{model.card.digest}" for model in self)
            raise NotServed(
                f"no model {wanted[:200]!r} is served here; served are {served}",
                field="model",
                facts={"served": served},
            )
        return model


def check_names(names: Sequence[str]) -> None:
    """Refuses two models of one name: a caller could not tell them apart.

    Raises:
        ServeError: a name comes twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise ServeError(
                f"two bundles are called {name!r}: export one of them under another --name, or serve one"
            )


def _load(path: Path, config: ServeConfig) -> ServedModel:
    started = time.perf_counter()
    engine = LocalEngine.load(
        path,
        dtype=config.dtype,
        device=config.device,
        limits=config.limits,
        threads=config.threads,
        deterministic=config.deterministic,
        tensor_parallel=config.tensor_parallel,
    )
    card = engine.card
    logger.info(
        "loaded %s from %s: %s, %d parameters, %s on %s (%s), %.1f s",
        card.name,
        path,
        card.digest,
        card.n_parameters,
        engine.dtype,
        config.device,
        engine.way,
        time.perf_counter() - started,
    )
    return ServedModel(engine, (path / "model.json").read_text(encoding="utf-8"))


def _listed(levels: Sequence[str]) -> str:
    return ", ".join(repr(level) for level in levels)
