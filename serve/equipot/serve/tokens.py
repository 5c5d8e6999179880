"""Whose a bearer token is. Knows the tokens' file, and nothing of gRPC.

The file has a line `identity: sha256:<hex digest of the token>` for each token, or `identity: <token>`; blank
lines and those that begin with # are left out. An identity may have several tokens, so that one can be
changed for another while both work. `equipot token` makes them.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from equipot.serve.errors import ServeError
from equipot.serve.reread import read_bytes

SHORTEST_TOKEN = 16
"""Characters; what is shorter can be guessed."""

_IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/+-]{0,127}")
_DIGEST = re.compile(r"(?i:sha256):([0-9a-fA-F]{64})")
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Tokens:
    """The identities of tokens.

    Only digests are kept, and they are looked up by a hash with a key that is made anew each time: how long
    it takes tells a caller nothing of how near a guess was.

    Args:
        entries: identity and SHA-256 digest of each token.
    """

    def __init__(self, entries: Iterable[tuple[str, bytes]]) -> None:
        self._key = secrets.token_bytes(32)
        self._identities = {self._hidden(digest): identity for identity, digest in entries}

    def __len__(self) -> int:
        return len(self._identities)

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Those of a file.

        Raises:
            ServeError: it cannot be read or a line is wrong, with its number, never with what may be a token.
        """
        try:
            text = read_bytes(path, "--tokens").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ServeError(f"--tokens {path} is not text: {error.reason} at byte {error.start}") from error
        owners: dict[bytes, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            stripped = line.strip()
            if not stripped or stripped.startswith("#"):
                continue
            identity, digest = _entry(stripped, f"--tokens {path}, line {number}")
            owner = owners.setdefault(digest, identity)
            if owner != identity:
                raise ServeError(f"--tokens {path}, line {number}: {identity} has the same token as {owner}")
        if not owners:
            raise ServeError(
                f"--tokens {path} has no token: add one with `equipot token NAME --tokens {path}`"
            )
        return cls((identity, digest) for digest, identity in owners.items())

    def owner_of(self, digest: bytes) -> str | None:
        """The name of the owner of the token with this digest; None if it is nobody's."""
        return self._identities.get(self._hidden(digest))

    def _hidden(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._key, digest_size=32).digest()


def digest_of(token: str) -> bytes:
    """SHA-256 of a token, or of any bytes that a header held in place of one."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _entry(line: str, place: str) -> tuple[str, bytes]:
    identity, colon, secret = (part.strip() for part in line.partition(":"))
    if not colon:
        raise ServeError(f"{place}: no colon; write `identity: sha256:<digest>`")
    if not _IDENTITY.fullmatch(identity):
        raise ServeError(
            f"{place}: what stands before the colon is no identity: allowed are letters, digits and ._@/+-,"
            " the first one a letter or digit, 128 at most"
        )
    # In any case of letters: as a token of its own it would be one that the file tells.
    if secret.lower().startswith("sha256:"):
        found = _DIGEST.fullmatch(secret)
        if not found:
            raise ServeError(f"{place}: what follows sha256: is not 64 hexadecimal digits")
        return identity, bytes.fromhex(found[1])
    if len(secret) < SHORTEST_TOKEN:
        raise ServeError(
            f"{place}: the token of {identity} has {len(secret)} characters, and needs {SHORTEST_TOKEN} at"
            " least: make one with `equipot token`"
        )
    if not _TOKEN.fullmatch(secret):
        raise ServeError(
            f"{place}: the token of {identity} has a space or a character that no header can carry"
        )
    return identity, digest_of(secret)
