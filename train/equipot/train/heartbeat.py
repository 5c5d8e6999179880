"""Notices within bounded time that another machine's ranks are gone, and names them. Knows no training.

A machine that loses its power or network says no farewell: what waits for it in a collective operation would
wait as long as that may take. So every rank keeps a connection to rank 0, on which both say that they are
alive. Who falls silent, or hangs up without a farewell, is lost; rank 0 tells the others, and all end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from equipot.train.errors import TrainError
from equipot.train.interfaces import address_towards
from equipot.train.world import World

_ALIVE, _FAREWELL, _LOST = b"a", b"f", b"l"
_RANK = struct.Struct("<I")
_BEATS = 5  # in the time after which silence means lost
_LONGEST_BEAT = 5.0
_GRACE = 3.0  # for the main thread to meet the loss itself, and end in its own way
# torchrun counts a lost machine in for 15 s, its default: it would begin again with it, and then give up.
_TORCHRUN_SECONDS = 20.0


class PeerLost(TrainError):
    """A rank of another machine is gone; started again, training goes on from the last checkpoint."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class _Peer:
    rank: int
    host: str
    address: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.address})"


class Heartbeat:
    """Watches the ranks of a world that spans machines; use as a context manager, on all ranks alike.

    On one machine there is nothing to do: the launcher sees its ranks die, and so do their peers.

    Args:
        world: the ranks.
        timeout: seconds of silence after which a rank is lost.
        end: what ends this process when the main thread does not.
    """

    def __init__(self, world: World, timeout: float, end: Callable[[int], object] = os._exit) -> None:
        self._timeout = timeout
        self._end = end
        restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        self._patience = _TORCHRUN_SECONDS if restarted else 0.0
        self._is_taken = False
        self._rank = world.rank
        self._lost: str | None = None
        self._told = threading.Event()
        self._over = threading.Event()
        self._connections: dict[int, socket.socket] = {}
        host = socket.gethostname()
        address = address_towards(os.environ.get("MASTER_ADDR", "localhost")) or "unknown"
        self._peers = [
            _Peer(rank, *found)  # type: ignore[misc]
            for rank, found in enumerate(world.gather((host, address)))
        ]
        if len({(peer.host, peer.address) for peer in self._peers}) > 1:
            self._connect(world)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(_FAREWELL)

    def reason(self) -> str | None:
        """Who was lost, if somebody was: then the caller is to end this process.

        Waits for the news, which may come after its effects, and until it is no mistake to be started again.
        """
        if self._connections:
            self._told.wait(_GRACE)
        self._is_taken = self._lost is not None
        if self._is_taken:
            time.sleep(self._patience)
        return self._lost

    def _connect(self, world: World) -> None:
        beat = min(_LONGEST_BEAT, self._timeout / _BEATS)
        if world.is_first:
            with socket.create_server(("", 0), backlog=world.size) as server:
                server.settimeout(self._timeout)
                world.from_first(server.getsockname()[1])
                while len(self._connections) < world.size - 1:
                    connection, _ = server.accept()
                    connection.settimeout(self._timeout)
                    (rank,) = _RANK.unpack(_exactly(connection, _RANK.size))
                    self._connections[rank] = connection
        else:
            port = world.from_first(0)
            first = socket.create_connection((self._peers[0].address, port), timeout=self._timeout)
            first.settimeout(self._timeout)
            first.sendall(_RANK.pack(world.rank))
            self._connections[0] = first
        for rank, connection in self._connections.items():
            self._start(f"heartbeat-{rank}", lambda r=rank, c=connection: self._listen(r, c))  # type: ignore[misc]
        self._start("heartbeat", lambda: self._beat(beat))

    @staticmethod
    def _start(name: str, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name=name, daemon=True).start()

    def _beat(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            for connection in self._connections.values():
                # one that is gone is for its listener to notice
                with contextlib.suppress(OSError):
                    connection.sendall(_ALIVE)

    def _listen(self, rank: int, connection: socket.socket) -> None:
        try:
            while True:
                word = _exactly(connection, 1)
                if word == _FAREWELL:
                    return
                if word == _LOST:
                    (lost,) = _RANK.unpack(_exactly(connection, _RANK.size))
                    self._lose(lost, "rank 0 says")
                    return
        except TimeoutError:
            self._lose(rank, f"not heard of for {self._timeout:g} s")
        except OSError as error:
            self._lose(rank, str(error))

    def _lose(self, rank: int, why: str) -> None:
        if self._over.is_set() or self._told.is_set():
            return
        self._lost = f"{self._peers[rank]} was lost ({why}); --resume continues from the last checkpoint"
        self._told.set()
        for other, connection in self._connections.items():
            if other != rank:
                with contextlib.suppress(OSError):
                    connection.sendall(_LOST + _RANK.pack(rank))
        time.sleep(_GRACE)
        if self._over.is_set() or self._is_taken:
            return
        sys.stderr.write(f"error: {self._lost}\n")
        sys.stderr.flush()
        time.sleep(self._patience)
        self._end(PeerLost.exit_code)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("it hung up")
        data += part
    return data
