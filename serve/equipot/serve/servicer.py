"""The gRPC methods: messages in, messages out, refusals by type. Knows nothing of queue or torch."""

from __future__ import annotations

import asyncio
import time
from typing import TypeAlias, cast

import grpc

from equipot.serve.call import current_call
from equipot.serve.certainty import understood
from equipot.serve.config import RequestLimits
from equipot.serve.dispatcher import Dispatcher
from equipot.serve.errors import RETRY_STARTING, CallError, InvalidRequest, NotReady, OverLimit
from equipot.serve.excerpt import excerpt
from equipot.serve.explain import Estimate
from equipot.serve.job import CHUNK_ATOMS, Answer, Key, Work
from equipot.serve.metrics import NO_MODEL, OK, Metrics, ModelCounts
from equipot.serve.models import ServedModel
from equipot.serve.registry import Registry
from equipot.serve.shadow import Shadow
from equipot.serve.shares import Priority
from equipot.serve.status import Context, guarded
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import (
    CodecError,
    StructureArrays,
    decode_structures,
    encode_failures,
    encode_predictions,
)

SERVICE = pb.DESCRIPTOR.services_by_name["PotentialService"].full_name

Naming: TypeAlias = pb.PredictRequest | pb.SessionOpen | pb.RelaxRequest | pb.SimulateRequest
"""Requests that name a model to compute with."""

RETRY_DRAINING = 1.0
"""Seconds after which another server may have taken over."""


class Gate:
    """Lets calls in while the server serves."""

    def __init__(self) -> None:
        self.shadow: Shadow | None = None
        self._registry: Registry | None = None
        self._refusal = ("the server is starting", RETRY_STARTING)

    def open(self, registry: Registry, shadow: Shadow | None = None) -> None:
        """From now on calls are answered by these models, and those on trial see what was answered."""
        self._registry, self.shadow = registry, shadow

    def close(self) -> None:
        """From now on calls are refused."""
        self._registry = self.shadow = None
        self._refusal = ("the server is shutting down", RETRY_DRAINING)

    def registry(self) -> Registry:
        """The models.

        Raises:
            NotReady: the server starts or drains.
        """
        if self._registry is None:
            message, retry_after = self._refusal
            raise NotReady(message, retry_after=retry_after)
        return self._registry


class PotentialServicer:
    """The methods of `PotentialService`; they raise `CallError`, which `guarded` turns into statuses."""

    def __init__(
        self,
        gate: Gate,
        dispatcher: Dispatcher,
        metrics: Metrics,
        limits: RequestLimits,
        *,
        log_structures: bool = False,
    ) -> None:
        self._log_structures = log_structures
        self._gate = gate
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._limits = limits

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Energies, forces and stress of a batch."""
        started = time.perf_counter()
        deadline = _deadline(context)
        counts, outcome = self._metrics.of(NO_MODEL), "internal"
        call = current_call()
        self._metrics.in_flight.inc()
        self._dispatcher.entered()
        # The stubs declare the callback's type as a class, which no function is.
        context.add_done_callback(self._left)  # type: ignore[arg-type]
        try:
            model = self.find(request, context)
            counts = self._metrics.of(model.name, model.version)
            with model.in_use():
                work = self.understand(request, model, deadline)
                answer = await self._dispatcher.predict(work)
            response = respond(work, answer)
            outcome = OK
            # Once the answer has left: nobody waits for what is learnt of it.
            seconds = time.perf_counter() - started
            loop = asyncio.get_running_loop()
            loop.call_soon(_note_answer, counts, work, answer, seconds)
            if self._gate.shadow is not None:
                loop.call_soon(self._gate.shadow.offer, work, answer)
            return response
        except CallError as error:
            outcome = error.reason.lower()
            raise
        except asyncio.CancelledError:
            # gRPC ends the handler both when the caller leaves and when its deadline passes.
            late = deadline is not None and time.monotonic() >= deadline
            outcome = "deadline_passed" if late else "cancelled"
            raise
        finally:
            call.outcome = outcome
            self._metrics.in_flight.dec()
            counts.request_ended(outcome)

    async def Explain(self, request: pb.PredictRequest, context: Context) -> pb.ExplainResponse:
        """What Predict with this request would cost."""
        started = time.perf_counter()
        model = self.find(request, context)
        with model.in_use():
            work = self.understand(request, model, _deadline(context))
            estimate = await self._dispatcher.explain(work)
        return _explained(work, estimate, time.perf_counter() - started)

    def _left(self, ctx: Context) -> None:
        self._dispatcher.left()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """The models that this server serves."""
        return pb.ListModelsResponse(models=self._gate.registry().listing(self._limits))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        """One model with its full card."""
        registry = self._gate.registry()
        family, slot = registry.locate(request.model, _session(request, context))
        return registry.describe(family, slot, self._limits)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods."""
        handlers = {
            "Predict": guarded(self.Predict, pb.PredictRequest),
            "Explain": guarded(self.Explain, pb.PredictRequest),
            "ListModels": guarded(self.ListModels, pb.ListModelsRequest),
            "GetModel": guarded(self.GetModel, pb.GetModelRequest),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def find(self, request: Naming, context: Context) -> ServedModel:
        """The model that a request names; noted as the one that answers this call.

        Raises:
            CallError: there is none, or it does not answer now.
        """
        model = self._gate.registry().find(request.model, session=_session(request, context))
        call = current_call()
        call.model, call.version = model.name, model.version
        return model

    def understand(
        self,
        request: pb.PredictRequest,
        model: ServedModel,
        deadline: float | None,
        *,
        now: bool = True,
        accepted: bool = False,
    ) -> Work:
        """What is asked, checked against what the model and this server can do.

        Args:
            request: the question.
            model: that is to answer.
            deadline: by `time.monotonic`.
            now: whether it is asked with this; else its caller is charged when it is.
            accepted: whether what it holds came in other requests, of which none was more than one may be:
                nor is this one then.

        Raises:
            CallError: the request as a whole cannot be answered.
        """
        model.engine.check_ready()
        forces, stress = _wanted(request)
        if stress and not model.card.has_stress:
            why = " has a direct force head and so" if model.card.force_mode == "direct" else " has"
            raise InvalidRequest(
                f"{model.name}{why} no stress: ask for energy and forces only, or another model",
                field="properties",
            )
        if forces and not model.card.has_forces:
            raise InvalidRequest(
                f"{model.name} has no forces: ask for the energy only (properties), or another model",
                field="properties",
            )
        level = model.level_index(request.level_of_theory)
        structures = self._structures(request, bounded=not accepted)
        call = current_call()
        if now and not accepted:
            call.asked(len(structures), len(structures.positions))
        else:
            call.structures, call.atoms = len(structures), len(structures.positions)
        if self._log_structures:
            call.contents = excerpt(structures)
        return Work(
            key=Key(model, forces, stress),
            structures=structures,
            level=level,
            deadline=deadline,
            call=call,
            priority=_priority(request),
            certainty=understood(request.uncertainty) if request.HasField("uncertainty") else None,
        )

    def _structures(self, request: pb.PredictRequest, *, bounded: bool) -> StructureArrays:
        if not request.HasField("structures"):
            raise InvalidRequest("the request has no structures", field="structures")
        if bounded:
            _within(len(request.structures.n_atoms), self._limits.request_structures, "structures")
        try:
            structures = decode_structures(request.structures)
        except CodecError as error:
            raise InvalidRequest(str(error), field=f"structures.{error.field}") from error
        if bounded:
            _within(len(structures.positions), self._limits.request_atoms, "atoms")
        return structures


def _session(request: Naming | pb.GetModelRequest, context: Context) -> str:
    """Whose calls belong together."""
    return request.session or current_call().identity or str(context.peer())


def _deadline(context: Context) -> float | None:
    """By `time.monotonic`."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _note_answer(counts: ModelCounts, work: Work, answer: Answer, seconds: float) -> None:
    counts.request_answered(seconds)
    # What it took beside what is measured in parts, if these did not overlap.
    rest = seconds - answer.prepare_seconds - answer.queue_seconds - answer.compute_seconds
    if work.offsets[-1] <= CHUNK_ATOMS and rest > 0:
        work.key.model.capacity.learn_around(work.size, rest)


def _wanted(request: pb.PredictRequest) -> tuple[bool, bool]:
    """Whether forces and stress are asked for."""
    if not request.properties:
        return True, False
    for value in request.properties:
        if value == pb.PROPERTY_UNSPECIFIED or value not in pb.Property.values():
            raise InvalidRequest(f"{value} is no property this server knows", field="properties")
    return pb.PROPERTY_FORCES in request.properties, pb.PROPERTY_STRESS in request.properties


def _priority(request: pb.PredictRequest) -> Priority:
    if request.priority == pb.PRIORITY_UNSPECIFIED:
        return Priority.NORMAL
    if request.priority not in pb.Priority.values():
        raise InvalidRequest(f"{request.priority} is no priority this server knows", field="priority")
    return Priority(request.priority)


def _within(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise OverLimit(
            f"the request has {count} {what}, the limit is {limit}: send it in parts",
            field="structures.n_atoms",
            facts={what: str(count), f"max_request_{what}": str(limit)},
        )


def respond(work: Work, answer: Answer) -> pb.PredictResponse:
    """The answer on the wire."""
    response = pb.PredictResponse(
        model=work.key.model.reference(work.level),
        timing=pb.Timing(queue_seconds=answer.queue_seconds, compute_seconds=answer.compute_seconds),
    )
    encode_predictions(answer.predictions, response)
    return response


def _explained(work: Work, estimate: Estimate, seconds: float) -> pb.ExplainResponse:
    prepared, model = estimate.prepared, work.key.model
    sizes = [size for size in prepared.sizes if size]
    return pb.ExplainResponse(
        model=model.reference(work.level),
        replica=model.engine.way,
        n_edges=[size.edges if size else 0 for size in prepared.sizes],
        total_atoms=sum(size.atoms for size in sizes),
        total_edges=sum(size.edges for size in sizes),
        n_batches=estimate.n_batches,
        memory_bytes=estimate.memory_bytes,
        prepare_seconds=prepared.seconds,
        queue_seconds=estimate.queue_seconds,
        compute_seconds=estimate.compute_seconds,
        total_seconds=estimate.total_seconds,
        priority=cast("pb.Priority.ValueType", int(estimate.priority)),
        refusal=estimate.refusal,
        failures=encode_failures(prepared.failures),
        explain_seconds=seconds,
    )
