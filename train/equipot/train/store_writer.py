"""Writes a packed store so that a kill at any moment loses at most the frames since the last commit.

Order of a commit: arrays are appended and synced, then the journal is replaced. What lies behind the rows
that the journal (or, without one, the manifest) counts is cut off by the next append. The manifest comes
last, when the import is done, so a store that is being added to stays readable as it was. Knows no files.
"""

import copy
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from equipot.train.arrays import OFFSETS, Field, append_rows, per_atom, per_structure
from equipot.train.errors import DataError
from equipot.train.manifest import Manifest, ShardEntry, SourceEntry, content_digest, read_json, write_json
from equipot.train.sources.base import EXTRAS, Frame
from equipot.train.storage.memory_map import SHARDS
from equipot.train.storage.opening import JOURNAL, MANIFEST
from equipot.train.store import Store, chained, link

SHARD_STRUCTURES = 2**20
SHARD_ATOMS = 2**25
"""A shard is closed at either limit. Few large ones: each of its 13 arrays takes the reader a file handle."""
COMMIT_STRUCTURES = 2048
COMMIT_ATOMS = 2**17
"""Frames held in memory at most, and lost at most."""
_ABSENT: Mapping[str, int] = {"tags": -1, "fixed": 0}


class StoreWriter:
    """One import into one store; a context manager that holds the store's lock.

    Attributes:
        path: the store's folder.
        committed: manifest of the finished store that is being added to, or None.
        manifest: the store as it will be, brought up to date by every `add`.
        cursor: {"source": …, "frame": …}, where to go on reading after the last commit.
        resumed: whether a killed import is being continued.
    """

    def __init__(self, path: Path, fresh: Manifest, *, commit_structures: int = COMMIT_STRUCTURES) -> None:
        """Locks the folder, which is made if need be.

        Args:
            path: folder of the store.
            fresh: manifest of the store if it has to be created.
            commit_structures: frames between two commits.

        Raises:
            DataError: not a store; another import is running; another level of theory or licence.
        """
        self.path = path
        self.manifest = fresh
        self.cursor: dict[str, int] = {"source": 0, "frame": 0}
        self.resumed = False
        self._commit_structures = commit_structures
        self._pending: list[tuple[Frame, int, int]] = []
        self._pending_atoms = 0
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
            begun = f"{JOURNAL}.part"  # all that a kill in the very first step leaves
            if not journal.exists() and any(entry.name != begun for entry in self.path.iterdir()):
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

    def start(self, plan: Mapping[str, Any], sources: Sequence[SourceEntry]) -> None:
        """Takes a killed import up again, or begins one.

        Args:
            plan: what is imported and how, as JSON types; only the same plan is taken up again.
            sources: the files, in order; they are added to the manifest.

        Raises:
            DataError: an import with another plan lies unfinished.
        """
        self._plan = json.loads(json.dumps(plan))
        journal = self.path / JOURNAL
        if journal.exists():
            body = read_json(journal)
            if body.get("plan") != self._plan:
                theirs = ", ".join(source["file"] for source in body.get("plan", {}).get("sources", []))
                raise DataError(
                    f"{self.path}: an import of {theirs} lies unfinished, with other files or options than "
                    f"these; finish it with its own command, or drop it: rm -r {self._dropped()}"
                )
            self.manifest = Manifest.from_json(body["manifest"], journal)
            self.cursor = body["cursor"]
            self.resumed = True
            self._chain = bytes.fromhex(self.manifest.chain)
            return
        if self.committed is not None:
            self.manifest = copy.deepcopy(self.committed)
            self._chain = bytes.fromhex(self.manifest.chain)
        self.manifest.sources += copy.deepcopy(list(sources))
        self.commit(self.cursor)

    def _dropped(self) -> Path:
        return self.path if self.committed is None else self.path / JOURNAL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def add(self, frame: Frame, group: int, source: int) -> None:
        """Adds one structure; it is on disk after the next commit."""
        entry = self._open_shard(len(frame.atomic_numbers))
        self._pending.append((frame, group, source))
        self._pending_atoms += len(frame.atomic_numbers)
        entry.structures += 1
        entry.atoms += len(frame.atomic_numbers)
        self._count(frame)
        self._chain = link(self._chain, self._row_bytes(frame, group, source))

    def _row_bytes(self, frame: Frame, group: int, source: int) -> list[NDArray[Any]]:
        columns = self.manifest.columns
        fields = per_structure(columns)
        rows = [_structure_row(name, fields[name], frame, group, source) for name in chained(columns)]
        return rows + [_atom_rows(name, field, frame) for name, field in per_atom(columns).items()]

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return len(self._pending) >= self._commit_structures or self._pending_atoms >= COMMIT_ATOMS

    def _open_shard(self, n_atoms: int) -> ShardEntry:
        shards = self.manifest.shards
        last = shards[-1] if shards else None
        if last is None or last.structures >= SHARD_STRUCTURES or last.atoms + n_atoms > SHARD_ATOMS:
            if last is not None:
                self._flush()
            shards.append(ShardEntry(name=f"{len(shards):05d}"))
        return shards[-1]

    def _count(self, frame: Frame) -> None:
        m = self.manifest
        m.structures += 1
        m.atoms += len(frame.atomic_numbers)
        m.with_energy += 1
        m.with_forces += frame.forces is not None
        m.with_stress += frame.stress is not None
        m.periodic += bool(frame.pbc.any())
        for number, count in zip(*np.unique(frame.atomic_numbers, return_counts=True), strict=True):
            m.elements[str(number)] = m.elements.get(str(number), 0) + int(count)
        charge, spin = str(frame.charge), str(frame.spin_multiplicity)
        m.charges[charge] = m.charges.get(charge, 0) + 1
        m.spin_multiplicities[spin] = m.spin_multiplicities.get(spin, 0) + 1

    def commit(self, cursor: Mapping[str, int]) -> None:
        """Makes everything added so far survive a kill, together with `cursor`."""
        self._flush()
        self.manifest.chain = self._chain.hex()
        self.cursor = dict(cursor)
        body = {"plan": self._plan, "cursor": self.cursor, "manifest": self.manifest.to_json()}
        write_json(self.path / JOURNAL, body)

    def _flush(self) -> None:
        if not self._pending:
            return
        frames = [frame for frame, _, _ in self._pending]
        entry = self.manifest.shards[-1]
        folder = self.path / SHARDS / entry.name
        folder.mkdir(parents=True, exist_ok=True)
        structures, atoms = entry.structures - len(frames), entry.atoms - self._pending_atoms
        ends = atoms + np.cumsum([len(frame.atomic_numbers) for frame in frames])
        if structures == 0:
            append_rows(folder / "atom_offsets.npy", OFFSETS, 0, np.concatenate([[0], ends]))
        else:
            append_rows(folder / "atom_offsets.npy", OFFSETS, structures + 1, ends)
        columns = self.manifest.columns
        for name, field in per_structure(columns).items():
            rows = np.stack([_structure_row(name, field, *pending) for pending in self._pending])
            append_rows(folder / f"{name}.npy", field, structures, rows)
        for name, field in per_atom(columns).items():
            rows = np.concatenate([_atom_rows(name, field, frame) for frame in frames])
            append_rows(folder / f"{name}.npy", field, atoms, rows)
        self._pending.clear()
        self._pending_atoms = 0

    def finish(self) -> Manifest:
        """Names what is committed as the store's content."""
        m = self.manifest
        m.digest = content_digest(m.level_of_theory, m.chain)
        m.groups = len(np.unique(Store(self.path, m).groups))
        write_json(self.path / MANIFEST, m.to_json())
        (self.path / JOURNAL).unlink()
        return m

    def abandon(self) -> None:
        """Takes an import back that kept nothing; an older store in the same place stays as it was."""
        (self.path / JOURNAL).unlink()
        if self.committed is None:
            self.path.rmdir()


def fingerprint(frame: Frame) -> int:
    """63 bits that are equal for frames with the same structure and labels to the last bit."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("atomic_numbers", "positions", "cell", "pbc", "energy", "forces", "stress"):
        value = getattr(frame, name)
        digest.update(b"-" if value is None else np.ascontiguousarray(value).tobytes())
    digest.update(f"{frame.charge} {frame.spin_multiplicity}".encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def _structure_row(name: str, field: Field, frame: Frame, group: int, source: int) -> NDArray[Any]:
    """One structure's row of a per-structure array, in the type it has on disk."""
    if name == "group":
        value: Any = group
    elif name == "source":
        value = source
    elif name == "frame":
        value = frame.index
    elif name == "stress":
        value = np.full((3, 3), np.nan) if frame.stress is None else frame.stress
    elif name == "fingerprint":
        value = fingerprint(frame)
    elif name == "name":
        value = frame.name.encode("utf-8")
    else:
        value = getattr(frame, name)
    return np.asarray(value, dtype=field.dtype)


def _atom_rows(name: str, field: Field, frame: Frame) -> NDArray[Any]:
    """One structure's rows of a per-atom array, in the type they have on disk."""
    value = frame.extras.get(name) if name in EXTRAS else getattr(frame, name)
    if value is None:
        return np.full((len(frame.atomic_numbers), *field.row), _ABSENT.get(name, np.nan), dtype=field.dtype)
    return np.asarray(value, dtype=field.dtype)
