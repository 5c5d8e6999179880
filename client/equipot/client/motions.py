"""What the blocking client has a server move: relaxations and dynamics."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, Unpack

import grpc

from equipot.client.batches import Part, cut
from equipot.client.certainty import Uncertainty
from equipot.client.credentials import TokenSource
from equipot.client.dynamics import (
    Resumed,
    SimulateSettings,
    SimulateWords,
    Told,
    Trajectory,
    Warned,
    simulations,
)
from equipot.client.errands import Way, run
from equipot.client.errors import ClientError
from equipot.client.relax import Progressed, Relaxed, RelaxSettings, RelaxWords, relaxations
from equipot.client.results import Limits, ModelInfo
from equipot.client.settings import Asked, Settings
from equipot.client.starts import PLAIN_SHARE, RESUMED_SHARE, SIMULATION_SHARE
from equipot.client.structures import StructuresLike, each_structure
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub


def parts_of(
    items: Sequence[object], limits: Limits, settings: Settings, *, share: float
) -> Generator[Part, None, None]:
    """The items in requests as large as the server takes: those of one request advance together."""
    yield from cut(
        items,
        limits,
        atoms_per_request=limits.max_atoms_per_request or settings.atoms_per_request,
        max_message_bytes=int(limits.message_bytes(settings.max_message_bytes) / share),
    )


def warn(message: str) -> None:
    """As Python warns."""
    warnings.warn(message, stacklevel=2)


class Motions(ABC):
    """The methods of a client by which a server moves structures."""

    _settings: Settings
    _token: TokenSource

    def relax(
        self,
        structures: StructuresLike,
        *,
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        **how: Unpack[RelaxWords],
    ) -> list[Relaxed]:
        """Moves each structure to where its forces vanish, on the server; results in the order given.

        A structure that cannot go on has its failure, the others go on. After a lost connection those without
        a result go on from where they were, by the same bundle.

        Args:
            structures: as of `predict`; atoms that an `ase.constraints.FixAtoms` holds stay where they are.
            level_of_theory: one of the model's; empty: its only one.
            model: another than the client's.
            uncertainty: whether it is to be said how sure the answer is where each came to rest.
            how: fmax, steps, optimizer, cell, pressure, max_step; see `RelaxWords`.

        Raises:
            InvalidRequest: a setting out of its range, or a constraint that is not FixAtoms.
            ModelChanged: the server changed its model on the way.
            ClientError: the request as a whole failed, see the subclasses.
        """
        results = self.relax_iter(
            structures, level_of_theory=level_of_theory, model=model, uncertainty=uncertainty, **how
        )
        found = dict(results)
        return [found[index] for index in range(len(found))]

    def relax_iter(
        self,
        structures: StructuresLike,
        *,
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        on_progress: Progressed | None = None,
        **how: Unpack[RelaxWords],
    ) -> Generator[tuple[int, Relaxed], None, None]:
        """As `relax`: index and result of each structure, in the order in which they are done.

        Args:
            structures: see `relax`, as for the others.
            level_of_theory: see `relax`.
            model: see `relax`.
            uncertainty: see `relax`.
            on_progress: told index, step, energy in eV and largest force in eV/Å after every step.
            how: see `relax`.
        """
        how_to = RelaxSettings(**how)
        stress = how_to.cell != "fixed"
        wish = self._settings.wish(
            Asked(model=model, level_of_theory=level_of_theory, stress=stress, uncertainty=uncertainty)
        )
        items = list(each_structure(structures))
        limits = self.model(wish.model).limits
        way = Way(self._relax, self._understand, self._settings.retry)
        for errand in relaxations(
            items,
            parts_of(items, limits, self._settings, share=PLAIN_SHARE),
            wish,
            how_to,
            told=on_progress,
            most_bytes=limits.message_bytes(self._settings.max_message_bytes),
        ):
            yield from run(errand, way)

    def simulate(
        self,
        structures: StructuresLike,
        *,
        steps: int,
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        resume: Sequence[Resumed | None] | None = None,
        on_warning: Warned = warn,
        **how: Unpack[SimulateWords],
    ) -> list[Trajectory]:
        """Moves each structure in time, on the server; trajectories in the order given.

        A structure that cannot go on has its failure and the frames so far, the others go on. After a lost
        connection all go on from their last states, by the same bundle: the frames are those of a run that
        was never interrupted, to the last bit where the model's answers are.

        Args:
            structures: as of `predict`; atoms that an `ase.constraints.FixAtoms` holds stay where they are.
                Momenta and masses of `ase.Atoms` count; where there are no momenta, velocities are drawn.
            steps: in all, those before a state that is resumed included.
            level_of_theory: one of the model's; empty: its only one.
            model: another than the client's.
            uncertainty: whether frames are to say how sure the potential is there.
            resume: for each structure, where it goes on; None: all begin.
            on_warning: told what looks wrong and is done all the same.
            how: integrator, timestep (fs), temperature (K), final_temperature, friction (1/fs),
                thermostat_time (fs), pressure (eV/Å³), barostat_time (fs), seed, frame_every, forces, stress,
                observe_every, token_every; see `SimulateSettings`.

        Raises:
            InvalidRequest: a setting out of its range, or a constraint that is not FixAtoms.
            ModelChanged: the server changed its model on the way.
            ClientError: the request as a whole failed, see the subclasses.
        """
        items: list[Any] = list(each_structure(structures))
        found = [Trajectory() for _ in items]
        for index, told in self.simulate_iter(
            items,
            steps=steps,
            level_of_theory=level_of_theory,
            model=model,
            uncertainty=uncertainty,
            resume=resume,
            on_warning=on_warning,
            **how,
        ):
            found[index].add(told)
        return found

    def simulate_iter(
        self,
        structures: StructuresLike,
        *,
        steps: int,
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        resume: Sequence[Resumed | None] | None = None,
        on_warning: Warned = warn,
        **how: Unpack[SimulateWords],
    ) -> Generator[tuple[int, Told], None, None]:
        """As `simulate`: index of a structure and what comes of it, as it comes; memory stays bounded.

        Frames and observations of one structure come in the order of its steps, each once, and `Ended` last.
        """
        how_to = SimulateSettings(steps=steps, **how)
        wish = self._settings.wish(
            Asked(
                model=model,
                level_of_theory=level_of_theory,
                stress=how_to.stress,
                uncertainty=uncertainty,
            )
        )
        items = list(each_structure(structures))
        limits = self.model(wish.model).limits
        way = Way(self._simulate, self._understand, self._settings.retry)
        for errand in simulations(
            items,
            parts_of(items, limits, self._settings, share=RESUMED_SHARE if resume else SIMULATION_SHARE),
            wish,
            how_to,
            resume=resume,
            warned=on_warning,
            most_bytes=limits.message_bytes(self._settings.max_message_bytes),
        ):
            yield from run(errand, way)

    @abstractmethod
    def model(self, name: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """One model with its card."""

    @abstractmethod
    def _connected(self) -> PotentialServiceStub: ...

    @abstractmethod
    def _understand(self, error: grpc.RpcError) -> ClientError: ...

    def _relax(self, request: pb.RelaxRequest) -> Generator[pb.RelaxReply, None, None]:
        return _replies(self._connected().Relax(request, metadata=self._token.headers()))

    def _simulate(self, request: pb.SimulateRequest) -> Generator[pb.SimulateReply, None, None]:
        return _replies(self._connected().Simulate(request, metadata=self._token.headers()))


def _replies(call: Any) -> Generator[Any, None, None]:  # noqa: ANN401  # gRPC's streams have no types
    try:
        yield from call
    finally:
        call.cancel()
