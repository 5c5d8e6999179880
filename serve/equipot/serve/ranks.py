"""A model spread over ranks, here or on several machines: starts, feeds, and starts them again if one dies.

A rank that dies takes the others with it, as they would wait for it; what they computed is lost, and callers
are told when to come back. Whether it died for want of memory is found out: the same is not tried again.
Ranks that hang, far beyond what such a batch takes, are ended as if one had died.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from equipot.model.batch import SystemBatch
from equipot.model.potential import Prediction
from equipot.serve import rank
from equipot.serve.config import Workers
from equipot.serve.errors import NotReady, RanksExhausted, ServeError
from equipot.serve.free import free_port
from equipot.serve.hosts import Hosts, RemoteRank
from equipot.serve.machine import memory_kills
from equipot.serve.pace import Pace, Size

LONGEST_PAUSE = 30.0
"""Seconds between two attempts to start ranks that keep dying."""

STEADY_SECONDS = 60.0
"""Ranks that lived this long died of something new: the next attempt comes at once."""

VERDICT_SECONDS = 10.0
"""Until a loss that broke a batch is looked into."""

PATIENCE_SECONDS = 30.0
"""A batch may take this much longer than `PATIENCE` times what such a one takes; then its ranks hang."""

PATIENCE = 10.0

UNKNOWN_SECONDS = 60.0 * rank.COLLECTIVE_MINUTES
"""That the first batch may take."""

LOOK_SECONDS = 1.0
"""How often it is asked whether the batch under way takes too long."""

LEAVE_SECONDS = 5.0
"""Time for a rank to end by itself once its pipe is closed."""

logger = logging.getLogger(__name__)


class RankError(Exception):
    """Ranks ended before they were ready."""


class WorkerLostError(RankError):
    """Those on other machines did, and none here."""


class _Generation:
    """One set of processes that found each other; it is up, and then it is gone for good."""

    def __init__(self, configs: Sequence[rank.RankConfig], hosts: Hosts | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess | RemoteRank] = []
        self._exhausted = False
        self._patience = 0.0
        self._overdue = math.inf
        self._asked = threading.Lock()
        self._kills_before = memory_kills()
        self._looked_into = threading.Event()
        here = len(configs) // (1 if hosts is None else hosts.count + 1)
        # First those elsewhere, as nothing here is worth starting before all have come.
        away = [] if hosts is None else hosts.place(list(configs[here:]))
        try:
            for config in configs[:here]:
                ours, theirs = context.Pipe()
                self.pipes.append(ours)
                process = context.Process(
                    target=rank.main, args=(config, theirs), name=f"equipot-rank-{config.rank}", daemon=True
                )
                with theirs:
                    process.start()
                self.processes.append(process)
        except BaseException:
            self.processes += away
            self.end()
            raise
        self.pipes += [remote.pipe for remote in away]
        self.processes += away

    def wait_until_ready(self) -> None:
        """Returns when every rank has loaded its part.

        Raises:
            ServeError: the model cannot be loaded so.
            RankError: a rank died.
        """
        for pipe in self.pipes:
            try:
                answer = self._receive(pipe)
            except (EOFError, OSError):
                # A pipe closes a little earlier than its process is known to be gone.
                wait(self._sentinels(), LEAVE_SECONDS)
                how = self._deaths()
                dead = [process for process in self.processes if not process.is_alive()]
                lost = all(isinstance(process, RemoteRank) for process in dead)
                raise (WorkerLostError if lost else RankError)(f"{how} while loading") from None
            if isinstance(answer, rank.Refused):
                raise ServeError(answer.reason)

    def _receive(self, pipe: Connection) -> object:
        """One message, or EOFError if any rank ends before it comes."""
        while True:
            ready = wait([pipe, *self._sentinels()])
            if pipe in ready:
                return pipe.recv()
            # What a rank said before it ended is still in its pipe.
            for other in self.pipes:
                with contextlib.suppress(EOFError, OSError):
                    if other.poll() and isinstance(answer := other.recv(), rank.Refused):
                        return answer
            raise EOFError

    def compute(self, job: rank.Job, *, patience: float) -> rank.Outcome:
        """Raises EOFError or OSError if a rank ends first, or none answers within `patience` seconds.

        The latter is seen by whoever waits for a death, who then ends all: any of them may hang, and one
        that does not listen holds up a large job as it is sent.
        """
        with self._asked:
            self._patience, self._overdue = patience, time.monotonic() + patience
            try:
                # What the first has to say is worth hearing, even if it hears no more.
                with contextlib.suppress(OSError):
                    for pipe in self.pipes:
                        pipe.send(job)
                answer = self.pipes[0].recv()
            finally:
                self._overdue = math.inf
        if isinstance(answer, rank.Exhausted):
            self._exhausted = True
            self.processes[0].kill()
            raise EOFError
        assert isinstance(answer, rank.Outcome)
        return answer

    def ran_out(self) -> bool:
        """Whether a rank that ended did so for want of memory; waits until that is known."""
        self._looked_into.wait(VERDICT_SECONDS)
        return self._exhausted

    def wait_for_a_death(self) -> str:
        """Returns when a rank has ended or is about to, or hangs, and says how."""
        # After its first word a rank but the first has only one more to say: that it ran out of memory.
        others = [pipe for pipe in self.pipes[1:] if not pipe.closed]
        try:
            while not wait([*self._sentinels(), *others], LOOK_SECONDS):
                if time.monotonic() >= self._overdue:
                    self._looked_into.set()
                    return f"no answer within {self._patience:.0f} s"
        except OSError:
            self._looked_into.set()
            return "let go"
        how = self._deaths()
        for pipe in others:
            with contextlib.suppress(EOFError, OSError):
                if pipe.poll() and isinstance(pipe.recv(), rank.Exhausted):
                    self._exhausted = True
        if f"signal {signal.SIGKILL.value}" in how and memory_kills() > self._kills_before:
            self._exhausted = True
        self._looked_into.set()
        return f"it ran out of memory: {how or 'a rank says so'}" if self._exhausted else how

    def end(self) -> None:
        """Ends what still runs; `compute` in another thread returns with an error."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        # Not under the hands of whoever asks, who hears that nobody is there any more.
        with self._asked:
            for pipe in self.pipes:
                pipe.close()

    def leave(self) -> None:
        """Lets idle ranks end by themselves."""
        deadline = time.monotonic() + LEAVE_SECONDS
        if self._asked.acquire(timeout=LEAVE_SECONDS):
            for pipe in self.pipes:
                pipe.close()
            self._asked.release()
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.end()

    def _sentinels(self) -> list[int]:
        return [process.sentinel for process in self.processes]

    def _deaths(self) -> str:
        """Which ranks have ended, and how."""
        time.sleep(0.05)  # the first to die is the cause; those that follow say nothing new
        return "; ".join(
            f"rank {place} ended ({_how(process.exitcode)})"
            for place, process in enumerate(self.processes)
            if not process.is_alive()
        )


class Ranks:
    """A potential on several ranks, called like one; calls come one at a time.

    Attributes:
        size: how many ranks.
    """

    way = "tensor-parallel"
    batch_invariant = False

    def __init__(
        self,
        bundle: Path,
        *,
        digest: str,
        size: int,
        dtype: str | None,
        device: str,
        threads: int,
        workers: Workers | None = None,
    ) -> None:
        """Starts the ranks and returns when they are ready.

        Args:
            bundle: what to load.
            digest: that it has, and must have whenever ranks are started again.
            size: how many ranks.
            dtype: what to compute in; None is as stored.
            device: as torch names its kind.
            threads: of each rank.
            workers: other machines that take their share of the ranks.

        Raises:
            ServeError: the model cannot be loaded so.
        """
        self.size = size
        self._hosts = Hosts(workers) if workers else None
        each = size // (workers.hosts + 1 if workers else 1)
        self._make: Callable[[], _Generation] = lambda: _Generation(
            [
                rank.RankConfig(bundle, digest, dtype, device, place, size, port, threads, place % each)
                for port in [free_port()]
                for place in range(size)
            ],
            self._hosts,
        )
        self._name = bundle.name
        self._closing = threading.Event()
        self._asking = threading.Lock()
        self._load_seconds = 0.0
        self._pace = Pace()
        self._up: _Generation | None = None
        with contextlib.ExitStack() as otherwise:
            otherwise.callback(self.close)
            try:
                self._up = first = self._first()
            except (RankError, OSError) as error:
                raise ServeError(f"{bundle}: {error}; is there memory for it? the log has more") from error
            otherwise.pop_all()
        threading.Thread(target=self._watch, args=(first,), name="equipot-ranks", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether all ranks are there."""
        return self._up is not None

    def check_ready(self) -> None:
        """Raises NotReady while the ranks are being started again."""
        if self._up is None:
            raise self._not_ready()

    def __call__(
        self, batch: SystemBatch, *, forces: bool, stress: bool, deterministic: bool, threads: int
    ) -> tuple[Prediction, None]:
        """As `Ensemble` of one member; `deterministic` computes each structure alone, `threads` are fixed.

        Raises:
            NotReady: a rank died, and the ranks are being started again; `RanksExhausted` if for want of
                memory.
        """
        parts = batch.alone() if deterministic else [batch]
        outcomes = [self._compute(part, forces=forces, stress=stress) for part in parts]
        prediction = Prediction(
            energy=torch.cat([torch.from_numpy(one.energy) for one in outcomes]),
            forces=_joined([one.forces for one in outcomes]),
            stress=_joined([one.stress for one in outcomes]),
        )
        return prediction, None

    def _compute(self, batch: SystemBatch, *, forces: bool, stress: bool) -> rank.Outcome:
        generation = self._up
        if generation is None:
            raise self._not_ready()
        fields = {name: getattr(batch, name).numpy() for name in SystemBatch.__slots__}
        size = Size(batch.n_systems, batch.n_atoms, batch.n_edges)
        try:
            # Answers come in the order of questions, whoever asks.
            with self._asking:
                begun = time.monotonic()
                job = rank.Job(fields, forces, stress)
                outcome = generation.compute(job, patience=_patience(self._pace, size))
                self._pace.learn(size, time.monotonic() - begun)
                return outcome
        except (EOFError, OSError):
            raise self._not_ready(exhausted=generation.ran_out()) from None

    def close(self) -> None:
        """Ends the ranks."""
        self._closing.set()
        if self._hosts is not None:
            self._hosts.close()
        if (up := self._up) is not None:
            up.leave()

    def _first(self) -> _Generation:
        """As `_start`, for as often as workers come and go: they are restarted by others."""
        while True:
            try:
                return self._start()
            except WorkerLostError as error:
                logger.warning("%s: %s; is there memory for it? waiting for workers again", self._name, error)
                self._closing.wait(1.0)

    def _start(self) -> _Generation:
        generation = self._make()
        begun = time.monotonic()
        try:
            generation.wait_until_ready()
        except BaseException:
            generation.end()
            raise
        self._load_seconds = time.monotonic() - begun
        return generation

    def _watch(self, generation: _Generation) -> None:
        while True:
            since = time.monotonic()
            how = generation.wait_for_a_death()
            self._up = None
            if self._closing.is_set():
                return
            generation.end()
            logger.error("%s: %s; its %d ranks are started again", self._name, how, self.size)
            lived = time.monotonic() - since
            again = self._start_again(pause=0.0 if lived > STEADY_SECONDS else 1.0)
            if again is None:
                return
            self._up = generation = again
            logger.info("%s: its %d ranks are back", self._name, self.size)

    def _start_again(self, *, pause: float) -> _Generation | None:
        """New ranks, however many attempts that takes; None if the server stops meanwhile."""
        while not self._closing.wait(pause):
            try:
                again = self._start()
            except (RankError, ServeError, OSError) as error:
                if self._closing.is_set():
                    return None
                logger.error("%s: %s", self._name, error)
                pause = min(max(1.0, 2 * pause), LONGEST_PAUSE)
                continue
            if not self._closing.is_set():
                return again
            again.end()
        return None

    def _not_ready(self, *, exhausted: bool = False) -> NotReady:
        kind = RanksExhausted if exhausted else NotReady
        what = "ran out of memory" if exhausted else "has died"
        return kind(
            f"a rank of {self._name} {what}, and its ranks are being started again",
            retry_after=self._load_seconds + 1.0,
        )


def _patience(pace: Pace, size: Size) -> float:
    """Seconds after which ranks that have not answered a batch of this size hang."""
    if not pace:
        return UNKNOWN_SECONDS
    return PATIENCE_SECONDS + PATIENCE * pace.seconds(size)


def _how(code: int | None) -> str:
    if code is None:
        return "its machine let go"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _joined(parts: Sequence[npt.NDArray[np.float64] | None]) -> torch.Tensor | None:
    present = [torch.from_numpy(part) for part in parts if part is not None]
    return torch.cat(present) if present else None
