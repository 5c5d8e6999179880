"""The SQLite file in which jobs are kept: its schema, its marks, and who may open it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from equipot.serve.errors import ServeError

FILE, LOCK = "jobs.sqlite", "lock"

VERSION = 1
"""Of the schema. A change of it comes with what turns the former one into it."""

APPLICATION = 0x45504A31
"""SQLite's mark of a file that is ours."""

PAGE_BYTES = 4096

SCHEMA = """
CREATE TABLE jobs (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    identity TEXT NOT NULL, id TEXT NOT NULL, label TEXT NOT NULL, kind TEXT NOT NULL,
    request BLOB NOT NULL, model BLOB NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
    created REAL NOT NULL, changed REAL NOT NULL, ended REAL NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0,
    n_structures INTEGER NOT NULL DEFAULT 0, n_atoms INTEGER NOT NULL DEFAULT 0,
    n_done INTEGER NOT NULL DEFAULT 0, n_failed INTEGER NOT NULL DEFAULT 0,
    n_results INTEGER NOT NULL DEFAULT 0, n_steps INTEGER NOT NULL DEFAULT 0,
    UNIQUE (identity, id));
CREATE TABLE parts (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    start INTEGER NOT NULL, n_structures INTEGER NOT NULL, last INTEGER NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY (job, start)) WITHOUT ROWID;
CREATE TABLE pieces (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    first INTEGER NOT NULL, n_structures INTEGER NOT NULL, n_atoms INTEGER NOT NULL,
    data BLOB NOT NULL, crc INTEGER NOT NULL,
    UNIQUE (job, first));
CREATE TABLE walks (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    place INTEGER NOT NULL, data BLOB NOT NULL, crc INTEGER NOT NULL,
    UNIQUE (job, place));
CREATE TABLE ends (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    place INTEGER NOT NULL, PRIMARY KEY (job, place)) WITHOUT ROWID;
CREATE TABLE results (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    number INTEGER NOT NULL, data BLOB NOT NULL, crc INTEGER NOT NULL,
    UNIQUE (job, number));
"""


def open_file(path: Path, *, most_bytes: int | None) -> sqlite3.Connection:
    """A connection to a file of jobs, which is made if it is not there; at most so large.

    Raises:
        ServeError: it is damaged, newer, or something else.
    """
    # Not by thread, but by our word: one at a time.
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        (found,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and found != APPLICATION:
            raise ServeError(f"{path} is no file of jobs: give another folder")
        if tables and version != VERSION:
            raise ServeError(
                f"{path} is of version {version}, this equipot knows {VERSION}: start the"
                " equipot that made it, or give another folder"
            )
        if not tables:
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        # Told is kept: also when the machine, not only the process, ends.
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        if most_bytes is not None:
            database.execute(f"PRAGMA max_page_count = {max(1, most_bytes // PAGE_BYTES)}")
        if not tables:
            marks = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"
            database.executescript(f"BEGIN; {SCHEMA} {marks} COMMIT;")
        (answer,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if answer != "ok":
            raise sqlite3.DatabaseError(answer)
    except sqlite3.Error as error:
        database.close()
        raise ServeError(
            f"{path} is damaged or cannot be used ({error}): move it away to begin with no jobs, or"
            " bring back a copy"
        ) from error
    except ServeError:
        database.close()
        raise
    return database


def lock(folder: Path) -> int:
    """An open file that no other process has locked, until it is closed."""
    held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(held, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(held)
        raise ServeError(
            f"the jobs in {folder} belong to a server that runs (process {owner}): give each server a"
            " folder of its own"
        ) from None
    os.ftruncate(held, 0)
    os.pwrite(held, str(os.getpid()).encode(), 0)
    return held
