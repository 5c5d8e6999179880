"""Carries requests through preparation, queue and engine in one event loop. Knows no gRPC and no torch."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from equipot.model.batch import Graph
from equipot.serve.batcher import Batch, Batcher, Budget
from equipot.serve.engine import Result
from equipot.serve.errors import CallError, DeadlinePassed, DeadlineUnreachable, Fault, QueueFull
from equipot.serve.explain import Estimate, Prepared, estimate, look_at
from equipot.serve.job import Answer, Job, Key, Work
from equipot.serve.metrics import OK, Metrics, ModelCounts
from equipot.serve.pace import Size
from equipot.serve.shares import EQUAL_SHARE, Share
from equipot.wire.v1.codec import Failure

INLINE_ATOMS = 128
"""A request with no more atoms is prepared in the event loop: the hop to a thread would cost as much."""

PREFETCH = 2
"""How many batches of one request may be prepared and wait; the rest of it costs no memory yet."""

ALONE_SECONDS = 0.5
"""So long after calls last met each other, a caller counts as alone."""

ROUND_TRIP = 0.0003
"""Seconds that an answer and the next call take at least on one machine; measured: 0.5 and more."""

AT_ONCE_SECONDS = 0.05
"""A batch of an only caller that takes no longer is computed in the event loop: handing it over to a thread
and back costs two wake-ups, and nobody else waits for the loop but a probe of health."""

HAND_OVER_SECONDS = 0.0005
"""After which one of Python's threads gives way to another that waits. The engine's thread asks for the
interpreter after each operation; by Python's own 0.005 it may wait so long for a loop that is busy."""

PREPARERS = 2
"""Threads that prepare: a second one, so that one slow structure does not hold up everybody's."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """The structures of a request as `Work.prepare` makes them, and the seconds that it took."""

    structures: list[Graph | Fault]
    seconds: float


class Dispatcher:
    """Answers requests with one engine thread. Its methods are called in the event loop that made it."""

    def __init__(
        self,
        budget: Budget,
        metrics: Metrics,
        *,
        in_compute_thread: Callable[[], None],
        share_of: Callable[[str], Share] = lambda identity: EQUAL_SHARE,
    ) -> None:
        """An idle one.

        Args:
            budget: of batches and of the queue; a model's own capacity goes before it.
            metrics: that are told what happens.
            in_compute_thread: called once in the thread that computes.
            share_of: what a client identity may have of the engine.
        """
        # Of the whole process, whose other threads do not mind.
        sys.setswitchinterval(HAND_OVER_SECONDS)
        self._loop = asyncio.get_running_loop()
        self._batcher = Batcher(budget, share_of=share_of, pace=1.0)  # prices are in seconds
        self._metrics = metrics
        metrics.watch_queue(lambda: self._batcher.depth)
        self._jobs: dict[int, Job] = {}
        self._computing = False
        self._computing_edges = 0
        self._together = -ALONE_SECONDS
        self._calls = 0
        self._last_left = -math.inf
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._compute = ThreadPoolExecutor(1, "equipot-compute", initializer=in_compute_thread)
        self._prepare = ThreadPoolExecutor(PREPARERS, "equipot-prepare")

    @property
    def computing(self) -> bool:
        """Whether a batch is in the engine; it cannot be interrupted."""
        return self._computing

    @property
    def open_edges(self) -> int:
        """Edges that wait or are computed, those that open requests still expect to add included."""
        return self._batcher.backlog + self._computing_edges

    async def predict(self, work: Work, ready: Ready | None = None, *, in_company: bool = False) -> Answer:
        """Answers one request; cancelling the call takes it out of the queue.

        Args:
            work: the request.
            ready: its structures, if its caller has prepared them already.
            in_company: whether others are known to ask soon, so that a batch is to leave the loop to them.

        Raises:
            QueueFull: too much waits already.
            DeadlineUnreachable: it could not be answered in time.
            DeadlinePassed: it was not answered in time.
            NotReady: the server stopped before it was answered.
        """
        now = time.monotonic()
        ticket = self._batcher.open(
            work.key,
            now=now,
            expected_edges=_expected_edges(work),
            deadline=work.deadline,
            identity=work.call.identity,
            priority=work.priority,
            terms=work.key.model.capacity.terms,
        )
        job = self._jobs[ticket] = Job(work, in_company=in_company)
        self._quiet.clear()
        try:
            if ready is not None:
                self._accept(ticket, job, 0, ready.structures, ready.seconds)
            elif work.effort <= INLINE_ATOMS:
                self._accept(ticket, job, 0, *_timed_prepare(work, 0, len(work.structures)))
            else:
                await self._feed(ticket, job)
            await job.done
        finally:
            del self._jobs[ticket]
            self._batcher.remove(ticket)
            if not self._jobs:
                self._quiet.set()
        return job.result()

    async def explain(self, work: Work) -> Estimate:
        """What a request would cost; its structures are prepared and nothing is computed.

        Raises:
            CallError: it asks for more than its caller may, as `predict` would say.
        """
        seen: list[Size | Failure] = []
        spent: list[float] = []
        if work.effort <= INLINE_ATOMS:
            prepared, seconds = _timed_prepare(work, 0, len(work.structures))
            work.call.prepared(_edges(prepared))
            seen += look_at(0, prepared)
            spent.append(seconds)
        else:
            for start, stop in work.chunks():
                prepared, seconds = await self._loop.run_in_executor(
                    self._prepare, _timed_prepare, work, start, stop
                )
                work.call.prepared(_edges(prepared))
                seen += look_at(start, prepared)
                spent.append(seconds)
        sizes = [one if isinstance(one, Size) else None for one in seen]
        refusal, wait = "", 0.0
        try:
            wait = self._batcher.check(
                now=time.monotonic(),
                expected_edges=sum(size.edges for size in sizes if size),
                deadline=work.deadline,
                identity=work.call.identity,
                priority=work.priority,
                terms=work.key.model.capacity.terms,
            )
        except (QueueFull, DeadlineUnreachable) as error:
            refusal, wait = error.reason, error.retry_after or 0.0
        return estimate(
            work,
            Prepared(
                sizes=sizes,
                failures=[one for one in seen if isinstance(one, Failure)],
                first_seconds=spent[0] if spent else 0.0,
                seconds=sum(spent),
            ),
            queue_seconds=wait,
            priority=min(work.priority, self._batcher.highest(work.call.identity)),
            refusal=refusal,
        )

    def entered(self) -> None:
        """Notes a call as its handler begins.

        A caller who waits for each answer never has two calls here, and its next one takes a round trip to
        come. A call that begins sooner had been waiting while the loop computed: somebody else's.
        """
        now = time.monotonic()
        self._calls += 1
        if self._calls > 1 or now - self._last_left < ROUND_TRIP:
            self._together = now

    def left(self) -> None:
        """Notes that a call's answer has left."""
        self._calls -= 1
        self._last_left = time.monotonic()

    async def quiet(self) -> None:
        """Returns once no request is open."""
        await self._quiet.wait()

    def abandon(self, error: CallError) -> None:
        """Ends every open request with this error."""
        for job in self._jobs.values():
            job.fail(error)

    def close(self) -> None:
        """Lets the threads go; does not wait for what they do."""
        self._prepare.shutdown(wait=False, cancel_futures=True)
        self._compute.shutdown(wait=False, cancel_futures=True)

    async def _feed(self, ticket: int, job: Job) -> None:
        limit = job.work.key.model.capacity.limit
        for start, stop in job.work.chunks():
            while self._batcher.waiting_edges(ticket) > PREFETCH * limit.edges and not job.done.done():
                job.room.clear()
                await job.room.wait()
            if job.done.done():
                return
            prepared, seconds = await self._loop.run_in_executor(
                self._prepare, _timed_prepare, job.work, start, stop
            )
            self._accept(ticket, job, start, prepared, seconds)

    def _accept(
        self, ticket: int, job: Job, start: int, prepared: list[Graph | Fault], seconds: float
    ) -> None:
        """Queues what was prepared, answers what cannot be computed, and starts the engine if it is idle."""
        counts = self._counts(job.work.key)
        call, now = job.work.call, time.monotonic()
        call.spent("prepare", now - seconds, now, structures=len(prepared))
        call.prepared(_edges(prepared))
        items = []
        job.prepared(seconds)
        for index, graph in enumerate(prepared, start):
            if isinstance(graph, Fault):
                counts.structures_ended(graph.reason)
                if graph.reason == "outside_domain":
                    counts.outside_domain()
                job.answer(index, graph)
            else:
                if job.waits(index, graph):
                    counts.outside_domain()
                items.append((index, graph.n_atoms, graph.n_edges))
        rest = _expected_edges(job.work, from_structure=start + len(prepared))
        self._batcher.add(ticket, items, now=time.monotonic(), expected_edges=rest)
        self._pump()
        counts.prepare_seconds.observe(seconds)

    def _counts(self, key: Key) -> ModelCounts:
        return self._metrics.of(key.model.name, key.model.version)

    def _pump(self) -> None:
        """Starts the next batch if the engine is idle."""
        if self._computing:
            return
        now = time.monotonic()
        for ticket in self._batcher.expire(now):
            self._jobs[ticket].fail(
                DeadlinePassed("the request waited until it could not be answered in time")
            )
        batch = self._batcher.next_batch(now)
        if batch is None:
            return
        graphs = []
        for item in batch.items:
            job = self._jobs[item.ticket]
            graphs.append(job.graphs.pop(item.index))
            job.waited(now - item.arrival)
            job.room.set()
        self._computing, self._computing_edges = True, batch.n_edges
        if self._is_for_an_only_caller(batch, now):
            self._finish(*self._run(batch, graphs, now))
        else:
            self._compute.submit(self._run_elsewhere, batch, graphs, now)

    def _is_for_an_only_caller(self, batch: Batch, now: float) -> bool:
        """Whether nobody else waits for the loop while the batch, all there is to do, takes a moment."""
        key = batch.key
        assert isinstance(key, Key)
        if len(self._jobs) > 1 or self._batcher.backlog or self._jobs[batch.items[0].ticket].in_company:
            return False
        seconds = key.model.capacity.seconds(_size(batch), forces=key.forces, stress=key.stress)
        quick = key.model.engine.at_once and seconds <= AT_ONCE_SECONDS
        return quick and now - self._together >= ALONE_SECONDS

    def _run_elsewhere(self, batch: Batch, graphs: list[Graph], started: float) -> None:
        """In the compute thread: one batch."""
        self._loop.call_soon_threadsafe(self._finish, *self._run(batch, graphs, started))

    def _run(
        self, batch: Batch, graphs: list[Graph], started: float
    ) -> tuple[Batch, Key, list[Result | Fault] | CallError, float, float]:
        key = batch.key
        assert isinstance(key, Key)
        results: list[Result | Fault] | CallError
        begun = time.perf_counter()
        try:
            results = key.model.engine.compute(graphs, forces=key.forces, stress=key.stress)
            assert len(results) == len(graphs)
        except CallError as error:
            results = error
        except Exception:
            logger.exception("the engine of %s failed on a batch of %d", key.model.name, len(graphs))
            fault = Fault("internal", "", "the engine failed", "the server's log has the reason")
            results = [fault] * len(graphs)
        seconds = time.perf_counter() - begun
        return batch, key, results, started, seconds

    def _finish(
        self,
        batch: Batch,
        key: Key,
        results: list[Result | Fault] | CallError,
        started: float,
        seconds: float,
    ) -> None:
        self._computing, self._computing_edges = False, 0
        failed = isinstance(results, CallError) or any(isinstance(result, Fault) for result in results)
        # What failed was refused at once, hung, or was computed again in parts: it tells nothing of the next.
        self._batcher.finished(batch, None if failed else seconds)
        if exhausted := key.model.engine.exhausted:
            limit = key.model.capacity.limit
            if limit.ran_out_of_memory(atoms=exhausted[0], edges=exhausted[1]):
                self._counts(key).out_of_memory()
                logger.warning("%s: batches of %d edges at most from now on", key.model.name, limit.edges)
        # First the next batch: the engine works while the answers are handed out.
        self._pump()
        if isinstance(results, CallError):
            for ticket in {item.ticket for item in batch.items}:
                if job := self._jobs.get(ticket):
                    job.fail(results)
            return
        for ticket in {item.ticket for item in batch.items}:
            if job := self._jobs.get(ticket):
                job.computed(seconds)
                if job.work.call.phases is not None:
                    _note_phases(job, batch, ticket, started, seconds)
        for item, result in zip(batch.items, results, strict=True):
            if job := self._jobs.get(item.ticket):
                job.answer(item.index, result)
        # Once the answers have left: counting is not what callers wait for.
        self._loop.call_soon(self._count, batch, key, results, started, seconds, failed)

    def _count(
        self,
        batch: Batch,
        key: Key,
        results: list[Result | Fault],
        started: float,
        seconds: float,
        failed: bool,
    ) -> None:
        if not failed:
            capacity = key.model.capacity
            capacity.learn(_size(batch), seconds, forces=key.forces, stress=key.stress)
        both = zip(batch.items, results, strict=True)
        answered = [item for item, result in both if isinstance(result, Result)]
        self._counts(key).batch_done(
            outcomes=Counter(result.reason if isinstance(result, Fault) else OK for result in results),
            atoms=sum(item.n_atoms for item in answered),
            edges=sum(item.n_edges for item in answered),
            waits=[started - item.arrival for item in batch.items],
            batch_edges=batch.n_edges,
            fill=batch.fill,
            seconds=seconds,
        )


def _note_phases(job: Job, batch: Batch, ticket: int, started: float, seconds: float) -> None:
    arrival = min(item.arrival for item in batch.items if item.ticket == ticket)
    job.work.call.spent("queue", arrival, started)
    n_structures = len(batch.items)
    job.work.call.spent("compute", started, started + seconds, edges=batch.n_edges, structures=n_structures)


def _size(batch: Batch) -> Size:
    return Size(len(batch.items), batch.n_atoms, batch.n_edges)


def _timed_prepare(work: Work, start: int, stop: int) -> tuple[list[Graph | Fault], float]:
    begun = time.perf_counter()
    prepared = work.prepare(start, stop)
    return prepared, time.perf_counter() - begun


def _edges(prepared: Sequence[Graph | Fault]) -> int:
    return sum(graph.n_edges for graph in prepared if not isinstance(graph, Fault))


def _expected_edges(work: Work, from_structure: int = 0) -> int:
    """What is not prepared yet counts by the neighbours of what was asked for lately."""
    n_atoms = work.offsets[-1] - work.offsets[from_structure]
    return round(n_atoms * work.key.model.capacity.neighbors)
