"""Writes a packed store so that a kill at any moment loses at most the frames since the last commit.

Order of a commit: arrays are appended and synced, then the journal is replaced. What lies behind the rows
that the journal (or, without one, the manifest) counts is cut off by the next append. The manifest comes
last, when the import is done, so a store that is being added to stays readable as it was. Where blocks and
commits begin and end leaves no trace in the bytes. Knows no files.
"""

import copy
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from equipot.train.arrays import OFFSETS, append_rows, per_atom, per_structure, sync
from equipot.train.block import Block
from equipot.train.errors import DataError
from equipot.train.manifest import Manifest, ShardEntry, content_digest, read_json, write_json
from equipot.train.rejected_file import NAME as REJECTED
from equipot.train.rejected_file import RejectedFile
from equipot.train.storage.memory_map import SHARDS
from equipot.train.storage.opening import JOURNAL, MANIFEST
from equipot.train.store import Store, chained, link

SHARD_STRUCTURES = 2**20
SHARD_ATOMS = 2**25
"""A shard is closed at either limit. Few large ones: each of its 13 arrays takes the reader a file handle."""
FLUSH_STRUCTURES = 4096
FLUSH_ATOMS = 2**18
"""Frames held in memory at most."""
COMMIT_SECONDS, COMMIT_SHARE = 2.0, 0.04
"""Time between two commits, and the share of the time that commits may take: a journal that names many files
takes longer to write, and is then written less often."""
_UNIQUE_AT_ONCE = 2**22


class StoreWriter:
    """One import into one store; a context manager that holds the store's lock.

    Attributes:
        path: the store's folder.
        committed: manifest of the finished store that is being added to, or None.
        manifest: the store as it will be, brought up to date by every `add`.
        cursor: where to go on reading after the last commit, as JSON types.
        resumed: whether a killed import is being continued.
    """

    def __init__(self, path: Path, fresh: Manifest, *, commit_structures: int | None = None) -> None:
        """Locks the folder, which is made if need be.

        Args:
            path: folder of the store.
            fresh: manifest of the store if it has to be created.
            commit_structures: frames between two commits; by default commits go by the clock.

        Raises:
            DataError: not a store; another import is running; another level of theory or licence.
        """
        self.path = path
        self.manifest = fresh
        self.cursor: dict[str, Any] = {}
        self.resumed = False
        self._commit_structures = commit_structures
        self._next_commit = 0.0
        self._uncommitted = 0
        self._pending: list[Block] = []
        self._pending_structures = self._pending_atoms = 0
        self._unsynced: set[Path] = set()
        self._rejected = RejectedFile(path)
        self._plan: dict[str, Any] = {}
        self._chain = b""
        if path.exists() and not path.is_dir():
            raise DataError(f"{path}: is a file, not a store; give another --out")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.committed = self._look(fresh)
        except BlockingIOError:
            os.close(self._lock)
            raise DataError(f"{path}: another import into this store is running; wait for it") from None
        except BaseException:
            os.close(self._lock)
            raise

    def _look(self, fresh: Manifest) -> Manifest | None:
        journal = self.path / JOURNAL
        if not (self.path / MANIFEST).exists():
            begun = (f"{JOURNAL}.part", REJECTED)  # all that a kill in the very first or last step leaves
            if not journal.exists() and any(entry.name not in begun for entry in self.path.iterdir()):
                raise DataError(
                    f"{self.path}: holds other files and is no store; give an empty or a new folder as --out"
                )
            return None
        committed = Store.open(self.path).manifest
        if journal.exists() and read_json(journal)["manifest"]["chain"] == committed.chain:
            journal.unlink()  # killed after the last step but this one
        for what in ("level_of_theory", "licence"):
            ours, theirs = getattr(fresh, what), getattr(committed, what)
            if ours != theirs:
                raise DataError(
                    f"{self.path}: holds data of {what.replace('_', ' ')} {theirs!r}, not {ours!r}; if "
                    f"that is the same, say --{what.replace('_', '-')} {theirs!r}, else give another --out"
                )
        return committed

    def start(self, plan: Mapping[str, Any], cursor: Mapping[str, Any]) -> None:
        """Takes a killed import up again, or begins one.

        Args:
            plan: what is imported and how, as JSON types; only the same plan is taken up again. "files" in it
                says which files, in words.
            cursor: where to begin reading if nothing is committed.

        Raises:
            DataError: an import with another plan lies unfinished.
        """
        self._plan = json.loads(json.dumps(plan))
        journal = self.path / JOURNAL
        if journal.exists():
            body = read_json(journal)
            if body.get("plan") != self._plan:
                theirs = body.get("plan", {}).get("files", "files")
                raise DataError(
                    f"{self.path}: an import of {theirs} lies unfinished, with other files or options than "
                    f"these; finish it with its own command, or drop it: rm -r {self.dropped}"
                )
            self.manifest = Manifest.from_json(body["manifest"], journal)
            self.cursor = body["cursor"]
            self.resumed = True
            self._chain = bytes.fromhex(self.manifest.chain)
            self._rejected.start(self.manifest.rejected_bytes)
            return
        if self.committed is not None:
            self.manifest = copy.deepcopy(self.committed)
            self._chain = bytes.fromhex(self.manifest.chain)
        self._rejected.start(self.manifest.rejected_bytes)
        self.commit(cursor)

    @property
    def dropped(self) -> Path:
        """What to remove to be rid of an unfinished import."""
        return self.path if self.committed is None else self.path / JOURNAL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def add(self, block: Block, source: int) -> None:
        """Adds a block of frames of a source, by its place in the manifest; on disk after the next commit."""
        entry = self.manifest.sources[source]
        entry.frames_read += len(block) + len(block.rejected)
        entry.frames_kept += len(block)
        for item in block.rejected:
            self.manifest.reject(item.reason.value, source, item.index, item.detail)
            self._rejected.add(entry.file, item)
        for frame, code, detail in block.notes:
            self.manifest.note(code, source, frame, detail)
        self._count(block)
        self._uncommitted += len(block) + len(block.rejected)
        block.structures["source"] = np.full(len(block), source, dtype=per_structure(())["source"].dtype)
        for part in self._by_shard(block):
            self._chain_up(part)
            self._pending.append(part)
            self._pending_structures += len(part)
            self._pending_atoms += int(part.n_atoms.sum())
        if self._pending_structures >= FLUSH_STRUCTURES or self._pending_atoms >= FLUSH_ATOMS:
            self._flush()

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        if self._commit_structures is not None:
            return self._uncommitted >= self._commit_structures
        return self._uncommitted > 0 and time.monotonic() >= self._next_commit

    def _by_shard(self, block: Block) -> Iterator[Block]:
        """Cuts a block where a shard is full, as if its frames came one by one, and counts them."""
        shards = self.manifest.shards
        at = 0
        while at < len(block):
            last = shards[-1] if shards else None
            room = 0
            if last is not None:
                fit = int(np.searchsorted(np.cumsum(block.n_atoms[at:]), SHARD_ATOMS - last.atoms, "right"))
                room = min(fit, SHARD_STRUCTURES - last.structures)
                if last.structures == 0:
                    room = max(room, 1)
            if last is None or room <= 0:
                self._flush()
                shards.append(ShardEntry(name=f"{len(shards):05d}"))
                continue
            stop = min(at + room, len(block))
            part = block if stop - at == len(block) else block.part(at, stop)
            last.structures += len(part)
            last.atoms += int(part.n_atoms.sum())
            yield part
            at = stop

    def _count(self, block: Block) -> None:
        m = self.manifest
        m.structures += len(block)
        m.atoms += int(block.n_atoms.sum())
        m.with_energy += len(block)
        m.with_forces += int(block.with_forces.sum())
        m.with_stress += int(block.with_stress.sum())
        m.periodic += int(block.structures["pbc"].any(axis=1).sum())
        _add_counts(m.elements, block.atoms["atomic_numbers"])
        _add_counts(m.charges, block.structures["charge"])
        _add_counts(m.spin_multiplicities, block.structures["spin_multiplicity"])
        for made_from, count in Counter(block.made_from).items():
            m.grouped_by[made_from] = m.grouped_by.get(made_from, 0) + count

    def _chain_up(self, block: Block) -> None:
        """Goes on with the running checksum: `store.link`, with a structure's short arrays joined at once."""
        columns = self.manifest.columns
        count = len(block)
        short = np.concatenate(
            [_as_bytes(block.structures[name], count) for name in chained(columns)], axis=1
        )
        long = [block.atoms[name] for name in per_atom(columns)]
        end = 0
        for row, n_atoms in zip(short, block.n_atoms.tolist(), strict=True):
            start, end = end, end + n_atoms
            self._chain = link(self._chain, [row, *(array[start:end] for array in long)])

    def commit(self, cursor: Mapping[str, Any]) -> None:
        """Makes everything added so far survive a kill, together with `cursor`."""
        began = time.monotonic()
        self._flush()
        sync(self._unsynced)
        self._unsynced.clear()
        self.manifest.rejected_bytes = self._rejected.sync()
        self.manifest.chain = self._chain.hex()
        self.cursor = dict(cursor)
        body = {"plan": self._plan, "cursor": self.cursor, "manifest": self.manifest.to_json()}
        write_json(self.path / JOURNAL, body)
        self._uncommitted = 0
        now = time.monotonic()
        self._next_commit = now + max(COMMIT_SECONDS, (now - began) / COMMIT_SHARE)

    def _flush(self) -> None:
        """Appends what is held in memory to the arrays on disk; it is synced by the next commit."""
        if not self._pending:
            return
        blocks = self._pending
        entry = self.manifest.shards[-1]
        folder = self.path / SHARDS / entry.name
        folder.mkdir(parents=True, exist_ok=True)
        structures, atoms = entry.structures - self._pending_structures, entry.atoms - self._pending_atoms
        ends = atoms + np.cumsum(np.concatenate([block.n_atoms for block in blocks]))
        files = [folder / "atom_offsets.npy"]
        if structures == 0:
            append_rows(files[0], OFFSETS, 0, np.concatenate([[0], ends]))
        else:
            append_rows(files[0], OFFSETS, structures + 1, ends)
        columns = self.manifest.columns
        for name, field in per_structure(columns).items():
            files.append(folder / f"{name}.npy")
            append_rows(files[-1], field, structures, np.concatenate([b.structures[name] for b in blocks]))
        for name, field in per_atom(columns).items():
            files.append(folder / f"{name}.npy")
            append_rows(files[-1], field, atoms, np.concatenate([b.atoms[name] for b in blocks]))
        self._unsynced.update(files)
        self._pending.clear()
        self._pending_structures = self._pending_atoms = 0

    def finish(self) -> Manifest:
        """Names what is committed as the store's content."""
        m = self.manifest
        m.digest = content_digest(m.level_of_theory, m.chain)
        m.groups = _count_distinct(Store(self.path, m), "group")
        write_json(self.path / MANIFEST, m.to_json())
        (self.path / JOURNAL).unlink()
        return m

    def abandon(self) -> None:
        """Takes an import back that kept nothing; an older store in the same place stays as it was."""
        (self.path / JOURNAL).unlink()
        self._rejected.cut(self.committed.rejected_bytes if self.committed is not None else 0)
        if self.committed is None:
            self.path.rmdir()


def _add_counts(counts: dict[str, int], values: NDArray[Any]) -> None:
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        counts[str(value)] = counts.get(str(value), 0) + int(count)


def _as_bytes(array: NDArray[Any], rows: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(rows, -1).view(np.uint8)


def _count_distinct(store: Store, name: str) -> int:
    """How many different values a per-structure array has, in passes that each hold a part of them."""
    passes = -(-len(store) // _UNIQUE_AT_ONCE)
    found = 0
    for turn in range(passes):
        values = np.empty(0, dtype=np.int64)
        for block in store.blocks(name):
            for at in range(0, len(block), _UNIQUE_AT_ONCE):
                rows = np.asarray(block[at : at + _UNIQUE_AT_ONCE])
                values = np.union1d(values, rows[rows % passes == turn])
        found += len(values)
    return found
