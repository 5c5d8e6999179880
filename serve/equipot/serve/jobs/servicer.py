"""The methods of `JobService`: messages in, messages out, each identity's own jobs alone."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import grpc

from equipot.serve.call import current_call
from equipot.serve.config import RequestLimits
from equipot.serve.errors import CallError, InvalidRequest, NoSuchJob, NotPossible, NotReady, OverLimit
from equipot.serve.jobs import kinds
from equipot.serve.jobs.desk import wait_for
from equipot.serve.jobs.metrics import JobMetrics
from equipot.serve.jobs.records import (
    JobRecord,
    JobState,
    NoRoom,
    Opening,
    Part,
    Room,
    StoreError,
    StoreFull,
    Unfit,
)
from equipot.serve.jobs.runner import FindModel, MoveStructures, Run, Runner
from equipot.serve.jobs.settings import JobSettings
from equipot.serve.jobs.store import Store
from equipot.serve.jobs.telling import refusals_of
from equipot.serve.models import ServedModel
from equipot.serve.quotas import Quotas
from equipot.serve.servicer import RETRY_DRAINING
from equipot.serve.status import Context, guarded, guarded_reply_stream
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb

SERVICE = jpb.DESCRIPTOR.services_by_name["JobService"].full_name

TELL_SECONDS = 1.0
"""How often whoever is attached is told how far a job is."""

READ_RESULTS = 200
"""Results that are read at once for whoever is attached."""

RETRY_FULL = 30.0

STARTING, STOPPING = "the server is starting", "the server is shutting down"

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_LABEL = 200

_STATES: dict[JobState, jpb.JobState.ValueType] = {
    JobState.RECEIVING: jpb.JOB_STATE_RECEIVING,
    JobState.DONE: jpb.JOB_STATE_DONE,
    JobState.CANCELLED: jpb.JOB_STATE_CANCELLED,
    JobState.FAILED: jpb.JOB_STATE_FAILED,
}

P = ParamSpec("P")
T = TypeVar("T")

CheckRequest = Callable[[kinds.MoveRequest, ServedModel], list[str]]


class JobServicer:
    """Takes jobs, runs them, and hands out what they find.

    Args:
        settings: of the operator.
        move: answers one request of a job.
        check: raises what is wrong with one, and returns what looks so.
        find: the model that a name means to a session.
        quotas: of the identities.
        limits: of requests.
        metrics: that are told what happens.

    Raises:
        ServeError: the jobs' folder cannot be used.
    """

    def __init__(
        self,
        settings: JobSettings,
        *,
        move: MoveStructures,
        check: CheckRequest,
        find: FindModel,
        quotas: Quotas,
        limits: RequestLimits,
        metrics: JobMetrics,
    ) -> None:
        self._settings = settings
        self._check = check
        self._find = find
        self._metrics = metrics
        self._room = Room(
            identity_jobs=settings.identity_jobs,
            identity_bytes=settings.identity_bytes,
            most_bytes=settings.most_bytes,
        )
        self._store = Store(settings.folder)
        self._runner = Runner(
            self._store,
            settings,
            move=move,
            find=find,
            quotas=quotas,
            limits=limits,
            on_written=metrics.written,
            on_gone=metrics.gone,
        )
        self._desk = self._runner.desk
        self._opening: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None
        self._refusal = STARTING

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods."""
        handlers = {
            "SubmitJob": guarded(self.SubmitJob, jpb.SubmitJobRequest),
            "GetJob": guarded(self.GetJob, jpb.GetJobRequest),
            "ListJobs": guarded(self.ListJobs, jpb.ListJobsRequest),
            "AttachJob": guarded_reply_stream(self.attach, jpb.AttachJobRequest),
            "CancelJob": guarded(self.CancelJob, jpb.CancelJobRequest),
            "DeleteJob": guarded(self.DeleteJob, jpb.DeleteJobRequest),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def open(self) -> None:
        """Goes on with the jobs that there are, and takes new ones."""
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        for record in await self._desk.do(self._store.open_jobs):
            self._metrics.begin(record)
        await self._runner.open()
        self._refusal = ""
        self._counting = asyncio.create_task(self._count())

    async def close(self) -> None:
        """Stops the jobs where they are, and lets their folder go; calls under way end."""
        if self._refusal == STOPPING:
            return
        self._refusal = STOPPING
        for task in (self._opening, self._counting):
            if task is not None:
                task.cancel()
        await self._runner.close()

    async def SubmitJob(self, request: jpb.SubmitJobRequest, context: Context) -> jpb.Job:
        """Adds a part to a job."""
        if not _ID.fullmatch(request.id):
            raise InvalidRequest(
                f"id is {request.id[:80]!r}: give 1 to 64 letters, digits, and . _ -", field="id"
            )
        if len(request.label) > _LONGEST_LABEL:
            raise InvalidRequest(f"label is longer than {_LONGEST_LABEL} characters", field="label")
        asked = kinds.request_of(request)
        # Before anything is counted from its start, which may be any number.
        record = await self._read(self._store.begun, current_call().identity, request.id, request.start)
        part = await asyncio.to_thread(_part_of, request)
        name = asked.model
        if record is not None:
            # The name may have come to mean another bundle since the first part.
            reference = pb.ModelReference.FromString(record.model)
            name = f"{reference.name}@{reference.digest}"
        model = self._find(name, request.id)
        settings = kinds.settings_of(asked)
        refused = {move.place for move in part.moves}
        warnings = self._check(kinds.chunk_of(settings, part.pieces, refused, {}).request, model)
        level = model.level_index(asked.level_of_theory)
        opening = Opening(
            label=request.label,
            kind=request.WhichOneof("kind") or "",
            request=settings.SerializeToString(deterministic=True),
            model=model.reference(level).SerializeToString() if record is None else record.model,
        )
        begins = record is None
        record = await self._read(
            self._store.submit, current_call().identity, request.id, opening, part, self._room
        )
        if begins:
            self._metrics.begin(replace(record, n_done=0, n_failed=0))
        self._metrics.written(record)
        self._runner.submitted(record)
        message = self._message(record)
        message.warnings.extend(warnings)
        return message

    async def GetJob(self, request: jpb.GetJobRequest, context: Context) -> jpb.Job:
        """How far a job is."""
        return self._message(await self._own(request.id))

    async def ListJobs(self, request: jpb.ListJobsRequest, context: Context) -> jpb.ListJobsResponse:
        """The caller's jobs."""
        records = await self._read(self._store.jobs, current_call().identity)
        return jpb.ListJobsResponse(jobs=[self._message(record) for record in records])

    async def CancelJob(self, request: jpb.CancelJobRequest, context: Context) -> jpb.Job:
        """Ends a job."""
        record = await self._own(request.id)
        ended = await self._end(record)
        if ended is None:
            raise _unknown(request.id)
        return self._message(ended)

    async def DeleteJob(self, request: jpb.DeleteJobRequest, context: Context) -> jpb.DeleteJobResponse:
        """Ends and forgets a job."""
        record = await self._own(request.id)
        try:
            await self._runner.delete(record.key)
        except StoreError as error:
            raise _understood(error) from error
        return jpb.DeleteJobResponse()

    async def attach(
        self, request: jpb.AttachJobRequest, context: Context
    ) -> AsyncGenerator[jpb.AttachJobReply, None]:
        """Results in order, and how far the job is."""
        record, after = await self._own(request.id), request.after
        if after > record.n_results:
            raise InvalidRequest(
                f"after is {after}, job {request.id!r} has {record.n_results} results", field="after"
            )
        key, told = record.key, self._message(record)
        yield jpb.AttachJobReply(job=told)
        told_at = time.monotonic()
        while True:
            news = self._desk.news(key)
            record = await self._own(request.id, key)
            rows = await self._read(self._store.results, key, after, READ_RESULTS)
            for number, data in rows:
                result = jpb.JobResult.FromString(data)
                result.number = after = number
                yield jpb.AttachJobReply(result=result)
            message = self._message(record)
            over = not rows and (record.state.ended or request.now)
            if over or (message != told and time.monotonic() - told_at >= TELL_SECONDS):
                yield jpb.AttachJobReply(job=message)
                told, told_at = message, time.monotonic()
            if over:
                return
            if not rows:
                await wait_for(news, TELL_SECONDS)

    async def _end(self, record: JobRecord) -> JobRecord | None:
        try:
            return await self._runner.end(record.key, JobState.CANCELLED)
        except StoreError as error:
            raise _understood(error) from error

    async def _own(self, name: str, key: int | None = None) -> JobRecord:
        """The caller's job; with `key` that very one, and not another of its name."""
        record = await self._read(self._store.job, current_call().identity, name)
        if record is None or (key is not None and record.key != key):
            raise _unknown(name)
        return record

    async def _read(self, method: Callable[P, T], *args: P.args, **words: P.kwargs) -> T:
        try:
            if self._refusal == STARTING and self._opening is not None:
                await asyncio.shield(self._opening)
            if self._refusal:
                raise NotReady(self._refusal, retry_after=RETRY_DRAINING)
            return await self._desk.do(method, *args, **words)
        except StoreError as error:
            raise _understood(error) from error

    def _message(self, record: JobRecord) -> jpb.Job:
        run = self._runner.run_of(record.key)
        state, reason = self._state(record, run)
        settings = kinds.REQUESTS[record.kind].FromString(record.request)
        return jpb.Job(
            id=record.id,
            label=record.label,
            kind=record.kind,
            state=state,
            reason=reason,
            model=pb.ModelReference.FromString(record.model),
            priority=settings.priority,
            n_structures=record.n_structures,
            n_atoms=record.n_atoms,
            n_done=record.n_done,
            n_failed=record.n_failed,
            n_moving=run.structures if run is not None else 0,
            n_results=record.n_results,
            n_steps=record.n_steps,
            n_ahead=self._runner.ahead_of(record) if run is not None else 0,
            remaining_seconds=run.remaining_seconds if run is not None else 0.0,
            created=record.created,
            ended=record.ended,
            expires=record.ended + self._settings.keep_seconds if record.ended else 0.0,
            bytes=record.size,
            n_steps_moving=sum(run.headway.steps.values()) if run is not None else 0,
            n_steps_asked=kinds.steps_of(settings) * record.n_structures,
            timestep=kinds.timestep_of(settings),
        )

    def _state(self, record: JobRecord, run: Run | None) -> tuple[jpb.JobState.ValueType, str]:
        if record.state is not JobState.OPEN:
            return _STATES[record.state], record.reason
        if self._desk.problem:
            return jpb.JOB_STATE_WAITING, self._desk.problem
        if run is None:
            return jpb.JOB_STATE_QUEUED, ""
        if run.lanes:
            return jpb.JOB_STATE_RUNNING, ""
        return (jpb.JOB_STATE_WAITING, run.reason) if run.reason else (jpb.JOB_STATE_QUEUED, "")

    async def _count(self) -> None:
        while True:
            with contextlib.suppress(StoreError):
                self._metrics.count(await self._desk.do(self._store.counts))
            await asyncio.sleep(TELL_SECONDS)


def _part_of(request: jpb.SubmitJobRequest) -> Part:
    """What a call adds to its job."""
    asked = kinds.request_of(request)
    pieces = tuple(kinds.pieces_of(asked, request.start))
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.data)
    refusals = refusals_of(request)
    for move in refusals:
        digest.update(move.results[0])
    n_bytes = sum(len(piece.data) for piece in pieces)
    return Part(
        start=request.start,
        n_structures=sum(piece.n_structures for piece in pieces),
        n_atoms=sum(piece.n_atoms for piece in pieces),
        digest=digest.digest(),
        size=kinds.room_for(asked, n_bytes),
        pieces=pieces,
        moves=refusals,
        last=request.last,
    )


def _unknown(name: str) -> NoSuchJob:
    return NoSuchJob(f"you have no job {name[:80]!r} here", field="id")


def _understood(error: StoreError) -> CallError:
    """The store's error as the caller's."""
    if isinstance(error, Unfit):
        return NotPossible(str(error), field="id")
    if isinstance(error, NoRoom):
        return OverLimit(str(error))
    if isinstance(error, StoreFull):
        return NotReady(str(error), retry_after=RETRY_FULL)
    return CallError(str(error))
