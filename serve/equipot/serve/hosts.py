"""Ranks of a model on other machines: they come to the one that leads, and look like processes to it.

`equipot join` on each of the others keeps one connection open that waits for work; each rank takes one.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from equipot.serve import rank
from equipot.serve.config import Workers
from equipot.serve.errors import ServeError
from equipot.serve.wire import Wire, WireError, read_key

INTRODUCTION_SECONDS = 10.0
"""Whoever has not shown the key by then is a stranger."""

PATIENCE_SECONDS = 2.0
"""Between two tries to reach the leader."""

LISTEN_SECONDS = 0.5
"""Whoever waits for work looks so often whether it is to stop."""

logger = logging.getLogger(__name__)


class Hosts:
    """Who has come to help. Closed with the ranks that use it.

    Attributes:
        port: on which it waits.

    Raises:
        ServeError: the port is in use, or the key cannot be used.
    """

    def __init__(self, workers: Workers) -> None:
        self.count = workers.hosts
        self._key = read_key(workers.key)
        self._idle: dict[str, list[Wire]] = {}
        self._change = threading.Condition()
        self._closed = False
        try:
            self._listener = socket.create_server((workers.host, workers.port))
        except OSError as error:
            raise ServeError(f"cannot wait for workers on port {workers.port}: {error.strerror}") from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._welcome, name="equipot-hosts", daemon=True).start()

    def place(self, configs: list[rank.RankConfig]) -> list[RemoteRank]:
        """Starts ranks on the other machines, the same number on each, once all have come.

        Before that none is told to begin: ranks that are short of others give up. If one leaves in the midst
        of it, all begin anew.

        Raises:
            WireError: closed meanwhile.
        """
        while True:
            ranks: list[RemoteRank] = []
            try:
                self._place(configs, ranks)
            except BaseException as error:
                for one in ranks:
                    one.kill()
                if self._closed or not isinstance(error, OSError):
                    raise
                logger.warning("%s; waiting for workers again", error)
            else:
                return ranks

    def close(self) -> None:
        """Lets everybody go."""
        with self._change:
            self._closed = True
            idle = [wire for wires in self._idle.values() for wire in wires]
            self._change.notify_all()
        self._listener.close()
        for wire in idle:
            wire.close()

    def _place(self, configs: list[rank.RankConfig], ranks: list[RemoteRank]) -> None:
        each = len(configs) // self.count
        names = self._all()
        for place, config in enumerate(configs):
            ranks.append(RemoteRank(self._take(names[place // each]), config))

    def _all(self) -> list[str]:
        """Who waits, once they are as many as are needed."""
        told = -1
        with self._change:
            while len(names := self._waiting()) < self.count:
                if len(names) != told:
                    logger.info(
                        "waiting for workers on port %d: %d of %d are here", self.port, len(names), self.count
                    )
                    told = len(names)
                self._change.wait(1.0)
            return names[: self.count]

    def _take(self, name: str) -> Wire:
        # Each keeps one connection that waits, and makes another when that is taken.
        with self._change:
            if not self._change.wait_for(lambda: name in self._waiting(), INTRODUCTION_SECONDS):
                raise WireError(f"worker {name} has left")
            return self._idle[name].pop()

    def _waiting(self) -> list[str]:
        """Who has a connection that waits, without those that have left; the first to come first.

        Raises:
            WireError: closed.
        """
        if self._closed:
            raise WireError("the server stops")
        for name, wires in list(self._idle.items()):
            for wire in list(wires):
                # Before they are told of a rank they have nothing to say: it is their end.
                if wire.has_word(0.0):
                    wires.remove(wire)
                    wire.close()
            if not wires:
                del self._idle[name]
        return list(self._idle)

    def _welcome(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        connection.settimeout(INTRODUCTION_SECONDS)
        wire = Wire(connection)
        try:
            name = wire.introduce(self._key, leads=True)
        except OSError as error:
            logger.warning("somebody on the workers' port was turned away: %s", error)
            wire.close()
            return
        connection.settimeout(None)
        with self._change:
            if self._closed:
                wire.close()
                return
            # A machine that came again has nothing to do with what is left of its former connections.
            self._idle.setdefault(name, []).append(wire)
            self._change.notify_all()


class RemoteRank:
    """A rank on another machine, as much of a process as `_Generation` needs, with its pipe.

    Attributes:
        pipe: takes jobs and gives answers, as a local rank's does.
        sentinel: becomes ready when the rank is gone.
    """

    exitcode: int | None = None

    def __init__(self, wire: Wire, config: rank.RankConfig) -> None:
        wire.send(config)
        self._wire = wire
        self.pipe, self._inner = multiprocessing.Pipe()
        self.sentinel, self._alive = os.pipe()
        self._ended = threading.Event()
        self._once = threading.Lock()
        for target in (self._to, self._from):
            threading.Thread(target=target, name=f"equipot-remote-rank-{config.rank}", daemon=True).start()

    def is_alive(self) -> bool:
        """Whether its connection stands."""
        return not self._ended.is_set()

    def kill(self) -> None:
        """Ends the connection; the other machine then ends the rank."""
        self._end()

    def join(self, timeout: float | None = None) -> None:
        """Waits until it is gone."""
        self._ended.wait(timeout)

    def _to(self) -> None:
        try:
            while True:
                self._wire.send(self._inner.recv())
        except (EOFError, OSError):
            self._end()

    def _from(self) -> None:
        try:
            while True:
                self._inner.send(self._wire.receive())
        except (EOFError, OSError):
            self._end()

    def _end(self) -> None:
        with self._once:
            if not self._ended.is_set():
                self._ended.set()
                self._wire.close()
                self._inner.close()
                os.close(self._alive)


def join(
    leader: str, port: int, key: Path, *, announce: Callable[[str], None], stop: threading.Event
) -> None:
    """Lends this machine to a leader until `stop`; comes again whenever the leader does.

    Raises:
        ServeError: the key cannot be used.
    """
    known = read_key(key)
    name = f"{socket.gethostname()}-{os.getpid()}"
    announced = False
    while not stop.is_set():
        try:
            wire = _introduced(leader, port, known, name)
        except OSError as error:
            if announced or not isinstance(error, ConnectionRefusedError | socket.gaierror | TimeoutError):
                logger.warning("no leader on %s:%d: %s", leader, port, error)
            announced = False
            stop.wait(PATIENCE_SECONDS)
            continue
        if not announced:
            announce(f"joined {leader}:{port} as {name}")
            announced = True
        try:
            config = _first_word(wire, stop)
        except OSError as error:
            logger.warning("the leader on %s:%d went: %s", leader, port, error)
            config = None
        if not isinstance(config, rank.RankConfig):
            wire.close()
            # A leader that lets go at once would else be called without end.
            stop.wait(PATIENCE_SECONDS)
            continue
        config = config.on(leader)
        threading.Thread(
            target=_run, args=(wire, config), name=f"equipot-rank-{config.rank}", daemon=True
        ).start()


def _introduced(leader: str, port: int, key: bytes, name: str) -> Wire:
    connection = socket.create_connection((leader, port), INTRODUCTION_SECONDS)
    wire = Wire(connection)
    try:
        wire.introduce(key, leads=False, name=name)
    except OSError:
        wire.close()
        raise
    connection.settimeout(None)
    return wire


def _first_word(wire: Wire, stop: threading.Event) -> object:
    """What the leader says once it has a rank to start, which may be never; None if stopped before."""
    while not stop.is_set():
        if wire.has_word(LISTEN_SECONDS):
            return wire.receive()
    return None


def _run(wire: Wire, config: rank.RankConfig) -> None:
    """One rank in a process of its own, from its first message to its end or its leader's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=rank.main, args=(config, theirs), daemon=True)
    process.start()
    theirs.close()
    logger.info("rank %d of %d of %s begins", config.rank, config.size, config.bundle)
    jobs: queue.SimpleQueue[object] = queue.SimpleQueue()
    threading.Thread(target=_answers, args=(ours, wire), daemon=True).start()
    threading.Thread(target=_jobs, args=(jobs, ours), daemon=True).start()
    try:
        while True:
            jobs.put(wire.receive())
    except (EOFError, OSError):
        pass
    finally:
        jobs.put(None)
        # Closing the pipe lets an idle rank end by itself; one that computes for nobody is not waited for.
        process.join(0.0)
        process.kill()
        process.join()
        wire.close()
        logger.info("rank %d of %s has ended", config.rank, config.bundle)


def _jobs(jobs: queue.SimpleQueue[object], pipe: Connection) -> None:
    """Apart from whoever hears of the leader's end: a rank that hangs takes no job."""
    with contextlib.suppress(OSError):
        while (job := jobs.get()) is not None:
            pipe.send(job)


def _answers(pipe: Connection, wire: Wire) -> None:
    try:
        while True:
            wait([pipe])
            wire.send(pipe.recv())
    except (EOFError, OSError):
        # The rank is gone: its leader must hear of it.
        wire.close()
        time.sleep(0)
