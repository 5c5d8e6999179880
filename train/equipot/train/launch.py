"""Starts the ranks of a run on this machine and ends them together. Knows no torch.

Each rank is a process of its own. If one fails the others are ended and the first failure is the one
reported; if the launcher itself dies, the ranks notice (see :mod:`equipot.train.worker`) and end. Nothing
waits for ever.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape

from equipot.train.errors import TrainError
from equipot.train.interfaces import interface_towards

_GRACE_SECONDS = 5.0  # for peers of a failed rank to say what they saw before they are killed
_POLL_SECONDS = 0.05
_SAME_SECONDS = 1.0  # torchrun passes on a Ctrl-C that the terminal has already sent to its ranks

GRACE_SECONDS = 600.0
"""For ranks to save and end in when they are asked to."""
PEER_SECONDS = 60.0
"""Of silence after which a rank of another machine is lost."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Upon which a run saves and ends well; Slurm sends SIGUSR1 if asked to (``--signal=USR1@120``)."""


class RankFailed(TrainError):
    """A rank ended abnormally: the message says which and why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failing rank leaves behind for the launcher."""

    time: float
    message: str
    exit_code: int

    def write(self, path: Path) -> None:
        """Leave it at `path`, complete or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"time": self.time, "message": self.message, "code": self.exit_code}))
        partial.rename(path)

    @staticmethod
    def read(path: Path) -> Failure | None:
        """What a rank left at `path`, if it could leave anything."""
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        return Failure(time=record["time"], message=record["message"], exit_code=record["code"])


def in_a_launched_rank() -> bool:
    """Whether some launcher (ours, torchrun, deepspeed, …) has already made this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables by which torch.distributed and DeepSpeed find each other on one machine."""
    threads = str(max(1, available_cores() // ranks))
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "OMP_WAIT_POLICY": wait_policy(),
        # gloo otherwise resolves the host's name, which need not resolve in a container
        "GLOO_SOCKET_IFNAME": os.environ.get(
            "GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"
        ),
    }


def choose_interface() -> None:
    """Tell gloo by which interface this rank meets the others, unless the user has.

    It would go by the host's name, which on many machines means the loopback, or nothing at all.
    """
    size, here = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    name = interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"), beyond=size > here)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def wait_policy() -> str:
    """How OpenMP's threads wait: spinning made a step 14 times slower on cores that others use too."""
    return os.environ.get("OMP_WAIT_POLICY", "PASSIVE")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    logs: Path,
    grace: float = GRACE_SECONDS,
    restarts: int = 0,
    again: Sequence[str] = (),
) -> None:
    """Run ``python -m module arguments`` as `ranks` ranks and wait for all of them.

    The signals of :data:`STOP_SIGNALS` are passed on as SIGTERM, upon which ranks save and end well; Ctrl-C
    after that kills them. Rank 0 writes to this terminal, the others to ``logs/rank-N.log``.

    Args:
        module: what the ranks run.
        arguments: for it.
        ranks: how many.
        logs: directory for what the ranks say.
        grace: seconds that the ranks have to end in after such a signal.
        restarts: how often to begin again, with `again` as arguments, after ranks died of something that is
            no mistake of the user's.
        again: the arguments then.

    Raises:
        RankFailed: a rank failed; carries the exit code to end with.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with _Signals(grace) as signals:
        for left in reversed(range(restarts + 1)):
            try:
                _launch_once(module, arguments, ranks, logs, signals)
                return
            except RankFailed as failure:
                if failure.exit_code == TrainError.exit_code or not left or signals.stopping:
                    raise
                count = f"restart {restarts - left + 1} of {restarts}"
                Console(highlight=False).print(
                    f"[yellow]warning:[/] {escape(str(failure))}. {count}, from the last checkpoint",
                    soft_wrap=True,
                )
            arguments = again


def _launch_once(module: str, arguments: Sequence[str], ranks: int, logs: Path, signals: _Signals) -> None:
    with tempfile.TemporaryDirectory(prefix="equipot-launch-") as scratch:
        group = _Group(Path(scratch), logs, signals)
        signals.group = group
        try:
            port = free_port()
            for rank in range(ranks):
                group.start(rank, module, arguments, rank_environment(rank, ranks, port))
            group.wait()
        finally:
            signals.group = None
            group.kill()


class _Signals:
    """Passes signals on to the group of the moment; use as a context manager."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.group: _Group | None = None
        self._repeated = StopSignals()
        self._deadline: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def stopping(self) -> bool:
        """Whether the ranks were asked to end."""
        return self._deadline is not None

    @property
    def out_of_patience(self) -> bool:
        """Whether they were, and have had the time for it."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._repeated.means_now(number):
            if self.group is not None:
                self.group.signal(signal.SIGKILL)
            raise KeyboardInterrupt
        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace
            if self.group is not None:
                self.group.signal(signal.SIGTERM)


class Stop(Protocol):
    """Tells whether this process was asked to save and end."""

    @property
    def requested(self) -> bool:
        """Whether it was."""
        ...


class StopSignals:
    """Tells one request to end from two: a scheduler may repeat itself, and a terminal speaks to all."""

    def __init__(self) -> None:
        self._first: float | None = None

    def means_now(self, number: int) -> bool:
        """Whether a signal that has come asks to end at once: a further Ctrl-C, and not the same one."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return number == signal.SIGINT and now - self._first > _SAME_SECONDS


class _Group:
    def __init__(self, scratch: Path, logs: Path, signals: _Signals) -> None:
        self._scratch = scratch
        self._logs = logs
        self._signals = signals
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int, module: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", module, *arguments, "--failure-file", str(self._failure_file(rank))]
        command += ["--parent", str(os.getpid())]
        with (self._logs / f"rank-{rank}.log").open("ab") as log:
            self._processes[rank] = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=None if rank == 0 else log,
                stderr=None if rank == 0 else log,
                # A terminal's Ctrl-C goes to the launcher alone, which passes it on once.
                start_new_session=True,
            )
        if self._signals.stopping:
            self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def wait(self) -> None:
        deadline: float | None = None
        while True:
            codes = {rank: process.poll() for rank, process in self._processes.items()}
            if all(code == 0 for code in codes.values()):
                return
            now = time.monotonic()
            if deadline is None and any(codes.values()):
                deadline = now + _GRACE_SECONDS
            running = any(code is None for code in codes.values())
            if deadline is not None and (not running or now > deadline):
                failed = {rank: code for rank, code in codes.items() if code}
                self.kill()
                self._report(failed)
                return
            if self._signals.out_of_patience:
                self.kill()
                raise RankFailed(
                    f"the ranks had not ended {self._signals.grace:g} s after they were asked to, and were "
                    "killed; --resume continues from the last checkpoint",
                    1,
                )
            time.sleep(_POLL_SECONDS)

    def _report(self, failed: dict[int, int]) -> None:
        def first_to_fail(rank: int) -> tuple[bool, float]:
            # A rank killed from outside cannot be the consequence of another's failure.
            record = Failure.read(self._failure_file(rank))
            return (record is not None, record.time if record else 0.0)

        rank = min(failed, key=first_to_fail)
        record = Failure.read(self._failure_file(rank))
        if record is not None:
            raise RankFailed(record.message, record.exit_code)
        code = failed[rank]
        if self._signals.stopping and code == -signal.SIGTERM:
            return  # asked to stop before it could begin: there is nothing to save
        if code < 0:
            name = signal.Signals(-code).name
            why = " (out of memory is the usual cause)" if code == -signal.SIGKILL else ""
            message = f"rank {rank} was killed by {name}{why}; the other ranks were ended"
        else:
            message = f"rank {rank} ended with code {code}; the other ranks were ended"
        raise RankFailed(f"{message}. See {self._logs / f'rank-{rank}.log'}; --resume continues the run", 1)

    def _failure_file(self, rank: int) -> Path:
        return self._scratch / f"failure-{rank}.json"
