"""A store held by the nodes of a Ray cluster, for data larger than one node's memory.

The store is cut into blocks of consecutive structures, dealt to the nodes in turns. On each node an actor,
the owner of its blocks, puts them into Ray's object store: shared memory, from where Ray spills to the node's
local disks what does not fit. A reader asks each owner for all structures it wants from it in one call, so
what crosses the network is structures and not blocks. Where a node is lost, Ray starts its owner again on
another, which reads the blocks from the source as they are asked for. The only module of training that
imports ray.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from equipot.train.arrays import PER_ATOM, PER_STRUCTURE
from equipot.train.errors import DataError
from equipot.train.manifest import Manifest
from equipot.train.storage.base import Arrays, Storage
from equipot.train.storage.fetched import Fetched
from equipot.train.structures import PER_ATOM_NAMES, PER_STRUCTURE_NAMES, Structures

_NAMESPACE = "equipot"
_BLOCK_BYTES = 4 * 2**20
"""Small, as a spilled block is restored whole for one structure; large enough that a terabyte has no more
blocks than Ray counts with ease."""
_TOGETHER = 8
"""Blocks a call brings back from disk at once: several in the time of one, and they must fit into memory."""
_CONCURRENT = 4
_ATTEMPTS = 3
_PATIENCE_SECONDS = 300.0


class Blocks:
    """How a store is cut into blocks of structures: arithmetic that reader and owners share."""

    def __init__(self, manifest: Manifest) -> None:
        self._structures = np.array([entry.structures for entry in manifest.shards], dtype=np.int64)
        row = sum(PER_STRUCTURE[name].row_bytes for name in PER_STRUCTURE_NAMES)
        atom = sum(PER_ATOM[name].row_bytes for name in PER_ATOM_NAMES)
        sizes = [
            row + atom * entry.atoms / entry.structures if entry.structures else row
            for entry in manifest.shards
        ]
        self._per_block = np.array([max(1, int(_BLOCK_BYTES / size)) for size in sizes], dtype=np.int64)
        counts = -(-self._structures // self._per_block)
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the block of each of these structures (n, 2), shard and row."""
        shards, rows = places.T
        block: NDArray[np.int64] = self._first[shards] + rows // self._per_block[shards]
        return block

    def span(self, block: int) -> tuple[int, int, int]:
        """Shard, first row and the row after the last of a block."""
        shard = int(np.searchsorted(self._first, block, side="right")) - 1
        start = (block - int(self._first[shard])) * int(self._per_block[shard])
        return shard, start, min(start + int(self._per_block[shard]), int(self._structures[shard]))


class RayStore:
    """The arrays of a store, structures from the cluster's nodes; a `Storage`.

    Whole columns, which are read once and in order, come from the source.
    """

    def __init__(self, folder: Path, manifest: Manifest, source: Storage) -> None:
        """Joins the cluster, and has owners begin to load the store unless they hold it already.

        Raises:
            DataError: no Ray cluster can be reached.
        """
        self._folder = folder
        self._digest = manifest.digest
        self._source = source
        self._process = os.getpid()
        self._blocks = Blocks(manifest)
        _join(folder)
        nodes = (node for node in ray.nodes() if node["Alive"])
        self._nodes = sorted(
            str(node["NodeID"]) for node in nodes if node["Resources"].get("object_store_memory")
        )
        self._owners = [self._owner(slot) for slot in range(len(self._nodes))]
        self._fetched = Fetched(self.gather, [entry.structures for entry in manifest.shards])

    def check(self) -> None:
        """Compares the sizes of the source's files."""
        self._source.check()

    def find(self, shard: int, row: int) -> tuple[Arrays, int]:
        """Asks the owner, or has it."""
        return self._fetched.find(shard, row)

    def gather(self, places: NDArray[np.int64]) -> Structures:
        """Asks each owner once."""
        if os.getpid() != self._process:
            raise DataError(f"ray:{self._folder}: a connection to Ray does not survive a fork; open it anew")
        slots = self._blocks.of(places) % len(self._nodes)
        wanted = {int(slot): np.flatnonzero(slots == slot) for slot in np.unique(slots)}
        calls = {slot: places[rows] for slot, rows in wanted.items()}
        order = np.argsort(np.concatenate(list(wanted.values())))
        # copied by take: an answer that is held would keep its place in the node's shared memory
        return Structures.joined(self._answers(calls)).take(order)

    def rows(self, shard: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Read from the source."""
        return self._source.rows(shard, name, start, stop)

    def take(self, shard: int, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Read from the source."""
        return self._source.take(shard, name, rows)

    def _owner(self, slot: int) -> Any:  # noqa: ANN401 - ray's handles have no type
        """The owner of every len(nodes)-th block from `slot` on, in its place; made if there is none."""
        return (
            ray.remote(Owner)
            .options(
                name=f"{self._digest}:{slot}/{len(self._nodes)}",
                namespace=_NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=_CONCURRENT,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._nodes[slot], soft=True),
            )
            .remote(str(self._folder), self._digest, slot, len(self._nodes))
        )

    def _answers(self, calls: dict[int, NDArray[np.int64]]) -> list[Structures]:
        for _ in range(_ATTEMPTS):
            try:
                return self._ask(calls)
            except RayActorError as error:
                last = _line(error)
                for slot in calls:  # the run that had made an owner may be over, and its owners with it
                    self._owners[slot] = self._owner(slot)
        raise DataError(
            f"ray:{self._folder}: the processes that hold it on the nodes end at once ({last}); is equipot "
            "installed on every node?"
        )

    def _ask(self, calls: dict[int, NDArray[np.int64]]) -> list[Structures]:
        try:
            promised = [self._owners[slot].fetch.remote(places) for slot, places in calls.items()]
            answers: list[Structures] = ray.get(promised, timeout=_PATIENCE_SECONDS)
        except RayActorError:
            raise
        except GetTimeoutError:
            raise DataError(
                f"ray:{self._folder}: no answer within {_PATIENCE_SECONDS:.0f} s; see `ray status`"
            ) from None
        except RayTaskError as error:
            if isinstance(error.cause, DataError):
                raise error.cause from None
            if isinstance(error.cause, RayError):
                raise DataError(f"ray:{self._folder}: {_line(error.cause)}") from None
            raise
        except RayError as error:
            raise DataError(f"ray:{self._folder}: {_line(error)}") from None
        return answers


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Owner:
    """An actor that holds every `slots`-th block of a store from `slot` on in its node's object store."""

    def __init__(self, folder: str, digest: str, slot: int, slots: int) -> None:
        self._folder, self._digest = folder, digest
        self._source: tuple[Storage, Blocks] | None = None
        self._held: dict[int, ray.ObjectRef[Structures]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._fill, args=(slot, slots), name="fill", daemon=True).start()

    def fetch(self, places: NDArray[np.int64]) -> Structures:
        """These structures (n, 2), each shard and row, which must ascend."""
        _, blocks = self._open()
        of = blocks.of(places)
        wanted = np.unique(of).tolist()
        parts = []
        for at in range(0, len(wanted), _TOGETHER):
            some = wanted[at : at + _TOGETHER]
            for block, held in zip(some, ray.get([self._block(block) for block in some]), strict=True):
                parts.append(held.take(places[of == block, 1] - blocks.span(block)[1]))
            del held  # what is held in shared memory cannot make room for the next
        return Structures.joined(parts)

    def _open(self) -> tuple[Storage, Blocks]:
        with self._lock:
            if self._source is None:
                # here and not above: opening is what knows this module
                from equipot.train.storage.opening import open_storage

                _, manifest, storage = open_storage(self._folder)
                if manifest.digest != self._digest:
                    node = ray.util.get_node_ip_address()
                    raise DataError(f"{self._folder}: is another store on {node} than where it was opened")
                self._source = storage, Blocks(manifest)
            return self._source

    def _block(self, block: int) -> "ray.ObjectRef[Structures]":
        storage, blocks = self._open()
        with self._lock:
            if block not in self._held:
                shard, start, stop = blocks.span(block)
                places = np.stack([np.full(stop - start, shard), np.arange(start, stop)], axis=1)
                self._held[block] = ray.put(storage.gather(places))
            return self._held[block]

    def _fill(self, slot: int, slots: int) -> None:
        try:
            for block in range(slot, len(self._open()[1]), slots):
                self._block(block)
        except (DataError, RayError):
            return  # whoever asks for a block meets it, and is told


def _join(folder: Path) -> None:
    """Connects this process to the Ray cluster of its node, unless it is.

    Raises:
        DataError: there is none.
    """
    if ray.is_initialized():
        return
    with _signals_kept():
        try:
            ray.init(
                address="auto",
                namespace=_NAMESPACE,
                log_to_driver=False,
                logging_level="error",
            )
        except ConnectionError:
            raise DataError(
                f"ray:{folder}: no Ray cluster runs on this node; start it with `ray start --head`, "
                "and on the other nodes with `ray start --address=…`"
            ) from None


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; a run saves a checkpoint on it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
