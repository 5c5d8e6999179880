"""What the client for asyncio has a server move: as `motions`, with the same results and errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import grpc

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
from equipot.client.errands import AsyncWay, run_async
from equipot.client.errors import ClientError
from equipot.client.motions import parts_of, warn
from equipot.client.relax import Progressed, Relaxed, RelaxSettings, RelaxWords, relaxations
from equipot.client.results import ModelInfo
from equipot.client.settings import Asked, Settings
from equipot.client.starts import PLAIN_SHARE, RESUMED_SHARE, SIMULATION_SHARE
from equipot.client.structures import StructuresLike, each_structure
from equipot.wire.v1 import potential_pb2 as pb

if TYPE_CHECKING:
    from equipot.wire.v1.potential_pb2_grpc import PotentialServiceAsyncStub


class AsyncMotions(ABC):
    """The methods of a client by which a server moves structures."""

    _settings: Settings
    _token: TokenSource

    async def relax(
        self,
        structures: StructuresLike,
        *,
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        **how: Unpack[RelaxWords],
    ) -> list[Relaxed]:
        """As `Client.relax`."""
        relaxing = self.relax_iter(
            structures, level_of_theory=level_of_theory, model=model, uncertainty=uncertainty, **how
        )
        found = {index: relaxed async for index, relaxed in relaxing}
        return [found[index] for index in range(len(found))]

    async def relax_iter(
        self,
        structures: StructuresLike,
        *,
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        on_progress: Progressed | None = None,
        **how: Unpack[RelaxWords],
    ) -> AsyncGenerator[tuple[int, Relaxed], None]:
        """As `Client.relax_iter`."""
        how_to = RelaxSettings(**how)
        stress = how_to.cell != "fixed"
        wish = self._settings.wish(
            Asked(model=model, level_of_theory=level_of_theory, stress=stress, uncertainty=uncertainty)
        )
        items = list(each_structure(structures))
        limits = (await self.model(wish.model)).limits
        way = AsyncWay(self._relax, self._understand, self._settings.retry)
        for errand in relaxations(
            items,
            parts_of(items, limits, self._settings, share=PLAIN_SHARE),
            wish,
            how_to,
            told=on_progress,
            most_bytes=limits.message_bytes(self._settings.max_message_bytes),
        ):
            async for outcome in run_async(errand, way):
                yield outcome

    async def simulate(
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
        """As `Client.simulate`."""
        items: list[Any] = list(each_structure(structures))
        found = [Trajectory() for _ in items]
        async for index, told in self.simulate_iter(
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

    async def simulate_iter(
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
    ) -> AsyncGenerator[tuple[int, Told], None]:
        """As `Client.simulate_iter`."""
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
        limits = (await self.model(wish.model)).limits
        way = AsyncWay(self._simulate, self._understand, self._settings.retry)
        for errand in simulations(
            items,
            parts_of(items, limits, self._settings, share=RESUMED_SHARE if resume else SIMULATION_SHARE),
            wish,
            how_to,
            resume=resume,
            warned=on_warning,
            most_bytes=limits.message_bytes(self._settings.max_message_bytes),
        ):
            async for outcome in run_async(errand, way):
                yield outcome

    @abstractmethod
    async def model(self, name: str | None = None, *, timeout: float | None = None) -> ModelInfo:
        """One model with its card."""

    @abstractmethod
    def _connected(self) -> PotentialServiceAsyncStub: ...

    @abstractmethod
    async def _understand(self, error: grpc.RpcError) -> ClientError: ...

    def _relax(self, request: pb.RelaxRequest) -> AsyncGenerator[pb.RelaxReply, None]:
        return _replies(self._connected().Relax(request, metadata=self._token.headers()))

    def _simulate(self, request: pb.SimulateRequest) -> AsyncGenerator[pb.SimulateReply, None]:
        return _replies(self._connected().Simulate(request, metadata=self._token.headers()))


async def _replies(call: Any) -> AsyncGenerator[Any, None]:  # noqa: ANN401  # gRPC's streams have no types
    try:
        async for reply in call:
            yield reply
    finally:
        call.cancel()
