"""What a server says of jobs, as plain values. No gRPC calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from equipot.client.batches import Priority
from equipot.client.dynamics import Ended, MotionFrame, Observation, ended_of, frame_of, observation_of
from equipot.client.errors import JobFailed, ServerError
from equipot.client.relax import Relaxed, relaxed_of
from equipot.client.results import ModelReference
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import BoolArray, Int32Array

JobState = Literal["receiving", "queued", "running", "waiting", "done", "cancelled", "failed", "unknown"]

_STATES: Mapping[int, JobState] = MappingProxyType(
    {
        jpb.JOB_STATE_RECEIVING: "receiving",
        jpb.JOB_STATE_QUEUED: "queued",
        jpb.JOB_STATE_RUNNING: "running",
        jpb.JOB_STATE_WAITING: "waiting",
        jpb.JOB_STATE_DONE: "done",
        jpb.JOB_STATE_CANCELLED: "cancelled",
        jpb.JOB_STATE_FAILED: "failed",
    }
)
_PRIORITIES: Mapping[int, Priority] = MappingProxyType({pb.PRIORITY_LOW: "low", pb.PRIORITY_HIGH: "high"})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """How far a job is.

    Attributes:
        id: by which its owner asks for it.
        label: what its owner calls it.
        kind: what is done: "relax" or "simulate".
        state: "receiving" (parts are still to come), "queued", "running", "waiting" (it cannot go on now),
            "done", "cancelled" or "failed".
        reason: why it waits or failed.
        model: that computes it, whatever is deployed meanwhile.
        priority: that it has among everybody's work.
        n_structures: in it.
        n_atoms: in it.
        n_done: structures that have come to their end, those that failed included.
        n_failed: of these.
        n_moving: structures that move now.
        n_results: that may be fetched.
        n_steps: of all structures that have come to their end.
        n_ahead: jobs of the same owner that are before it.
        remaining_seconds: until it is done, at the pace it has had; None if that is not known.
        created: Unix time.
        ended: Unix time; None if it has not.
        expires: Unix time at which the server forgets it; None while it has not ended.
        bytes: that it takes of the server's room.
        n_steps_moving: steps that structures which move now have taken, as far as the server knows.
        n_steps_asked: steps of all structures if none fails, of dynamics; None if that is not known before.
        warnings: what looks wrong of what was submitted last, and is done all the same; not told later.
        timestep: fs, of dynamics; None of what has none.
    """

    id: str
    label: str
    kind: str
    state: JobState
    reason: str
    model: ModelReference
    priority: Priority
    n_structures: int
    n_atoms: int
    n_done: int
    n_failed: int
    n_moving: int
    n_results: int
    n_steps: int
    n_ahead: int
    remaining_seconds: float | None
    created: float
    ended: float | None
    expires: float | None
    bytes: int
    n_steps_moving: int
    n_steps_asked: int | None
    warnings: tuple[str, ...]
    timestep: float | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in ("done", "cancelled", "failed")

    def raise_for_failure(self) -> None:
        """Raises JobFailed if it was given up or cancelled: some of its structures have no result then."""
        if self.state in ("failed", "cancelled"):
            raise JobFailed(f"job {self.id} {self.state}{': ' if self.reason else ''}{self.reason}")

    @staticmethod
    def from_wire(message: jpb.Job) -> JobInfo:
        """The job in a reply."""
        return JobInfo(
            id=message.id,
            label=message.label,
            kind=message.kind,
            state=_STATES.get(message.state, "unknown"),
            reason=message.reason,
            model=ModelReference.from_wire(message.model),
            priority=_PRIORITIES.get(message.priority, "normal"),
            n_structures=message.n_structures,
            n_atoms=message.n_atoms,
            n_done=message.n_done,
            n_failed=message.n_failed,
            n_moving=message.n_moving,
            n_results=message.n_results,
            n_steps=message.n_steps,
            n_ahead=message.n_ahead,
            remaining_seconds=message.remaining_seconds or None,
            created=message.created,
            ended=message.ended or None,
            expires=message.expires or None,
            bytes=message.bytes,
            n_steps_moving=message.n_steps_moving,
            n_steps_asked=message.n_steps_asked or None,
            warnings=tuple(message.warnings),
            timestep=message.timestep or None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class JobResult:
    """What became of one structure of a job, or of dynamics one of its steps or its end.

    Attributes:
        number: 1, 2, …: in the order in which results came; it never changes.
        index: the structure's, in the job.
        atomic_numbers: (n,) int32; of no atoms if the structure was refused before it was sent, and with an
            observation.
        pbc: (3,) bool.
        found: where it came to rest; of dynamics a frame, an observation, or how it ended.
    """

    number: int
    index: int
    atomic_numbers: Int32Array
    pbc: BoolArray
    found: Relaxed | MotionFrame | Observation | Ended

    @property
    def relaxed(self) -> Relaxed:
        """Where it came to rest.

        Raises:
            TypeError: the job is none of relaxations.
        """
        if not isinstance(self.found, Relaxed):
            raise TypeError(f"result {self.number} is a {type(self.found).__name__}: look at `found`")
        return self.found

    @staticmethod
    def from_wire(message: jpb.JobResult) -> JobResult:
        """The result in a reply.

        Raises:
            ServerError: it does not fit together.
        """
        numbers = np.frombuffer(message.atomic_numbers, dtype="<i4").astype(np.int32)
        pbc = np.frombuffer(message.pbc or bytes(3), dtype=np.uint8).astype(np.bool_)
        return JobResult(
            message.number,
            message.index,
            numbers,
            pbc,
            _found(message, len(numbers)),
        )


def _found(message: jpb.JobResult, n_atoms: int) -> Relaxed | MotionFrame | Observation | Ended:
    match message.WhichOneof("kind"):
        case "relaxed":
            return relaxed_of(message.relaxed, n_atoms, message.index)
        case "frame":
            return frame_of(message.frame, n_atoms)
        case "observation":
            return observation_of(message.observation)
        case "simulated":
            return ended_of(message.simulated, n_atoms, message.index, message.seed)
    raise ServerError(f"result {message.number} is of a kind that this client does not know: renew it")
