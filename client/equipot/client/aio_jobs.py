"""Jobs for asyncio: as `jobs`, with the same results and errors. Opens no connection itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Unpack

import grpc
import grpc.aio

from equipot.client.batches import Priority
from equipot.client.certainty import Uncertainty
from equipot.client.credentials import TokenSource
from equipot.client.dynamics import SimulateWords
from equipot.client.errors import ClientError
from equipot.client.job_info import JobInfo, JobResult
from equipot.client.job_requests import Submission, relaxing, simulating
from equipot.client.jobs import Visits, of_jobs, told
from equipot.client.relax import RelaxWords
from equipot.client.results import ModelInfo
from equipot.client.retry import Deadline
from equipot.client.settings import Asked, Settings
from equipot.client.structures import StructuresLike
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1.jobs_pb2_grpc import JobServiceStub


@dataclass(frozen=True, slots=True)
class AsyncLine:
    """How a client reaches its server; as `jobs.Line`."""

    settings: Settings
    channel: Callable[[], grpc.aio.Channel]
    token: TokenSource
    model: Callable[[str], Awaitable[ModelInfo]]
    understand: Callable[[grpc.RpcError], Awaitable[ClientError]]


class AsyncJobs:
    """`equipot.client.Jobs` for asyncio, made by `AsyncClient.jobs`: the same arguments and results."""

    def __init__(self, line: AsyncLine) -> None:
        self._line = line

    async def relax(
        self,
        structures: StructuresLike,
        *,
        id: str = "",
        label: str = "",
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        priority: Priority = "low",
        on_sent: Callable[[int], None] | None = None,
        **how: Unpack[RelaxWords],
    ) -> JobInfo:
        """As `Jobs.relax`."""
        asked = Asked(model=model, level_of_theory=level_of_theory, uncertainty=uncertainty)
        own = self._line.settings
        return await self._submit(
            relaxing(own, structures, asked, how, id=id, label=label, priority=priority), on_sent
        )

    async def simulate(
        self,
        structures: StructuresLike,
        *,
        steps: int,
        id: str = "",
        label: str = "",
        level_of_theory: str = "",
        model: str | None = None,
        uncertainty: bool | Uncertainty = False,
        priority: Priority = "low",
        on_sent: Callable[[int], None] | None = None,
        **how: Unpack[SimulateWords],
    ) -> JobInfo:
        """As `Jobs.simulate`."""
        asked = Asked(model=model, level_of_theory=level_of_theory, uncertainty=uncertainty)
        own = self._line.settings
        return await self._submit(
            simulating(own, structures, asked, how, steps=steps, id=id, label=label, priority=priority),
            on_sent,
        )

    async def get(self, id: str) -> JobInfo:
        """As `Jobs.get`."""
        return JobInfo.from_wire(await self._ask(lambda stub: stub.GetJob, jpb.GetJobRequest(id=id)))

    async def list(self) -> tuple[JobInfo, ...]:
        """As `Jobs.list`."""
        reply = await self._ask(lambda stub: stub.ListJobs, jpb.ListJobsRequest())
        return tuple(JobInfo.from_wire(job) for job in reply.jobs)

    async def cancel(self, id: str) -> JobInfo:
        """As `Jobs.cancel`."""
        return JobInfo.from_wire(await self._ask(lambda stub: stub.CancelJob, jpb.CancelJobRequest(id=id)))

    async def delete(self, id: str) -> None:
        """As `Jobs.delete`."""
        await self._ask(lambda stub: stub.DeleteJob, jpb.DeleteJobRequest(id=id))

    async def attach(
        self,
        id: str,
        *,
        after: int = 0,
        follow: bool = True,
        on_progress: Callable[[JobInfo], None] | None = None,
    ) -> AsyncGenerator[JobResult, None]:
        """As `Jobs.attach`."""
        visits = Visits(self._line.settings.retry)
        while True:
            visits.begin()
            try:
                request = jpb.AttachJobRequest(id=id, after=after, now=not follow)
                async with aclosing(self._attached(request)) as replies:
                    async for reply in replies:
                        visits.heard()
                        if (result := told(reply, after, on_progress)) is not None:
                            after += 1
                            yield result
                return
            except grpc.RpcError as error:
                delay = visits.delay(await self._understand(error), error)
            await asyncio.sleep(delay)

    async def wait(self, id: str) -> JobInfo:
        """As `Jobs.wait`."""
        last: list[JobInfo] = []
        after = (await self.get(id)).n_results
        async for _ in self.attach(id, after=after, on_progress=last.append):
            pass
        return last[-1]

    async def _submit(self, submission: Submission, on_sent: Callable[[int], None] | None) -> JobInfo:
        limits = (await self._line.model(submission.wish.model)).limits
        for request, n_sent in submission.requests(limits, self._line.settings):
            info = JobInfo.from_wire(await self._ask(lambda stub: stub.SubmitJob, request))
            if on_sent is not None:
                on_sent(n_sent)
        return info

    async def _attached(self, request: jpb.AttachJobRequest) -> AsyncGenerator[jpb.AttachJobReply, None]:
        call = self._stub().AttachJob(request, metadata=self._line.token.headers())
        try:
            async for reply in call:
                yield reply
        finally:
            call.cancel()

    async def _ask(self, method: Callable[[Any], Callable[..., Awaitable[Any]]], request: object) -> Any:  # noqa: ANN401  # one of several replies
        settings, attempt = self._line.settings, 1
        deadline = Deadline(settings.timeout)
        while True:
            try:
                return await method(self._stub())(
                    request, timeout=deadline.require(), metadata=self._line.token.headers()
                )
            except grpc.RpcError as error:
                problem = await self._understand(error)
                delay = settings.retry.delay(problem, attempt, deadline.remaining)
                if delay is None:
                    raise problem from error
            await asyncio.sleep(delay)
            attempt += 1

    def _stub(self) -> Any:  # noqa: ANN401  # at run time one class serves both kinds of channels
        return JobServiceStub(self._line.channel())

    async def _understand(self, error: grpc.RpcError) -> ClientError:
        return of_jobs(await self._line.understand(error), self._line.settings.address)
