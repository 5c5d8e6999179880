"""Who works on what, where several processes and machines share a folder. Knows no study.

A claim on a folder is a file ``claim-N.json`` in it, made by exclusive creation; the highest N holds it.
Its owner touches it every few seconds. Whoever finds it given back, or its owner dead or silent, makes the
next N: of several that try, exclusive creation lets one succeed, and nothing is ever removed that another may
be about to make. Works where files are created exclusively, NFS from version 3 on included.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

BEAT_SECONDS = 5.0
"""Between two signs of life."""
STALE_SECONDS = 60.0
"""Of silence after which an owner on another machine is taken for dead."""


@dataclass(slots=True, eq=False)
class Claim:
    """A folder that this process works on; use as a context manager, which gives it back at the end."""

    path: Path
    """Of the file."""
    told: Callable[[], Mapping[str, Any]] = dict
    """What others may want to know, asked at each sign of life."""
    _end: threading.Event = field(default_factory=threading.Event)
    _lost: bool = False
    _thread: threading.Thread | None = None

    @property
    def is_lost(self) -> bool:
        """Whether another took it over, as this process was silent for too long: it must not go on."""
        return self._lost

    def __enter__(self) -> Claim:
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if not self._lost:
            self._write(released=True)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self._lost = self._lost or _newest(self.path.parent) != self.path
            if not self._lost:
                self._write(released=False)

    def _write(self, *, released: bool) -> None:
        body = {**_identity(), "released": released, "told": dict(self.told())}
        partial = self.path.with_name(f".{self.path.name}.partial")
        with contextlib.suppress(OSError):  # a full disk ends no training; at worst another takes over
            partial.write_text(json.dumps(body), encoding="utf-8")
            partial.replace(self.path)


def claim(folder: Path, told: Callable[[], Mapping[str, Any]] = dict) -> Claim | None:
    """Take hold of a folder, which is made if need be; None if another has it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest = _newest(folder)
    if newest is not None and _is_held(newest):
        return None
    mine = folder / f"claim-{_number(newest) + 1:06d}.json"
    try:
        file = os.open(mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        json.dump({**_identity(), "released": False, "told": {}}, stream)
    return Claim(mine, told) if _newest(folder) == mine else None


def holder(folder: Path) -> Mapping[str, Any] | None:
    """What the process that works on a folder told last; None if there is none."""
    newest = _newest(folder)
    if newest is None or not _is_held(newest):
        return None
    found: Mapping[str, Any] = (_read(newest) or {}).get("told", {})
    return found


def forget(folder: Path) -> None:
    """Remove the claims of a folder that nobody will ever claim again."""
    for path in folder.glob("claim-*.json"):
        path.unlink(missing_ok=True)


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("claim-*.json"), default=None)


def _number(path: Path | None) -> int:
    return 0 if path is None else int(path.stem.removeprefix("claim-"))


def _is_held(path: Path) -> bool:
    body = _read(path)
    if body is not None and body.get("released"):
        return False
    if body is not None and body.get("machine") == _machine():
        return _is_alive(int(body["pid"]), body["started"])
    try:
        return _now(path.parent) - path.stat().st_mtime < STALE_SECONDS
    except OSError:
        return True  # it is being replaced: somebody lives


def _read(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def _now(folder: Path) -> float:
    # by the clock of the file system, which machines share; theirs may differ
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """Processes of one machine, and of one container of it, see each other's numbers."""
    parts = [socket.gethostname()]
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
            parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) == started


def _started(pid: int) -> str:
    """Tells a process from a later one of the same number; "" where that cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
