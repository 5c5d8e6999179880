"""Who a client trusts and who it says it is: certificates and bearer tokens. Knows no service."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from equipot.client.errors import ClientError
from equipot.client.tracing import aio_interceptors, traced

Metadata = tuple[tuple[str, str | bytes], ...]
Options = list[tuple[str, int | str]]
FileState = tuple[tuple[int, ...], ...]

_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """How a client encrypts and whom it trusts.

    Attributes:
        ca: PEM file of the authorities whose servers are trusted; None: the public ones, which gRPC brings.
        cert: PEM file of the client's own certificate, for servers that ask for one.
        key: PEM file of its private key.
        name: in the server's certificate, if it is another than that in the address.

    A client looks for new files before each call, and connects anew with a pair that has changed.

    Raises:
        ClientError: a file cannot be read or used, or certificate and key do not belong together.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ClientError("a client's certificate and its key go together: give both or neither")
        self.context()

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS, which names what is wrong."""
        context = ssl.create_default_context()
        # gRPC does not ask for as much of certificates.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.ca is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                context.load_verify_locations(cadata=_read(self.ca).decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise ClientError(f"{os.fspath(self.ca)} holds no certificate in PEM form") from error
        if self.cert is not None and self.key is not None:
            _load_own(context, self.cert, self.key)
        context.set_alpn_protocols(["h2"])
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """The same for gRPC."""
        return grpc.ssl_channel_credentials(
            None if self.ca is None else _read(self.ca),
            None if self.key is None else _read(self.key),
            None if self.cert is None else _read(self.cert),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a client shows, and what it asks its server to show.

    Attributes:
        tls: None: not encrypted.
        token: to show with each call; empty: none.
        token_file: whose text is shown, read again when the file changes.
        allow_plaintext_token: whether the token may leave this machine unencrypted.

    Raises:
        ClientError: both a token and a file, or a token that no header can carry.
    """

    tls: Tls | None = None
    token: str = field(default="", repr=False)
    token_file: str | os.PathLike[str] | None = None
    allow_plaintext_token: bool = False

    def __post_init__(self) -> None:
        if self.token and self.token_file is not None:
            raise ClientError("give a token or a token file, not both")
        if self.token:
            _checked(self.token, "the token")

    def check_address(self, address: str) -> None:
        """Refuses to tell a token to whoever listens on the way.

        Raises:
            ClientError: it would leave this machine unencrypted.
        """
        shown = self.token or self.token_file is not None
        if shown and self.tls is None and not self.allow_plaintext_token and not is_local(address):
            raise ClientError(
                f"the token would travel to {address} unencrypted: connect by TLS (tls=Tls(ca=…), --tls-ca),"
                " or allow it if something else encrypts (allow_plaintext_token=True,"
                " --allow-plaintext-token)"
            )

    def state(self) -> FileState:
        """Which files of certificates there are now, to be compared with those of another time."""
        if self.tls is None:
            return ()
        return tuple(
            _signature(path) for path in (self.tls.ca, self.tls.cert, self.tls.key) if path is not None
        )

    def is_renewed(self, since: FileState) -> bool:
        """Whether there are other files than at that time, and they can be used."""
        if self.tls is None or self.state() == since:
            return False
        try:
            self.tls.context()
        except ClientError:
            # Half of a new pair: the other half is on its way.
            return False
        return True

    def open(self, address: str, options: Options) -> grpc.Channel:
        """A channel to this address."""
        if self.tls is None:
            return traced(grpc.insecure_channel(address, options=options))
        options = [*options, *self._name_option()]
        return traced(grpc.secure_channel(address, self.tls.channel_credentials(), options=options))

    def open_aio(self, address: str, options: Options) -> grpc.aio.Channel:
        """The same for asyncio."""
        interceptors = aio_interceptors()
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
        return grpc.aio.secure_channel(
            address,
            self.tls.channel_credentials(),
            options=[*options, *self._name_option()],
            interceptors=interceptors,
        )

    def _name_option(self) -> Options:
        assert self.tls is not None
        return [("grpc.ssl_target_name_override", self.tls.name)] if self.tls.name else []


class TokenSource:
    """The headers that show a client's token, current with its file."""

    def __init__(self, credentials: Credentials) -> None:
        self._file = credentials.token_file
        self._headers = _headers(credentials.token) if credentials.token else None
        self._seen: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    def headers(self) -> Metadata | None:
        """For one call; None if nothing is to be shown.

        Raises:
            ClientError: the file cannot be read, or holds no token.
        """
        if self._file is None:
            return self._headers
        try:
            seen = _stat(self._file)
        except OSError as error:
            raise ClientError(f"token file {os.fspath(self._file)}: {error.strerror}") from error
        with self._lock:
            if seen != self._seen:
                place = f"token file {os.fspath(self._file)}"
                text = _read(self._file).decode("utf-8", "replace").strip()
                self._headers = _headers(_checked(text, place))
                self._seen = seen
            return self._headers


def is_local(address: str) -> bool:
    """Whether nobody outside this machine is reached by the address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stat(path: str | os.PathLike[str]) -> tuple[int, ...]:
    state = os.stat(path)  # noqa: PTH116  # a path as it was given
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _signature(path: str | os.PathLike[str]) -> tuple[int, ...]:
    try:
        return _stat(path)
    except OSError:
        return ()


def _headers(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def _checked(token: str, what: str) -> str:
    if not token:
        raise ClientError(f"{what} is empty")
    if not _TOKEN.fullmatch(token):
        raise ClientError(
            f"{what} holds a space, a line break or a letter that no header can carry: give one token"
        )
    return token


def _load_own(context: ssl.SSLContext, cert: str | os.PathLike[str], key: str | os.PathLike[str]) -> None:
    for path in (cert, key):
        _read(path)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except _LockedError as error:
        raise ClientError(f"{os.fspath(key)} is locked by a password: write it without one") from error
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"{os.fspath(key)} is not the key of {os.fspath(cert)}"
        else:
            message = f"{os.fspath(cert)} and {os.fspath(key)} hold no certificate and key in PEM form"
        raise ClientError(message) from error


class _LockedError(Exception):
    pass


def _no_password() -> str:
    raise _LockedError


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
