"""Makes the batches of the next steps while the present one computes. Knows no model."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from equipot.train.dataset import Batch, Dataset
from equipot.train.sampler import Sampler
from equipot.train.world import World

_AHEAD = 2  # batches are small beside a model's activations, and two hide the time of making one


@dataclass(frozen=True, slots=True)
class StepBatches:
    """This rank's micro-batches of one step."""

    step: int
    batches: list[Batch]


class Loader:
    """Yields this rank's micro-batches from a step on; a background thread stays a few steps ahead.

    Use as a context manager: leaving it ends the thread.
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
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._world = world
        self._accumulation = accumulation
        self._range = range(first_step, steps)
        self._queue: queue.Queue[StepBatches | Exception] = queue.Queue(maxsize=_AHEAD)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)

    def __enter__(self) -> Loader:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # a producer waiting for room must see that it is to end
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def __iter__(self) -> Iterator[StepBatches]:
        for _ in self._range:
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def _produce(self) -> None:
        try:
            for step in self._range:
                if self._ending.is_set():
                    return
                self._queue.put(StepBatches(step, self._make(step)))
        except Exception as error:  # raised again where the batches are used
            self._queue.put(error)

    def _make(self, step: int) -> list[Batch]:
        parts = self._sampler.micro_batches(
            step, rank=self._world.rank, ranks=self._world.size, accumulation=self._accumulation
        )
        return [self._dataset.batch(keys, device=self._world.device) for keys in parts]
