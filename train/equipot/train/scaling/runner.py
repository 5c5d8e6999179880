"""Runs a study's points in worker processes, shows how far they are, and ends well whenever asked to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from equipot.train.launch import GRACE_SECONDS, wait_policy
from equipot.train.scaling.claims import holder
from equipot.train.scaling.declaration import StudyError
from equipot.train.scaling.folder import StudyFolder, read_json, write_json
from equipot.train.scaling.headway import measured_in, seconds_left
from equipot.train.scaling.point import Point
from equipot.train.scaling.speed import Speed
from equipot.train.scaling.worker import RENEW, Assignment, is_open

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 4.0
_QUIET_SECONDS = 30.0  # between two lines where there is no terminal
_MOST_CRASHES = 2


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a study is."""

    finished: int
    failed: int
    running: Sequence[str]
    left: float
    """Seconds that all workers together need."""
    longest: float
    """Seconds that the longest point needs."""

    def seconds(self, workers: int) -> float:
        """Until the last point is done, if nothing else takes the cores."""
        return max(self.left / max(1, workers, len(self.running)), self.longest)


def standing(work: Assignment) -> Standing:
    """Look at the folder, which processes of any machine change."""
    folder = StudyFolder(work.folder)
    speed = Speed(measured_in(folder))
    finished = failed = 0
    running: list[str] = []
    seconds = [0.0]
    for point, _ in work.points:
        place = folder.point(point.name)
        if place.is_finished:
            finished += 1
        elif not is_open(place, work.began):
            failed += 1
        else:
            seconds.append(seconds_left(point, place, speed))
            if holder(place.path) is not None:
                running.append(point.name)
    return Standing(finished, failed, running, sum(seconds), max(seconds))


@dataclass(slots=True, eq=False)
class _Workers:
    """The processes of this runner."""

    work: Assignment
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    crashes: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        folder = StudyFolder(self.work.folder)
        folder.logs.mkdir(exist_ok=True)
        log = folder.logs / f"{socket.gethostname()}-{os.getpid()}.log"
        command = [sys.executable, "-m", "equipot.train.scaling.worker", "--parent", str(os.getpid())]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**os.environ, "OMP_WAIT_POLICY": wait_policy()},
                start_new_session=True,  # a terminal's Ctrl-C goes to the runner alone
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended at once: that is seen when it is waited for
            process.stdin.write(self.work.to_json().encode())
            process.stdin.close()
        self.processes.append(process)

    def tend(self, *, again: bool) -> bool:
        """Put others in the place of those that died, if so asked; false when none is left."""
        for process in list(self.processes):
            if process.poll() is None:
                continue
            self.processes.remove(process)
            if process.returncode not in (0, RENEW):
                self._note_crash(process)
            if process.returncode and again:
                self.start()
        return bool(self.processes)

    def _note_crash(self, process: subprocess.Popen[bytes]) -> None:
        folder = StudyFolder(self.work.folder)
        for point, _ in self.work.points:
            place = folder.point(point.name)
            newest = max(place.path.glob("claim-*.json"), default=None)
            body = None if newest is None else read_json(newest)
            if body is None or body.get("pid") != process.pid or body.get("released"):
                continue
            self.crashes[point.name] += 1
            if self.crashes[point.name] >= _MOST_CRASHES:
                code = process.returncode
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                reason = f"the process that trained it {how}, {_MOST_CRASHES} times; see {folder.logs}"
                write_json(place.failure, {"reason": reason, "traceback": None, "time": time.time()})
            return
        self.crashes[""] += 1  # at its start: it will not do better

    @property
    def cannot_start(self) -> bool:
        return self.crashes[""] >= _MOST_CRASHES

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def run_points(work: Assignment, workers: int, stopped: Sequence[int], console: Console) -> Standing:
    """Train all points, and return when they are done or when all is saved after a request to stop.

    Args:
        work: points in order.
        workers: processes of this machine.
        stopped: signals that have come meanwhile: the first one saves and ends, see `long_work`.
        console: to show on.

    Raises:
        StudyError: the processes cannot be started.
    """
    team = _Workers(work)
    now = standing(work)
    left = len(work.points) - now.finished - now.failed
    try:
        for _ in range(min(workers, left)):
            team.start()
        with _Shown(console, work, workers) as shown:
            _wait(team, stopped, shown)
    finally:
        team.signal(signal.SIGKILL)
        for process in team.processes:
            process.wait()
    if team.cannot_start:
        raise StudyError(
            f"worker processes end before they train anything; see {StudyFolder(work.folder).logs}"
        )
    return standing(work)


def _wait(team: _Workers, stopped: Sequence[int], shown: _Shown) -> None:
    asked: float | None = None
    looked = 0.0
    while team.tend(again=asked is None and not team.cannot_start):
        if stopped and asked is None:
            asked = time.monotonic()
            team.signal(signal.SIGTERM)
        if asked is not None and time.monotonic() - asked > GRACE_SECONDS:
            return
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            shown.update(stopping=asked is not None)
        time.sleep(_POLL_SECONDS)


class _Shown:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, work: Assignment, workers: int) -> None:
        self._console = console
        self._work = work
        self._workers = workers
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[eta]}"),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=1.0, eta="")
        self._spoke = 0.0
        self._all = 0.0

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, *, stopping: bool) -> None:
        now = standing(self._work)
        total = len(self._work.points)
        parts = [f"{now.finished} of {total} points"]
        if now.failed:
            parts.append(f"{now.failed} failed")
        if now.running:
            more = f" and {len(now.running) - 1} more" if len(now.running) > 1 else ""
            parts.append(f"training {now.running[0]}{more}")
        if stopping:
            parts = ["stopping: saving what is being trained", *parts]
        eta = "about " + duration(now.seconds(self._workers)) + " left"
        share = now.finished / total if total else 1.0
        self._bar.update(self._task, completed=share, description=escape(", ".join(parts)), eta=eta)
        if not self._console.is_terminal and time.monotonic() - self._spoke > _QUIET_SECONDS:
            self._spoke = time.monotonic()
            self._console.print(escape(", ".join([*parts, eta])), soft_wrap=True)


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def failures(work: Assignment) -> list[tuple[Point, str]]:
    """Points that could not be trained, with the reason; and those that diverged."""
    folder, found = StudyFolder(work.folder), []
    for point, _ in work.points:
        place = folder.point(point.name)
        result = read_json(place.result)
        if result is not None and result.get("stopped") == "diverged":
            found.append((point, f"diverged: {result['reason']}"))
        elif result is None and (failure := read_json(place.failure)) is not None:
            found.append((point, str(failure["reason"])))
    return found
