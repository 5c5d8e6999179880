"""Jobs that a server keeps: submitted once, fetched when it suits. Opens no connection itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack

import grpc

from equipot.client.attempts import Tries, persist
from equipot.client.batches import Priority
from equipot.client.certainty import Uncertainty
from equipot.client.credentials import TokenSource
from equipot.client.dynamics import SimulateWords
from equipot.client.errors import ClientError, Refused, ServerError
from equipot.client.job_info import JobInfo, JobResult
from equipot.client.job_requests import Submission, relaxing, simulating
from equipot.client.relax import RelaxWords
from equipot.client.results import ModelInfo
from equipot.client.retry import Deadline, RetryPolicy
from equipot.client.settings import Asked, Settings
from equipot.client.structures import StructuresLike
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1.jobs_pb2_grpc import JobServiceStub

_Reply = TypeVar("_Reply")

LASTING_SECONDS = 10.0
"""A call that follows a job and lasts as long was served, whether or not it brought results."""


@dataclass(frozen=True, slots=True)
class Line:
    """How a client reaches its server.

    Attributes:
        settings: of the client.
        channel: the one that is open now.
        token: to show.
        model: asks for a model by name.
        understand: gRPC's error in our words.
    """

    settings: Settings
    channel: Callable[[], grpc.Channel]
    token: TokenSource
    model: Callable[[str], ModelInfo]
    understand: Callable[[grpc.RpcError], ClientError]


class Jobs:
    """The jobs of this client's identity on its server; made by `Client.jobs`.

    Raises:
        Refused: by every method, if the server keeps no jobs.
        JobNotFound: by every method that names a job, if there is none of that name or it is another's.
    """

    def __init__(self, line: Line) -> None:
        self._line = line

    def relax(
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
        """Has the server relax any number of structures, and returns when it has them all on its disk.

        Structures that cannot be sent have their failures among the results, the others go on.

        Args:
            structures: as of `Client.relax`.
            id: 1 to 64 letters, digits, and . _ -, the caller's own for each job; empty: a new one. To submit
                the same again under one id, as after a lost connection, makes one job.
            label: any text to know it by.
            level_of_theory: one of the model's; empty: its only one.
            model: another than the client's.
            uncertainty: as in `Client.relax` and `Client.simulate`.
            priority: among all work of the server; "low" lets others go first.
            on_sent: told how many structures the server has.
            how: fmax, steps, optimizer, cell, pressure, max_step; see `RelaxWords`.

        Raises:
            InvalidRequest: a setting out of its range, or a constraint that is not FixAtoms.
            LimitExceeded: the server has no room for it.
            Refused: another job has this id already.
        """
        asked = Asked(model=model, level_of_theory=level_of_theory, uncertainty=uncertainty)
        return self._submit(
            relaxing(self._line.settings, structures, asked, how, id=id, label=label, priority=priority),
            on_sent,
        )

    def simulate(
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
        """Has the server move any number of structures in time, and returns when it has them all on its disk.

        Each frame and each observation is a result of its own, those of one structure in the order of their
        steps; the last result of each structure is an `Ended`, also where the structure cannot be sent.

        Args:
            structures: as of `Client.simulate`.
            steps: in all.
            id: as in `relax`.
            label: any text to know it by.
            level_of_theory: one of the model's; empty: its only one.
            model: another than the client's.
            uncertainty: as in `Client.relax` and `Client.simulate`.
            priority: among all work of the server; "low" lets others go first.
            on_sent: told how many structures the server has.
            how: integrator, timestep, temperature, …; see `SimulateSettings`. A seed that is not given is
                made of the id, so other jobs have others. When states are saved is the server's business, not
                token_every's.

        Raises:
            InvalidRequest: a setting out of its range, or a constraint that is not FixAtoms.
            LimitExceeded: the server has no room for it; see frame_every.
            Refused: another job has this id already.
        """
        asked = Asked(model=model, level_of_theory=level_of_theory, uncertainty=uncertainty)
        return self._submit(
            simulating(
                self._line.settings,
                structures,
                asked,
                how,
                steps=steps,
                id=id,
                label=label,
                priority=priority,
            ),
            on_sent,
        )

    def get(self, id: str) -> JobInfo:
        """How far a job is."""
        return JobInfo.from_wire(self._ask(lambda stub: stub.GetJob, jpb.GetJobRequest(id=id)))

    def list(self) -> tuple[JobInfo, ...]:
        """This identity's jobs, the newest first."""
        reply = self._ask(lambda stub: stub.ListJobs, jpb.ListJobsRequest())
        return tuple(JobInfo.from_wire(job) for job in reply.jobs)

    def cancel(self, id: str) -> JobInfo:
        """Ends a job; what it has found stays."""
        return JobInfo.from_wire(self._ask(lambda stub: stub.CancelJob, jpb.CancelJobRequest(id=id)))

    def delete(self, id: str) -> None:
        """Ends a job and forgets it with its results."""
        self._ask(lambda stub: stub.DeleteJob, jpb.DeleteJobRequest(id=id))

    def attach(
        self,
        id: str,
        *,
        after: int = 0,
        follow: bool = True,
        on_progress: Callable[[JobInfo], None] | None = None,
    ) -> Generator[JobResult, None, None]:
        """A job's results in the order in which they came, each once, until it has ended.

        After a lost connection it goes on behind the last result, also with a server that was started again.

        Args:
            id: of the job.
            after: the number of the last result that the caller has already.
            follow: whether to wait for results that are still to come.
            on_progress: told how far the job is: first, about every second, and last.

        Raises:
            ServerUnavailable: the server was away for longer than the client tries.
        """
        visits, over = Visits(self._line.settings.retry), False
        while not over:
            visits.begin()
            try:
                for reply in self._attached(jpb.AttachJobRequest(id=id, after=after, now=not follow)):
                    visits.heard()
                    if (result := told(reply, after, on_progress)) is not None:
                        after += 1
                        yield result
                over = True
            except grpc.RpcError as error:
                time.sleep(visits.delay(self._understand(error), error))

    def wait(self, id: str) -> JobInfo:
        """A job once it has ended; see `JobInfo.raise_for_failure`."""
        last: list[JobInfo] = []
        # Its results are not what is waited for: only the last status counts.
        for _ in self.attach(id, after=self.get(id).n_results, on_progress=last.append):
            pass
        return last[-1]

    def _submit(self, submission: Submission, on_sent: Callable[[int], None] | None) -> JobInfo:
        limits = self._line.model(submission.wish.model).limits
        for request, n_sent in submission.requests(limits, self._line.settings):
            info = JobInfo.from_wire(self._ask(lambda stub: stub.SubmitJob, request))
            if on_sent is not None:
                on_sent(n_sent)
        return info

    def _attached(self, request: jpb.AttachJobRequest) -> Generator[jpb.AttachJobReply, None, None]:
        call: Any = self._stub().AttachJob(request, metadata=self._line.token.headers())
        try:
            yield from call
        finally:
            call.cancel()

    def _ask(self, method: Callable[[JobServiceStub], Callable[..., _Reply]], request: object) -> _Reply:
        settings = self._line.settings
        deadline = Deadline(settings.timeout)

        def attempt() -> _Reply:
            call = method(self._stub())
            return call(request, timeout=deadline.require(), metadata=self._line.token.headers())

        return persist(attempt, attempt, deadline, settings.retry, self._understand)

    def _stub(self) -> JobServiceStub:
        return JobServiceStub(self._line.channel())

    def _understand(self, error: grpc.RpcError) -> ClientError:
        return of_jobs(self._line.understand(error), self._line.settings.address)


class Visits:
    """Counts the calls in a row that followed a job, failed, and told nothing new."""

    def __init__(self, retry: RetryPolicy) -> None:
        self._tries = Tries(retry)
        self._replies, self._begun = 0, 0.0

    def begin(self) -> None:
        """Notes that a call begins."""
        self._begun, self._replies = time.monotonic(), 0

    def heard(self) -> None:
        """Notes a reply. The first says how far the job is, and does so at once, whatever becomes of it."""
        self._replies += 1

    def delay(self, problem: ClientError, cause: grpc.RpcError) -> float:
        """As `Tries.delay`."""
        # Nothing new for a while is what a job that waits in a queue has to tell.
        lasted = self._replies == 1 and time.monotonic() - self._begun >= LASTING_SECONDS
        return self._tries.delay(problem, cause, got_on=self._replies > 1 or lasted)


def told(
    reply: jpb.AttachJobReply, after: int, on_progress: Callable[[JobInfo], None] | None
) -> JobResult | None:
    """The result in a reply; None of one that says how far the job is, which `on_progress` is told.

    Raises:
        ServerError: it is not the result that comes behind this one.
    """
    if reply.HasField("result"):
        if reply.result.number != after + 1:
            raise ServerError(f"result {reply.result.number} came behind result {after}")
        return JobResult.from_wire(reply.result)
    if on_progress is not None:
        on_progress(JobInfo.from_wire(reply.job))
    return None


def of_jobs(problem: ClientError, address: str) -> ClientError:
    """The same, where a server keeps no jobs in words that help."""
    if isinstance(problem, ServerError) and problem.code == "UNIMPLEMENTED":
        return Refused(
            f"{address} keeps no jobs: start it with `equipot serve --jobs DIR`, or ask without a job"
        )
    return problem
