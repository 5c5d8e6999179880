"""Feeds a calculator's process, ends it where it hangs, and starts it again. Knows no gRPC and no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence, Set
from multiprocessing.connection import Connection
from pathlib import Path

import equipot.serve
from equipot.serve.errors import NotReady, ServeError
from equipot.serve.foreign.files import Stamp, stamps, written
from equipot.serve.foreign.spec import CalculatorSpec
from equipot.serve.foreign.words import Answered, Facts, Refused, Structure

START_SECONDS = 600.0
"""In which a calculator must be ready: large weights come from slow disks."""

LEAVE_SECONDS = 5.0
"""Time for a process to end by itself once its pipe is closed."""

LOOK_SECONDS = 0.1
"""How often it is asked whether a process still lives whose pipe others may hold open."""

PIPE_SECONDS = 60.0
"""In which a process takes in, or gives out, a pipe's fill of a message: beyond that it is stuck."""

CLOSE_SECONDS = 0.2
"""For what is computed to be done before its process is ended."""

MOST_DEATHS = 8
"""Structures of one batch that end the calculator, after which the rest of it is not tried any more."""

LONGEST_PAUSE = 30.0
"""Seconds between two attempts to start a calculator that does not start."""

logger = logging.getLogger(__name__)


class _DeadError(Exception):
    """The process ended, or was ended because it took too long; the message says which."""


class _UntoldError(_DeadError):
    """So it did before it had read what it was to compute, which therefore is not to blame."""


class CalculatorProcess:
    """One calculator; calls come one at a time.

    Attributes:
        facts: what the calculator says of itself.

    Raises:
        ServeError: the calculator cannot be made.
    """

    def __init__(self, spec: CalculatorSpec, *, device: str, threads: int | None) -> None:
        self._spec = spec
        self._device = device
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._closing = threading.Event()
        self._using = threading.Lock()
        self._pause = 1.0
        self._not_before = 0.0
        self._load_seconds = 1.0
        self._has_computed = False
        self._outputs = set(spec.outputs)
        try:
            self.facts = self._start()
        except _DeadError as error:
            raise ServeError(
                f"calculator {spec.calculator}: its process {error}; the log has more"
            ) from error

    def check_ready(self) -> None:
        """Raises NotReady while the calculator does not start."""
        if self._process is None and time.monotonic() < self._not_before:
            raise self._not_ready()

    def compute(
        self, structures: Sequence[Structure], *, forces: bool, stress: bool
    ) -> list[Answered | Refused]:
        """Answers in order; a structure at which the calculator dies or hangs is refused alone.

        Raises:
            NotReady: the calculator died, and does not start again.
        """
        with self._using:
            return self._compute(structures, forces=forces, stress=stress)

    def _compute(
        self, structures: Sequence[Structure], *, forces: bool, stress: bool
    ) -> list[Answered | Refused]:
        answers: dict[int, Answered | Refused] = {}
        parts = [list(range(len(structures)))]
        guilty, untold = 0, False
        while parts:
            part = parts.pop()
            if guilty >= MOST_DEATHS:
                given_up = f"{guilty} others of its batch ended the calculator: send it by itself"
                answers |= {index: Refused("internal", given_up) for index in part}
                continue
            self._revive()
            try:
                self._ask(part, structures, answers, forces=forces, stress=stress)
            except _DeadError as death:
                if self._closing.is_set():
                    raise self._not_ready() from None
                left = [index for index in part if index not in answers]
                self._end()
                logger.error("calculator %s: its process %s", self._spec.shown_name, death)
                if isinstance(death, _UntoldError) and not untold:
                    untold = True
                    parts.append(left)
                elif not self.facts.batched or len(left) == 1:
                    guilty += 1
                    first, *left = left
                    answers[first] = Refused("internal", f"the calculator {death} at this structure")
                    parts += [left] if left else []
                else:
                    middle = len(left) // 2
                    parts += [left[middle:], left[:middle]]
        return [answers[index] for index in range(len(structures))]

    def close(self) -> None:
        """Ends the process, in the middle of a batch, too; whoever waits for that gets NotReady."""
        self._closing.set()
        while not self._using.acquire(timeout=CLOSE_SECONDS):
            # The pipe tells the thread that computes, which alone touches the rest until it lets go.
            if (process := self._process) is not None:
                _kill(process)
        try:
            process, pipe = self._process, self._pipe
            if process is not None and pipe is not None:
                pipe.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVE_SECONDS)
            self._end()
        finally:
            self._using.release()

    def _ask(
        self,
        part: list[int],
        structures: Sequence[Structure],
        answers: dict[int, Answered | Refused],
        *,
        forces: bool,
        stress: bool,
    ) -> None:
        pipe = self._pipe
        assert pipe is not None
        before = {} if self._has_computed else stamps(self._spec.arguments)
        try:
            pipe.send(([structures[index] for index in part], forces, stress))
        except OSError as error:
            raise _UntoldError(_stuck() if isinstance(error, BlockingIOError) else self._how()) from None
        try:
            for place, index in enumerate(part):
                # What is computed together comes together.
                first = self.facts.batched and not place
                answer = self._receive(self._spec.time_limit * (len(part) if first else 1))
                assert isinstance(answer, Answered | Refused)
                answers[index] = answer
                self._learn_outputs(before)
        finally:
            self._learn_outputs(before)

    def _learn_outputs(self, before: Mapping[str, Stamp]) -> None:
        """What its first structure changed are no weights, and may be otherwise when it is started again."""
        if not self._has_computed:
            self._has_computed = True
            self._outputs |= written(self._spec.arguments, before)

    def _revive(self) -> None:
        """Starts the process if it is not there: it may have been ended while it was idle."""
        if self._process is not None and self._process.poll() is None:
            return
        self.check_ready()
        self._end()
        try:
            facts = self._start()
            if changes := _changes(self.facts, facts, self._outputs):
                self._end()
                raise ServeError(changes)
        except (_DeadError, ServeError) as error:
            logger.error("calculator %s does not start: %s", self._spec.shown_name, error)
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            raise self._not_ready() from None
        self._pause = 1.0

    def _start(self) -> Facts:
        if self._closing.is_set():
            raise self._not_ready()
        begun = time.monotonic()
        ours, theirs = socket.socketpair()
        for waits in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, waits, struct.pack("@ll", int(PIPE_SECONDS), 0))
        environment = dict(os.environ)
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        if self._spec.python:
            # Another environment has its own packages; of ours it needs these few modules alone.
            above = str(Path(equipot.serve.__path__[0]).parents[1])
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (above, environment.get("PYTHONPATH", "")))
            )
        command = [self._spec.python or sys.executable, "-m", "equipot.serve.foreign.worker"]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise ServeError(
                    f"calculator {self._spec.calculator}: {command[0]} cannot be run: {error.strerror}"
                ) from None
        self._pipe = Connection(ours.detach())
        options = {
            "target": self._spec.target,
            "arguments": dict(self._spec.arguments),
            "charge": self._spec.charge,
            "device": self._device,
        }
        try:
            self._pipe.send((self._spec.kind, options))
            said = self._receive(START_SECONDS)
        except (OSError, _DeadError) as error:
            death = error if isinstance(error, _DeadError) else _DeadError(self._how())
            # One that goes on starting would be taken for one that has started.
            self._end()
            raise death from None
        if isinstance(said, Refused):
            self._end()
            raise ServeError(f"calculator {self._spec.calculator} cannot be made: {said.message}")
        assert isinstance(said, Facts)
        self._load_seconds = time.monotonic() - begun
        read = {name: value for name, value in said.weights.items() if name not in self._spec.outputs}
        return said._replace(weights=read)

    def _receive(self, seconds: float) -> object:
        pipe, process = self._pipe, self._process
        assert pipe is not None
        assert process is not None
        deadline = time.monotonic() + seconds
        try:
            while not pipe.poll(max(0.0, min(LOOK_SECONDS, deadline - time.monotonic()))):
                if process.poll() is not None:
                    # What it forked holds the pipe open, and would for as long as it lives.
                    _kill(process)
                    if not pipe.poll():
                        raise _DeadError(self._how())
                elif time.monotonic() >= deadline:
                    raise _DeadError(f"took longer than {seconds:g} s")
            return pipe.recv()
        except BlockingIOError:
            raise _DeadError(_stuck()) from None
        except (EOFError, OSError):
            raise _DeadError(self._how()) from None

    def _how(self) -> str:
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        return (
            "ended" if code is None else f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        )

    def _end(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            _kill(self._process)
            self._process.wait()
        self._process = self._pipe = None

    def _not_ready(self) -> NotReady:
        return NotReady(
            f"the calculator of {self._spec.shown_name} has ended and is being started again",
            retry_after=self._load_seconds + 1.0,
        )


def _stuck() -> str:
    return f"stood still for {PIPE_SECONDS:g} s in the middle of a message"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With what it forked and the programs that it runs: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _changes(served: Facts, found: Facts, outputs: Set[str]) -> str:
    """What is not as it was, and what to do about it; empty if nothing is.

    Args:
        served: what is served.
        found: what was started again.
        outputs: arguments whose files the calculator writes.
    """
    other = [
        name for name in Facts._fields if name != "weights" and getattr(served, name) != getattr(found, name)
    ]
    other += [
        f"weights ({name})"
        for name, value in served.weights.items()
        if name not in outputs and found.weights.get(name) != value
    ]
    if not other:
        return ""
    names = " and ".join(other)
    return f"it is another one now, by its {names}: put back what is served, or start the server anew"
