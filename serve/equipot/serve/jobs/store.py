"""Jobs in a folder: one SQLite file, one writer. Knows nothing of structures, gRPC or who computes.

Every change is one transaction that is on the disk when the call returns, so what anybody was told survives
any end of the process. Numbers of results and ends of structures are unique by the schema. One thread at a
time may use a store.
"""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from equipot.serve.errors import ServeError
from equipot.serve.jobs.file import FILE, lock, open_file
from equipot.serve.jobs.records import (
    JobRecord,
    JobState,
    Move,
    NoRoom,
    Opening,
    Part,
    Piece,
    Room,
    StoreDamaged,
    StoreError,
    StoreFull,
    Unfit,
)

_COLUMNS = ", ".join(JobRecord.__dataclass_fields__)
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)

READ_BYTES = 2**23
"""Of results that are read at once, unless one alone has more."""


class Store:
    """The jobs in one folder.

    Args:
        folder: made if it is not there.
        most_file_bytes: that the file may take; None is what the disk has.

    Raises:
        ServeError: another server uses it, it cannot be used, or what is there is damaged or newer.
    """

    def __init__(self, folder: Path, *, most_file_bytes: int | None = None) -> None:
        self.path = folder / FILE
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock(folder)
        except OSError as error:
            raise ServeError(f"cannot keep jobs in {folder}: {error.strerror or error}") from error
        try:
            self._database = open_file(self.path, most_bytes=most_file_bytes)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Lets the folder go."""
        self._database.close()
        os.close(self._lock)

    def submit(self, identity: str, name: str, opening: Opening, part: Part, room: Room) -> JobRecord:
        """Adds a part to a job, which it makes if it is the first; does nothing if it is there already.

        Raises:
            Unfit: it does not continue that job.
            NoRoom: more than may be kept.
        """
        with self._changing():
            job = self._begun(identity, name, part.start)
            if job is not None and self._has(job, opening, part):
                return job
            if job is None:
                job = self._make(identity, name, opening, room)
            self._check_room(job, part.size, room)
            self._add(job, part)
            return self._settled(job.key)

    def begun(self, identity: str, name: str, start: int) -> JobRecord | None:
        """The job that a part with structures from this number on belongs to; None if it would be the first.

        Raises:
            Unfit: structures are missing before it.
        """
        with self._reading():
            return self._begun(identity, name, start)

    def job(self, identity: str, name: str) -> JobRecord | None:
        """An identity's job; None if it has none of this name."""
        with self._reading():
            return self._find("identity = ? AND id = ?", identity, name)

    def jobs(self, identity: str) -> list[JobRecord]:
        """An identity's jobs, the newest first."""
        return self._select("identity = ? ORDER BY key DESC", identity)

    def open_jobs(self) -> list[JobRecord]:
        """Everybody's jobs that are to be gone on with, the oldest first."""
        return self._select("state = ? ORDER BY key", JobState.OPEN)

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        with self._reading():
            rows = self._database.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
        return {JobState(state): count for state, count in rows}

    def next_piece(self, key: int, first: int) -> Piece | None:
        """The job's piece that begins at this structure or the next one after it.

        Raises:
            StoreDamaged: it is not what was written.
        """
        with self._reading():
            row = self._database.execute(
                "SELECT first, n_structures, n_atoms, data, crc FROM pieces"
                " WHERE job = ? AND first >= ? ORDER BY first LIMIT 1",
                (key, first),
            ).fetchone()
        if row is None:
            return None
        return Piece(row[0], row[1], row[2], _sound(row[3], row[4], f"structures from {row[0]} on"))

    def ends(self, key: int, piece: Piece) -> set[int]:
        """Places of a piece's structures that have come to their end."""
        with self._reading():
            rows = self._database.execute(
                "SELECT place FROM ends WHERE job = ? AND place >= ? AND place < ?",
                (key, piece.first, piece.first + piece.n_structures),
            )
            return {place for (place,) in rows}

    def walks(self, key: int, piece: Piece, *, needed: bool = False) -> dict[int, bytes]:
        """Where a piece's structures were on their way when that was last saved, by place.

        A damaged one is left out: its structure begins anew.

        Raises:
            StoreDamaged: one is damaged, and needed: what begins anew would bring results again.
        """
        with self._reading():
            rows = self._database.execute(
                "SELECT place, data, crc FROM walks WHERE job = ? AND place >= ? AND place < ?",
                (key, piece.first, piece.first + piece.n_structures),
            ).fetchall()
        if needed:
            return {place: _sound(data, crc, f"steps of structure {place}") for place, data, crc in rows}
        return {place: data for place, data, crc in rows if zlib.crc32(data) == crc}

    def advance(self, moves: Mapping[int, Sequence[Move]]) -> dict[int, JobRecord]:
        """Notes what became of structures, by the job's key; returns these jobs as they are then.

        What is told of jobs that have ended or are gone, and of structures at their end, counts for nothing.
        """
        with self._changing():
            found = {}
            for key, of_job in moves.items():
                job = self._find("key = ?", key)
                if job is not None and job.state is JobState.OPEN:
                    self._note(job, of_job)
                    found[key] = self._settled(key)
                elif job is not None:
                    found[key] = job
            return found

    def results(
        self, key: int, after: int, most: int, most_bytes: int = READ_BYTES
    ) -> list[tuple[int, bytes]]:
        """Numbers and data of some of a job's results behind one, in order; one at least if there is any.

        Raises:
            StoreDamaged: one is not what was written.
        """
        found, n_bytes = list[tuple[int, bytes]](), 0
        with self._reading():
            for number, data, crc in self._database.execute(
                "SELECT number, data, crc FROM results WHERE job = ? AND number > ? ORDER BY number LIMIT ?",
                (key, after, most),
            ):
                found.append((number, _sound(data, crc, f"result {number}")))
                n_bytes += len(data)
                if n_bytes >= most_bytes:
                    break
        return found

    def end(self, key: int, state: JobState, reason: str = "") -> JobRecord | None:
        """Ends a job that has not ended; its results stay. None if it is gone."""
        with self._changing():
            job = self._find("key = ?", key)
            if job is not None and not job.state.ended:
                self._end(job, state, reason)
            return self._find("key = ?", key)

    def delete(self, key: int) -> None:
        """Forgets a job with all that belongs to it."""
        with self._changing():
            self._database.execute("DELETE FROM jobs WHERE key = ?", (key,))
        self._shrink()

    def sweep(self, *, keep_seconds: float, most_bytes: int) -> list[JobRecord]:
        """Forgets ended jobs that are too old, or the oldest where all take too much; returns them.

        Jobs whose parts stopped coming count as ended when the last one came.
        """
        gone = []
        with self._changing():
            (total,) = self._database.execute("SELECT total(size) FROM jobs").fetchone()
            ended = "state IN (?, ?, ?, ?) ORDER BY CASE ended WHEN 0 THEN changed ELSE ended END"
            states = (JobState.RECEIVING, JobState.DONE, JobState.CANCELLED, JobState.FAILED)
            now = time.time()
            for job in self._select(ended, *states):
                old = now - (job.ended or job.changed) > keep_seconds
                if old or (total > most_bytes and job.state.ended):
                    self._database.execute("DELETE FROM jobs WHERE key = ?", (job.key,))
                    total -= job.size
                    gone.append(job)
        if gone:
            self._shrink()
        return gone

    def _begun(self, identity: str, name: str, start: int) -> JobRecord | None:
        job = self._find("identity = ? AND id = ?", identity, name)
        if job is None and start:
            raise Unfit(f"job {name!r} has no structures before number {start}: send them first")
        if job is not None and start > job.n_structures:
            raise Unfit(f"job {name!r} has {job.n_structures} structures: {start} is not the one after them")
        return job

    def _has(self, job: JobRecord, opening: Opening, part: Part) -> bool:
        """Whether the part is there already."""
        if (job.kind, job.request) != (opening.kind, opening.request):
            raise Unfit(
                f"job {job.id!r} has other settings: all parts have the same ones, other jobs other ids"
            )
        if part.start == job.n_structures and job.state is JobState.RECEIVING:
            return False
        row = self._database.execute(
            "SELECT digest, last FROM parts WHERE job = ? AND start = ?", (job.key, part.start)
        ).fetchone()
        if row == (part.digest, part.last):
            return True
        if row is not None or job.state is not JobState.RECEIVING:
            raise Unfit(
                f"job {job.id!r} has other structures from {part.start} on: give another job another id"
            )
        raise Unfit(f"job {job.id!r} has {job.n_structures} structures: go on with the one after them")

    def _make(self, identity: str, name: str, opening: Opening, room: Room) -> JobRecord:
        (kept,) = self._database.execute(
            "SELECT count(*) FROM jobs WHERE identity = ?", (identity,)
        ).fetchone()
        if kept >= room.identity_jobs:
            raise NoRoom(f"{kept} jobs are kept for you, the limit is {room.identity_jobs}: delete some")
        now = time.time()
        self._database.execute(
            "INSERT INTO jobs (identity, id, label, kind, request, model, state, created, changed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                identity,
                name,
                opening.label,
                opening.kind,
                opening.request,
                opening.model,
                JobState.RECEIVING,
                now,
                now,
            ),
        )
        job = self._find("identity = ? AND id = ?", identity, name)
        assert job is not None
        return job

    def _check_room(self, job: JobRecord, size: int, room: Room) -> None:
        count = "SELECT total(size) FROM jobs"
        (own,) = self._database.execute(f"{count} WHERE identity = ?", (job.identity,)).fetchone()
        if own + size > room.identity_bytes:
            raise NoRoom(
                f"your jobs take {_mib(own)} and this part {_mib(size)} with its results, the limit is"
                f" {_mib(room.identity_bytes)}: delete some, or ask for less"
            )
        (others,) = self._database.execute(
            f"{count} WHERE state IN (?, ?)", (JobState.RECEIVING, JobState.OPEN)
        ).fetchone()
        if others + size > room.most_bytes:
            raise NoRoom(
                f"jobs that have not ended take {_mib(others)} of {_mib(room.most_bytes)}: come later"
            )

    def _add(self, job: JobRecord, part: Part) -> None:
        self._database.execute(
            "INSERT INTO parts VALUES (?, ?, ?, ?, ?)",
            (job.key, part.start, part.n_structures, part.last, part.digest),
        )
        self._database.executemany(
            "INSERT INTO pieces VALUES (?, ?, ?, ?, ?, ?)",
            [
                (job.key, piece.first, piece.n_structures, piece.n_atoms, piece.data, zlib.crc32(piece.data))
                for piece in part.pieces
            ],
        )
        self._note(job, part.moves)
        self._database.execute(
            "UPDATE jobs SET n_structures = n_structures + ?, n_atoms = n_atoms + ?, size = size + ?,"
            " state = ?, changed = ? WHERE key = ?",
            (
                part.n_structures,
                part.n_atoms,
                part.size,
                JobState.OPEN if part.last else JobState.RECEIVING,
                time.time(),
                job.key,
            ),
        )

    def _note(self, job: JobRecord, moves: Sequence[Move]) -> None:
        """Writes results, ends and ways of a job's structures."""
        number = job.n_results
        done = failed = steps = 0
        for move in moves:
            at = (job.key, move.place)
            if self._database.execute("SELECT 1 FROM ends WHERE job = ? AND place = ?", at).fetchone():
                continue
            for data in move.results:
                number += 1
                self._database.execute(
                    "INSERT INTO results VALUES (?, ?, ?, ?)", (job.key, number, data, zlib.crc32(data))
                )
            if move.ended:
                self._database.execute("INSERT INTO ends VALUES (?, ?)", at)
                self._database.execute("DELETE FROM walks WHERE job = ? AND place = ?", at)
                done, failed, steps = done + 1, failed + move.failed, steps + move.steps
            elif move.walk is not None:
                self._database.execute(
                    "INSERT OR REPLACE INTO walks VALUES (?, ?, ?, ?)",
                    (*at, move.walk, zlib.crc32(move.walk)),
                )
        self._database.execute(
            "UPDATE jobs SET n_results = ?, n_done = n_done + ?, n_failed = n_failed + ?, n_steps ="
            " n_steps + ?, changed = ? WHERE key = ?",
            (number, done, failed, steps, time.time(), job.key),
        )

    def _settled(self, key: int) -> JobRecord:
        """The job after a change, ended if nothing is left to do."""
        job = self._find("key = ?", key)
        assert job is not None
        if job.state is JobState.OPEN and job.n_done == job.n_structures:
            self._end(job, JobState.DONE, "")
            job = self._find("key = ?", key)
            assert job is not None
        return job

    def _end(self, job: JobRecord, state: JobState, reason: str) -> None:
        self._database.execute(
            "UPDATE jobs SET state = ?, reason = ?, ended = ? WHERE key = ?",
            (state, reason, time.time(), job.key),
        )
        # Results say themselves what they are of.
        for table in ("pieces", "walks", "ends"):
            self._database.execute(f"DELETE FROM {table} WHERE job = ?", (job.key,))

    def _select(self, where: str, *values: object) -> list[JobRecord]:
        with self._reading():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", values).fetchall()
        return [_record(row) for row in rows]

    def _find(self, where: str, *values: object) -> JobRecord | None:
        row = self._database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", values).fetchone()
        return None if row is None else _record(row)

    def _shrink(self) -> None:
        """Gives room back to the disk; what cannot be given back now is used again later."""
        with self._reading():
            self._database.execute("PRAGMA incremental_vacuum").fetchall()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One transaction: all of it, or on any error nothing."""
        with self._reading():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """SQLite's errors in our words."""
        try:
            yield
        except sqlite3.Error as error:
            # The low byte is the kind; the rest says more of it.
            kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if kind in _FULL:
                raise StoreFull(f"the server's store of jobs cannot be written: {error}") from error
            if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise StoreDamaged(f"the server's store of jobs is damaged: {error}") from error
            raise StoreError(f"the server's store of jobs failed: {error}") from error


def _record(row: Sequence[object]) -> JobRecord:
    values = dict(zip(JobRecord.__dataclass_fields__, row, strict=True))
    values["state"] = JobState(str(values["state"]))
    return JobRecord(**values)  # type: ignore[arg-type]  # as the schema has them


def _sound(data: bytes, crc: int, what: str) -> bytes:
    if zlib.crc32(data) != crc:
        raise StoreDamaged(f"{what} of the job are damaged on the server's disk: submit the job again")
    return data


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
