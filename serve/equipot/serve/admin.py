"""`AdminService`: what an operator does to the models of a running server. Loads nothing itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from equipot.serve.call import current_call
from equipot.serve.config import RequestLimits
from equipot.serve.errors import (
    RETRY_STARTING,
    Forbidden,
    InvalidRequest,
    NotPossible,
    NotReady,
    NotServed,
    ServeError,
)
from equipot.serve.registry import Registry, Slot
from equipot.serve.repository.keeper import Keeper, UnknownModelError
from equipot.serve.repository.labels import LabelError, check
from equipot.serve.status import Context, guarded
from equipot.wire.v1 import admin_pb2 as pb
from equipot.wire.v1 import potential_pb2

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name

ANYONE = "*"
"""In place of identities: whoever reaches the port."""

RequestT = TypeVar("RequestT", bound=Message)


class AdminServicer:
    """The methods of `AdminService`; they raise `CallError`, which `guarded` turns into statuses."""

    def __init__(self, admins: Sequence[str], limits: RequestLimits) -> None:
        """For callers with these identities, or `ANYONE`; `limits` are part of a model's description."""
        self._admins = frozenset(admins)
        self._limits = limits
        self._keeper: Keeper | None = None

    def open(self, keeper: Keeper) -> None:
        """From now on calls are answered."""
        self._keeper = keeper

    def close(self) -> None:
        """From now on calls are refused: the server drains."""
        self._keeper = None

    async def GetRepository(self, request: pb.GetRepositoryRequest, context: Context) -> pb.Repository:
        """What there is."""
        return self._repository(self._open())

    async def RefreshRepository(
        self, request: pb.RefreshRepositoryRequest, context: Context
    ) -> pb.Repository:
        """What there is now."""
        keeper = self._open()
        await keeper.refresh()
        return self._repository(keeper)

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> potential_pb2.Model:
        """Loads a version beside what answers."""
        keeper = self._open()
        with _as_statuses("name"):
            return self._model(keeper.registry, await keeper.load(request.name, request.version))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        """Ends a version."""
        keeper = self._open()
        with _as_statuses("name"):
            return pb.UnloadModelResponse(versions=await keeper.unload(request.name, request.version))

    async def SetLabel(self, request: pb.SetLabelRequest, context: Context) -> potential_pb2.Model:
        """Lets a label name a version."""
        keeper, label = self._open(), request.label
        with _as_statuses("label"):
            target = check(label.label, label.version, label.weight)
            return self._model(keeper.registry, await keeper.set_label(label.model, label.label, target))

    async def RemoveLabel(self, request: pb.RemoveLabelRequest, context: Context) -> pb.RemoveLabelResponse:
        """Takes a label away."""
        keeper = self._open()
        with _as_statuses("label"):
            await keeper.remove_label(request.model, request.label)
        return pb.RemoveLabelResponse()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods."""
        handlers: dict[str, grpc.RpcMethodHandler[bytes, Message]] = {
            "GetRepository": self._handler(self.GetRepository, pb.GetRepositoryRequest),
            "RefreshRepository": self._handler(self.RefreshRepository, pb.RefreshRepositoryRequest),
            "LoadModel": self._handler(self.LoadModel, pb.LoadModelRequest),
            "UnloadModel": self._handler(self.UnloadModel, pb.UnloadModelRequest),
            "SetLabel": self._handler(self.SetLabel, pb.SetLabelRequest),
            "RemoveLabel": self._handler(self.RemoveLabel, pb.RemoveLabelRequest),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def _handler(
        self, method: Callable[[RequestT, Context], Awaitable[Message]], request_type: type[RequestT]
    ) -> grpc.RpcMethodHandler[bytes, Message]:
        async def admitted(request: RequestT, context: Context) -> Message:
            identity = current_call().identity
            if ANYONE not in self._admins and identity not in self._admins:
                who = f"{identity!r} is" if identity else "a caller without a name is"
                raise Forbidden(f"{who} not among those whom this server's --admin names")
            return await method(request, context)

        return guarded(admitted, request_type)

    def _open(self) -> Keeper:
        if self._keeper is None:
            raise NotReady("the server is starting or shutting down", retry_after=RETRY_STARTING)
        return self._keeper

    def _model(self, registry: Registry, slot: Slot) -> potential_pb2.Model:
        return registry.describe(registry.families[slot.name], slot, self._limits)

    def _repository(self, keeper: Keeper) -> pb.Repository:
        labels = [
            pb.Label(model=family.name, label=name, version=label.version, weight=label.weight)
            for family in keeper.registry.families.values()
            for name, label in sorted(family.labels.items())
        ]
        return pb.Repository(
            url=keeper.shown,
            models=keeper.registry.listing(self._limits),
            labels=labels,
            problems=keeper.problems,
        )


@contextmanager
def _as_statuses(field: str) -> Iterator[None]:
    try:
        yield
    except UnknownModelError as error:
        raise NotServed(str(error), field=field) from None
    except LabelError as error:
        raise InvalidRequest(str(error), field=field) from None
    except ServeError as error:
        raise NotPossible(str(error), field=field) from None
