"""Makes the batches of the next steps while the present one computes. Knows no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from equipot.train.dataset import Batch, Dataset
from equipot.train.sampler import Sampler
from equipot.train.world import World

_BYTES_AHEAD = 2**28


@dataclass(frozen=True, slots=True)
class StepBatches:
    """This rank's micro-batches of one step."""

    step: int
    batches: list[Batch]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(batch.nbytes for batch in self.batches)


class Loader:
    """Yields this rank's micro-batches from a step on; background threads stay a few steps ahead.

    A step's batches depend on its number alone, so what was made ahead and not used costs nothing but its
    time: a resumed run begins at its step and has the same batches. Threads, because what costs time in them
    (neighbour lists, copies) lets go of the interpreter, and a batch made in another process would have to be
    carried over. Use as a context manager: leaving it ends the threads.

    Args:
        dataset: makes the batches.
        sampler: says of which structures.
        world: whose rank's share is made.
        accumulation: micro-batches of a step.
        first_step: where to begin.
        steps: where to end: the number of the first step that is not made.
        workers: threads; one keeps up with a training on CPUs. With 0 a batch is made when it is asked for:
            where threads share the processor with the step, handing over costs more than a small batch.
        bytes_ahead: what waits to be used is not added to once it takes so many bytes.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        world: World,
        *,
        accumulation: int,
        first_step: int,
        steps: int,
        workers: int = 1,
        bytes_ahead: int = _BYTES_AHEAD,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._world = world
        self._accumulation = accumulation
        self._range = range(first_step, steps)
        self._depth = workers + 1
        self._bytes_ahead = bytes_ahead
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._largest = 0

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[StepBatches]:
        if self._threads is None:
            return map(self._make, self._range)
        return self._made_ahead(self._threads)

    def _made_ahead(self, threads: ThreadPoolExecutor) -> Iterator[StepBatches]:
        remaining = iter(self._range)
        waiting: deque[Future[StepBatches]] = deque()
        self._add(threads, waiting, remaining)
        while waiting:
            made = waiting.popleft().result()  # raises what the thread met, where the batch is used
            self._largest = max(self._largest, made.nbytes)
            self._add(threads, waiting, remaining)
            yield made

    def _add(
        self, threads: ThreadPoolExecutor, waiting: deque[Future[StepBatches]], remaining: Iterator[int]
    ) -> None:
        while len(waiting) < self._depth:
            # one always; more when it is known how large they are
            room = self._bytes_ahead // self._largest if self._largest else 1
            if waiting and len(waiting) >= room:
                return
            step = next(remaining, None)
            if step is None:
                return
            waiting.append(threads.submit(self._make, step))

    def _make(self, step: int) -> StepBatches:
        made = []
        for part in self._sampler.micro_batches(
            step, rank=self._world.rank, ranks=self._world.size, accumulation=self._accumulation
        ):
            batch = self._dataset.batch(part.keys, device=self._world.device)
            made.append(batch if part.counts else batch.without_labels())
        return StepBatches(step, made)
