"""What keepers of ranks on several machines say to each other: framed, no pickles, after both showed a key.

Knows nothing of models. The key keeps strangers out; what is said is no more encrypted than what gloo and
NCCL send.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from equipot.serve import rank
from equipot.serve.errors import ServeError

NONCE = 32
LEAST_KEY = 16
LARGEST_HEADER = 2**20
LARGEST_MESSAGE = 2**36
LINGER = "equipot ranks 1"
"""Says which protocol this is, and its version."""

NOTICE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}
"""Seconds, and the last in milliseconds: it counts while something sent is not acknowledged, which keepalives
then leave to the system's quarter of an hour."""

_SIZES = struct.Struct("<QQ")


class WireError(OSError):
    """The other side is gone, is somebody else, or speaks another language."""


class Wire:
    """One connection; one thread may send while another receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that vanished without a word is noticed within a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in NOTICE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: object) -> None:
        """Sends one of the messages that ranks and their keepers exchange."""
        fields, arrays = _to_wire(message)
        blocks = [np.ascontiguousarray(array) for array in arrays]
        header = json.dumps(
            {**fields, "arrays": [[str(block.dtype), list(block.shape)] for block in blocks]}
        ).encode()
        body = b"".join(block.tobytes() for block in blocks)
        self._socket.sendall(_SIZES.pack(len(header), len(body)) + header + body)

    def has_word(self, seconds: float) -> bool:
        """Whether something comes within so many seconds: a message, or the end."""
        return bool(wait([self._socket], seconds))

    def receive(self) -> object:
        """The next message.

        Raises:
            WireError: there is none any more, or it is none.
        """
        n_header, n_body = _SIZES.unpack(self._exactly(_SIZES.size))
        if n_header > LARGEST_HEADER or n_body > LARGEST_MESSAGE:
            raise WireError(f"a message of {n_body} bytes is none of ours")
        try:
            header = json.loads(bytes(self._exactly(n_header)))
            body = self._exactly(n_body)
            arrays, start = [], 0
            for kind, shape in header.pop("arrays"):
                dtype = np.dtype(kind)
                if dtype.hasobject:
                    raise WireError("an array of objects is none of ours")
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                arrays.append(np.frombuffer(body, dtype, size // dtype.itemsize, start).reshape(shape))
                start += size
            return _from_wire(header, arrays)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WireError(f"not understood: {error!r}") from error

    def introduce(self, key: bytes, *, leads: bool, name: str = "") -> str:
        """Shows the key and wants to see it; returns the other side's name.

        Args:
            key: that both know.
            leads: whether this side leads; so that nobody is answered with their own words.
            name: of this side.

        Raises:
            WireError: the other side does not know the key.
        """
        mine = secrets.token_bytes(NONCE)
        said = name.encode()[:200]
        self._socket.sendall(mine + struct.pack("<B", len(said)) + said)
        theirs = bytes(self._exactly(NONCE))
        other = bytes(self._exactly(self._exactly(1)[0]))

        def proof(role: bool, of: bytes, to: bytes, called: bytes) -> bytes:
            words = LINGER.encode() + (b"lead" if role else b"join") + of + to + called
            return hmac.digest(key, words, hashlib.sha256)

        self._socket.sendall(proof(leads, mine, theirs, said))
        if not hmac.compare_digest(bytes(self._exactly(32)), proof(not leads, theirs, mine, other)):
            raise WireError("the other side has another key")
        return other.decode("utf-8", "replace")

    def close(self) -> None:
        """Ends it; a `receive` in another thread returns with an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view, have = memoryview(data), 0
        while have < count:
            got = self._socket.recv_into(view[have:])
            if got == 0:
                raise WireError("the other side is gone")
            have += got
        return data


def read_key(path: Path) -> bytes:
    """The key in a file.

    Raises:
        ServeError: it cannot be read or is too short.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ServeError(f"cannot read the key {path}: {error.strerror}") from error
    if len(key) < LEAST_KEY:
        raise ServeError(f"the key {path} has {len(key)} bytes: give at least {LEAST_KEY}, at random")
    return key


def _to_wire(message: object) -> tuple[dict[str, Any], list[Any]]:
    if isinstance(message, rank.RankConfig):
        fields = {name: getattr(message, name) for name in rank.RankConfig.__slots__}
        return {"kind": "config", **fields, "bundle": str(message.bundle)}, []
    if isinstance(message, rank.Job):
        names = list(message.fields)
        flags = {"forces": message.forces, "stress": message.stress}
        return {"kind": "job", "names": names, **flags}, list(message.fields.values())
    if isinstance(message, rank.Ready):
        return {"kind": "ready", "parameters": message.parameters}, []
    if isinstance(message, rank.Refused):
        return {"kind": "refused", "reason": message.reason}, []
    if isinstance(message, rank.Exhausted):
        return {"kind": "exhausted"}, []
    assert isinstance(message, rank.Outcome)
    parts = {"energy": message.energy, "forces": message.forces, "stress": message.stress}
    present = {name: part for name, part in parts.items() if part is not None}
    return {"kind": "outcome", "names": list(present)}, list(present.values())


def _from_wire(header: dict[str, Any], arrays: list[Any]) -> object:
    kinds: dict[str, Callable[[], object]] = {
        "config": lambda: rank.RankConfig(**{**header, "bundle": Path(header["bundle"])}),
        "job": lambda: rank.Job(
            dict(zip(header["names"], (array.copy() for array in arrays), strict=True)),
            bool(header["forces"]),
            bool(header["stress"]),
        ),
        "ready": lambda: rank.Ready(int(header["parameters"])),
        "refused": lambda: rank.Refused(str(header["reason"])),
        "exhausted": rank.Exhausted,
        "outcome": lambda: rank.Outcome(
            **{"forces": None, "stress": None, **dict(zip(header["names"], arrays, strict=True))}
        ),
    }
    return kinds[header.pop("kind")]()
