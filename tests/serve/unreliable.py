"""A network between a client and a server that breaks when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

CHUNK = 2**16


class Link:
    """Carries a client's connections to a server, as long as it is whole.

    Attributes:
        address: where the client connects.
        cuts: how often connections that were open have been cut.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._broken = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.cuts = 0
        self.address = ""

    async def open(self) -> None:
        """Begins to listen."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Ends all of it."""
        self._broken = True
        self._server.close()
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self, *, for_ever: bool = False) -> None:
        """Resets every connection, as when a machine goes down; others may be made unless it is for ever."""
        self._broken = self._broken or for_ever
        self.cuts += bool(self._writers)
        for writer in self._writers:
            with contextlib.suppress(OSError):
                # So that close() sends RST and throws away what is on its way.
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._writers.clear()

    def stall(self) -> None:
        """Carries nothing more, and tells nobody: as when a cable is pulled, or a process is stopped."""
        self._flowing.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._broken:
            writer.transport.abort()
            return
        try:
            there, onwards = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        if self._broken:  # meanwhile
            for end in (writer, onwards):
                end.transport.abort()
            return
        self._writers |= {writer, onwards}
        for source, sink in ((reader, onwards), (there, writer)):
            pump = asyncio.create_task(self._pump(source, sink, {writer, onwards}))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, ends: set[asyncio.StreamWriter]
    ) -> None:
        try:
            while data := await source.read(CHUNK):
                await self._flowing.wait()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            for writer in ends:
                writer.transport.abort()
            self._writers -= ends


@contextlib.asynccontextmanager
async def links(target: str, count: int) -> AsyncIterator[list[Link]]:
    """So many of them to one server."""
    made = [Link(target) for _ in range(count)]
    for link in made:
        await link.open()
    try:
        yield made
    finally:
        for link in made:
            await link.close()
