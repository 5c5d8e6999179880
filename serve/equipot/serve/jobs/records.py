"""What is kept of jobs, as plain values. Knows neither SQL nor gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    """Of a job, as it is kept; whether one that is open runs now is its runner's knowledge."""

    RECEIVING = "receiving"
    """Parts of it are still to come."""
    OPEN = "open"
    """Complete, and not all of its structures have come to their end."""
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self in (JobState.DONE, JobState.CANCELLED, JobState.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job.

    Attributes:
        key: by which the store knows it; never used again for another.
        identity: whose it is.
        id: as its owner named it.
        label: by which its owner knows it.
        kind: what is done, as the oneof of `SubmitJobRequest` names it.
        request: that request without structures.
        model: the reference of the bundle that computes it.
        state: of it.
        reason: why it failed.
        created: Unix time.
        changed: Unix time when it was added to or found something.
        ended: Unix time; 0 while it has not.
        size: bytes of room that are set aside for it.
        n_structures: received so far.
        n_atoms: received so far.
        n_done: structures that have come to their end.
        n_failed: of these.
        n_results: the last result's number.
        n_steps: of structures that have come to their end.
    """

    key: int
    identity: str
    id: str
    label: str
    kind: str
    request: bytes
    model: bytes
    state: JobState
    reason: str
    created: float
    changed: float
    ended: float
    size: int
    n_structures: int
    n_atoms: int
    n_done: int
    n_failed: int
    n_results: int
    n_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the first part of a job settles; see `JobRecord`."""

    label: str
    kind: str
    request: bytes
    model: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Some structures of a job, one after the other.

    Attributes:
        first: index of its first structure in the job.
        n_structures: in it.
        n_atoms: in it.
        data: the structures, as the job's kind writes them.
    """

    first: int
    n_structures: int
    n_atoms: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one call adds to a job.

    Attributes:
        start: index of its first structure in the job.
        n_structures: in it.
        n_atoms: in it.
        digest: of all that it holds, to know it again.
        size: bytes of room that it and its results will take.
        pieces: its structures.
        moves: ends of structures that come to nothing.
        last: whether the job is complete with it.
    """

    start: int
    n_structures: int
    n_atoms: int
    digest: bytes
    size: int
    pieces: tuple[Piece, ...]
    moves: tuple[Move, ...]
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What became of one structure since it was last told of.

    Attributes:
        place: its index in the job.
        results: that it has brought, in order.
        walk: where it is on its way, to go on from; None keeps what is known.
        ended: whether it is at its end: it brings nothing more.
        failed: whether that end is a failure.
        steps: that it has taken.
    """

    place: int
    results: tuple[bytes, ...] = ()
    walk: bytes | None = None
    ended: bool = False
    failed: bool = False
    steps: int = 0

    @property
    def goes_elsewhere(self) -> bool:
        """Whether its structure is no longer where it was known to be."""
        return self.ended or self.walk is not None

    @property
    def n_bytes(self) -> int:
        """That it brings."""
        return sum(map(len, self.results)) + len(self.walk or b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much may be kept: of one identity, and of all; see `JobSettings`."""

    identity_jobs: int
    identity_bytes: int
    most_bytes: int


class StoreError(Exception):
    """What is asked of the store cannot be done; the message is for the caller."""


class Unfit(StoreError):
    """A part that does not continue the job it names."""


class NoRoom(StoreError):
    """More than may be kept."""


class StoreFull(StoreError):
    """The disk is full, or cannot be written; later it may be."""


class StoreDamaged(StoreError):
    """What is read is not what was written."""
