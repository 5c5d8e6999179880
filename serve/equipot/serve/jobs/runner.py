"""Runs jobs: some structures of each at a time, as requests like any other, in what time others leave.

Knows no SQL and nothing of how structures move: it asks for what is left of a job, and notes what it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field

from equipot.serve.call import Call, enter
from equipot.serve.config import RequestLimits
from equipot.serve.errors import CallError, NotReady, NotServed, OverQuota, QueueFull
from equipot.serve.jobs import kinds
from equipot.serve.jobs.desk import Desk, wait_for
from equipot.serve.jobs.headway import Headway
from equipot.serve.jobs.kinds import Chunk, MoveRequest
from equipot.serve.jobs.records import JobRecord, JobState, Piece, StoreDamaged, StoreError
from equipot.serve.jobs.settings import JobSettings
from equipot.serve.jobs.store import Store
from equipot.serve.jobs.telling import Listener
from equipot.serve.models import ServedModel
from equipot.serve.quotas import Quotas
from equipot.wire.v1 import potential_pb2 as pb

LANES = 2
"""Chunks of one job that move at once: where the last of one are slow, the other's are many."""

CHUNK_BATCHES = 16
"""Of the model's largest batches, that a chunk holds atoms for: the last few structures of many fill none."""

CHUNK_STRUCTURES = 4_096

MOST_IDENTITIES = 64
"""Whose jobs move at once whatever the atoms: each of so many has one chunk at least."""

LOOK_SECONDS = 1.0
"""How often it is looked whether something can be begun."""

RETRY_MODEL = 10.0
"""Between two looks whether a bundle is back that a job waits for."""

RETRY_FAILED = 5.0
MOST_FAILED = 3
"""How often the server may fail on one chunk before its job is given up."""

SWEEP_SECONDS = 60.0

logger = logging.getLogger(__name__)

MoveStructures = Callable[
    [MoveRequest, ServedModel], AsyncGenerator[pb.RelaxReply, None] | AsyncGenerator[pb.SimulateReply, None]
]
"""Answers a request by a model as a caller's."""

FindModel = Callable[[str, str], ServedModel]
"""By a name and whose it is, as a request gives them."""


@dataclass(slots=True, eq=False)
class Run:
    """One open job.

    Attributes:
        record: as it was written last.
        settings: its request, by its bundle's digest.
        model: that computes it, while it is held.
        reason: why it cannot go on now; empty if it can.
        not_before: when to try again, by `time.monotonic`.
        next: first structure that no chunk has had yet; None if there is none left.
        again: first structures of pieces that a chunk gave back.
        peeked: a piece that did not fit into the last chunk.
        chunk_atoms: that a chunk may hold.
        lanes: tasks that move chunks.
        moving: atoms of these.
        structures: of these that have not come to their end.
        headway: how fast these move on.
        failed: times that the server failed on it, one after the other.
        held: keeps its bundle in memory.
    """

    record: JobRecord
    settings: MoveRequest
    model: ServedModel | None = None
    reason: str = ""
    not_before: float = 0.0
    next: int | None = 0
    again: list[int] = field(default_factory=list)
    peeked: Piece | None = None
    chunk_atoms: int = 0
    lanes: set[asyncio.Task[None]] = field(default_factory=set)
    moving: int = 0
    structures: int = 0
    headway: Headway = field(default_factory=Headway)
    failed: int = 0
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def may_begin(self) -> bool:
        """Whether there is a chunk that could begin now."""
        left = self.next is not None or self.peeked is not None or bool(self.again)
        return left and len(self.lanes) < LANES and time.monotonic() >= self.not_before

    @property
    def remaining_seconds(self) -> float:
        """Until it is done at the pace it has had here; 0 if that is not known."""
        return self.headway.remaining_seconds(self.record, kinds.steps_of(self.settings))

    def has_failed(self) -> bool:
        """Notes that the server failed on it; returns whether it is to be given up."""
        self.failed += 1
        self.pause(RETRY_FAILED, "the server failed on it; its log has the reason")
        return self.failed >= MOST_FAILED

    def pause(self, seconds: float, reason: str) -> None:
        """Tries again so much later."""
        self.not_before = time.monotonic() + seconds
        self.reason = reason


class Runner:
    """Goes on with every open job until it has ended, or the server ends.

    Args:
        store: of the jobs.
        settings: of the operator.
        move: answers one request; of what it raises, `CallError` is the request's.
        find: the model of a name.
        quotas: of the identities.
        limits: of requests, which those of jobs keep to, too.
        on_written: told each job when something of it was written.
        on_gone: told the key of each job that is forgotten.

    Attributes:
        desk: where jobs are read and written.
    """

    def __init__(
        self,
        store: Store,
        settings: JobSettings,
        *,
        move: MoveStructures,
        find: FindModel,
        quotas: Quotas,
        limits: RequestLimits,
        on_written: Callable[[JobRecord], None],
        on_gone: Callable[[int], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._move_structures = move
        self._find = find
        self._quotas = quotas
        # Of the atoms that may move here at all, half is left to callers.
        self._moving_atoms = max(1, min(settings.moving_atoms, limits.request_atoms // 2))
        self._chunk_structures = min(CHUNK_STRUCTURES, limits.request_structures)
        self._on_written = on_written
        self._on_gone = on_gone
        self._runs: dict[int, Run] = {}
        self._changed = asyncio.Event()
        self._steering: asyncio.Task[None] | None = None
        self.desk = Desk(store, save_seconds=settings.save_seconds, on_written=self._written)

    async def open(self) -> None:
        """Goes on with what there is."""
        for record in await self.desk.do(self._store.open_jobs):
            self._take(record)
        if self._runs:
            logger.info("going on with %d jobs", len(self._runs))
        self.desk.open()
        self._steering = asyncio.create_task(self._steer())

    def submitted(self, record: JobRecord) -> None:
        """Takes note of a job that may be complete now."""
        if record.state is JobState.OPEN and record.key not in self._runs:
            self._take(record)
            self._changed.set()
        self.desk.changed(record.key)

    def run_of(self, key: int) -> Run | None:
        """How an open job fares."""
        return self._runs.get(key)

    def ahead_of(self, record: JobRecord) -> int:
        """Open jobs of the same identity that were there before."""
        return sum(
            run.record.identity == record.identity and key < record.key for key, run in self._runs.items()
        )

    async def end(self, key: int, state: JobState, reason: str = "") -> JobRecord | None:
        """Stops a job and ends it; what it has found stays.

        Raises:
            StoreError: that cannot be written now.
        """
        run = self._runs.get(key)
        try:
            if run is not None:
                run.pause(math.inf, reason)
                await _stopped(run.lanes)
                self.desk.forget(key)
                await self.desk.write()
            record = await self.desk.do(self._store.end, key, state, reason)
        except StoreError as error:
            if run is not None:
                run.pause(RETRY_FAILED, str(error))
            raise
        if record is not None:
            self._written(record)
        self._drop(key)
        self.desk.changed(key)
        return record

    async def delete(self, key: int) -> None:
        """Stops a job and forgets it.

        Raises:
            StoreError: that cannot be written now.
        """
        run = self._runs.get(key)
        if run is not None:
            run.pause(math.inf, "it is being deleted")
            await _stopped(run.lanes)
            self.desk.forget(key)
        try:
            await self.desk.do(self._store.delete, key)
        except StoreError as error:
            if run is not None:
                run.pause(RETRY_FAILED, str(error))
            raise
        self._drop(key)
        self._on_gone(key)
        self.desk.changed(key)

    async def close(self) -> None:
        """Stops everything where it is, to be gone on with at the next start."""
        await _stopped({self._steering} if self._steering is not None else set())
        for run in self._runs.values():
            await _stopped(run.lanes)
            run.held.close()
        self.desk.wake_all()
        await self.desk.close()

    def _take(self, record: JobRecord) -> None:
        model = pb.ModelReference.FromString(record.model)
        settings = kinds.REQUESTS[record.kind].FromString(record.request)
        settings.model = f"{model.name}@{model.digest}"
        settings.level_of_theory = model.level_of_theory
        settings.session = record.id
        settings.token_every = kinds.TOKEN_STEPS
        self._runs[record.key] = Run(record, settings)

    def _drop(self, key: int) -> None:
        run = self._runs.pop(key, None)
        if run is not None:
            run.held.close()

    def _written(self, record: JobRecord) -> None:
        run = self._runs.get(record.key)
        if run is not None:
            run.record = record
            if record.state.ended:
                self._drop(record.key)
        self._on_written(record)

    async def _steer(self) -> None:
        swept = -math.inf
        while True:
            self._changed.clear()
            try:
                while (run := self._next_run()) is not None:
                    await self._begin(run)
                if time.monotonic() - swept > SWEEP_SECONDS:
                    swept = time.monotonic()
                    await self._sweep()
            except StoreError as error:
                logger.error("jobs stand still: %s", error)
            await wait_for(self._changed, LOOK_SECONDS)

    async def _sweep(self) -> None:
        limits = self._settings
        for record in await self.desk.do(
            self._store.sweep, keep_seconds=limits.keep_seconds, most_bytes=limits.most_bytes
        ):
            self._on_gone(record.key)
            self.desk.changed(record.key)
        for key, run in list(self._runs.items()):
            idle = time.time() - run.record.changed
            if run.reason and not run.lanes and idle > limits.keep_seconds:
                await self.end(
                    key, JobState.FAILED, f"given up after {limits.keep_days:g} days: {run.reason}"
                )

    def _next_run(self) -> Run | None:
        """Whose turn it is: of the identity that has least for its weight, the job that has least."""
        if self.desk.problem:
            return None
        of_identity: dict[str, int] = {}
        for run in self._runs.values():
            if run.lanes:
                identity = run.record.identity
                of_identity[identity] = of_identity.get(identity, 0) + run.moving
        able = [run for run in self._runs.values() if run.may_begin]
        if sum(of_identity.values()) >= self._moving_atoms:
            able = [run for run in able if run.record.identity not in of_identity]
            if len(of_identity) >= MOST_IDENTITIES:
                return None

        def has(run: Run) -> tuple[float, int, int]:
            identity = run.record.identity
            weight = self._quotas.share_of(identity).weight
            return of_identity.get(identity, 0) / weight, run.moving, run.record.key

        return min(able, key=has, default=None)

    async def _begin(self, run: Run) -> None:
        """Starts the next chunk of a job, if its bundle is there."""
        key = run.record.key
        if not run.lanes:
            run.held.close()
            try:
                run.model = model = self._find(run.settings.model, run.record.id)
            except CallError as error:
                wait = error.retry_after if isinstance(error, NotReady) else RETRY_MODEL
                run.pause(wait or RETRY_MODEL, error.message)
                return
            run.held.enter_context(model.in_use())
            run.chunk_atoms = self._chunk_atoms(run, model)
        try:
            chunk = await self._load(run)
        except StoreDamaged as error:
            await self.end(key, JobState.FAILED, str(error))
            return
        except StoreError:
            raise
        except Exception:
            # One job that cannot be read must not hold up the others.
            logger.exception("job %s cannot be gone on with", run.record.id)
            if run.has_failed():
                await self.end(key, JobState.FAILED, run.reason)
            return
        if chunk is None:
            return
        if self._runs.get(key) is not run or time.monotonic() < run.not_before:
            # It was ended, or cannot go on now, while its structures were read.
            run.again.extend(chunk.firsts)
            return
        run.reason = ""
        run.headway.begins(run.record, chunk.fresh)
        run.moving += chunk.n_atoms
        run.structures += len(chunk.places)
        assert run.model is not None
        lane = asyncio.create_task(self._move(run, chunk, run.model))
        run.lanes.add(lane)
        lane.add_done_callback(run.lanes.discard)

    def _chunk_atoms(self, run: Run, model: ServedModel) -> int:
        batch = model.capacity.limit.edges / max(1.0, model.card.mean_neighbors)
        allowed = self._quotas.allowance(run.record.identity).request_atoms or math.inf
        return int(min(CHUNK_BATCHES * batch, self._moving_atoms // LANES, allowed))

    async def _load(self, run: Run) -> Chunk | None:
        """The next structures of a job that have not come to their end; None if there are none."""
        key, pieces = run.record.key, list[Piece]()
        ended: set[int] = set()
        ways: dict[int, bytes] = {}
        atoms = structures = 0
        taken: list[int] = []
        # What a chunk gives back while this waits is not written yet, and comes the next time.
        again, run.again = run.again, []
        try:
            if again:
                # What is known of them is read, so it must have been written.
                await self.desk.write(ways=True)
            while (piece := await self._next_piece(run, again)) is not None:
                atoms, structures = atoms + piece.n_atoms, structures + piece.n_structures
                if pieces and (atoms > run.chunk_atoms or structures > self._chunk_structures):
                    run.peeked = piece
                    break
                taken.append(piece.first)
                at_end = await self.desk.do(self._store.ends, key, piece)
                if len(at_end) < piece.n_structures:
                    ended |= at_end
                    # Frames come on the way: what began anew would bring them twice.
                    needed = isinstance(run.settings, pb.SimulateRequest)
                    ways.update(await self.desk.do(self._store.walks, key, piece, needed=needed))
                    pieces.append(piece)
            if not pieces:
                return None
            return await asyncio.to_thread(kinds.chunk_of, run.settings, pieces, ended, ways)
        except BaseException:
            run.again.extend(taken)
            raise
        finally:
            run.again.extend(again)

    async def _next_piece(self, run: Run, again: list[int]) -> Piece | None:
        piece: Piece | None = None
        if run.peeked is not None:
            piece, run.peeked = run.peeked, None
        elif again:
            piece = await self.desk.do(self._store.next_piece, run.record.key, again[0])
            del again[0]
        elif run.next is not None:
            piece = await self.desk.do(self._store.next_piece, run.record.key, run.next)
            run.next = None if piece is None else piece.first + piece.n_structures
        return piece

    async def _move(self, run: Run, chunk: Chunk, model: ServedModel) -> None:
        """Moves a chunk to its end, or gives back what is left of it."""
        record = run.record
        account = self._quotas.account(record.identity, now=time.monotonic())
        call = Call(method="job", request_id=record.id, identity=record.identity, account=account)
        call.model = model.name
        enter(call)
        left, failure, listener = set(chunk.places), "", Listener(chunk)
        try:
            async with aclosing(self._move_structures(chunk.request, model)) as replies:
                async for reply in replies:
                    move = listener.move_of(reply)
                    if move is None:
                        continue
                    run.headway.moved(move.place, move.steps)
                    if move.ended:
                        left.discard(move.place)
                        run.structures -= 1
                        run.headway.steps.pop(move.place, None)
                    await self.desk.note(record.key, move)
                    run.failed = 0
        except (NotReady, QueueFull, OverQuota) as error:
            run.pause(error.retry_after or RETRY_FAILED, error.message)
        except NotServed as error:
            run.pause(RETRY_MODEL, error.message)
        except CallError as error:
            failure = error.message
        except Exception:
            logger.exception("job %s failed on %d structures", record.id, len(chunk.places))
            if run.has_failed():
                failure = run.reason
        finally:
            run.moving -= chunk.n_atoms
            run.structures -= len(left)
            for place in left:
                run.headway.steps.pop(place, None)
            if left:
                run.again.extend(chunk.firsts)
            self._changed.set()
        if failure:
            await self._give_up(record.key, failure)

    async def _give_up(self, key: int, reason: str) -> None:
        run = self._runs.get(key)
        this = asyncio.current_task()
        if run is not None and this is not None:
            run.lanes.discard(this)
        with contextlib.suppress(StoreError):
            await self.end(key, JobState.FAILED, reason)


async def _stopped(tasks: set[asyncio.Task[None]]) -> None:
    there = [task for task in tasks if task is not asyncio.current_task()]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)
