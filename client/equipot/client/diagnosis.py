"""Why a connection did not come about: gRPC often says no more than that it was closed.

Asked only after a call has failed so. Connects once more with Python's own TLS, which names what is wrong.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Callable
from functools import partial

from equipot.client.credentials import Tls
from equipot.client.errors import ClientError, NotTrusted, ServerUnavailable

PATIENCE = 2.0
"""Seconds for the other side to say something."""

_EXPIRED, _NOT_YET = 10, 9
_UNKNOWN_ISSUER = {18, 19, 20, 21}
_WRONG_NAME = {62, 64}

_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE")


def explained(problem: ClientError, address: str, tls: Tls | None) -> ClientError:
    """The same problem, or the lack of trust that is behind it."""
    if isinstance(problem, ServerUnavailable) and not problem.reached:
        reason = trust_problem(address, tls)
        if reason is not None:
            return NotTrusted(reason)
    return problem


def trust_problem(address: str, tls: Tls | None) -> str | None:
    """What keeps the two sides from trusting each other, and the remedy; None if nothing does."""
    place = re.fullmatch(r"\[?([^\[\]/]+?)\]?:(\d+)", address)
    if place is None:
        # A scheme that gRPC resolves by itself.
        return None
    connect = partial(socket.create_connection, (place[1], int(place[2])), timeout=PATIENCE)
    try:
        with connect() as connection:
            if tls is None:
                return _speaks_tls(connection, address)
            name = tls.name or place[1]
            reason = _distrust_of_server(connection, address, tls, name)
        if reason is not None:
            return reason
        # Twice: a server that just stops closes connections, too, but takes no new ones.
        if all(_is_refused(connect, tls, name) for _ in range(2)):
            return _distrust_of_caller(address, tls)
    except OSError:
        pass
    return None


def _speaks_tls(connection: socket.socket, address: str) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        context.wrap_socket(connection).close()
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return None
    return f"{address} speaks TLS, and this client does not: give tls=Tls(ca=…), or --tls-ca"


def _distrust_of_server(connection: socket.socket, address: str, tls: Tls, name: str) -> str | None:
    try:
        tls.context().wrap_socket(connection, server_hostname=name).close()
    except ssl.SSLCertVerificationError as error:
        return _distrust(error, address, tls, name)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if "WRONG_VERSION" in reason or "RECORD" in reason or "HTTP" in reason:
            return f"{address} does not speak TLS: leave TLS out, or start the server with --tls-cert"
    return None


def _is_refused(connect: Callable[[], socket.socket], tls: Tls, name: str) -> bool:
    """Whether the server ends the connection when it has seen whether we have a certificate, and which.

    With TLS 1.3 that comes after our side of the handshake is done; gRPC's servers close without an alert.
    """
    with connect() as connection:
        try:
            with tls.context().wrap_socket(connection, server_hostname=name) as secured:
                return secured.recv(1) == b""
        except (ssl.SSLEOFError, ConnectionResetError):
            return True
        except ssl.SSLError as error:
            return any(alert in (error.reason or "") for alert in _ALERTS)


def _distrust_of_caller(address: str, tls: Tls) -> str:
    if tls.cert is None:
        return (
            f"{address} asks for a client certificate, it seems: it closed the connection when none was"
            " shown; give tls=Tls(cert=…, key=…), or --tls-cert and --tls-key"
        )
    why = _why_not_valid(tls)
    if why is not None:
        return f"{address} refuses our certificate {tls.cert}: {why}"
    return (
        f"{address} closed the connection when it saw our certificate {tls.cert}: it takes those of the"
        " authorities in its --tls-client-ca, made out to clients"
    )


def _why_not_valid(tls: Tls) -> str | None:
    """What the clock says of our own certificate: a handshake with ourselves, as nothing else reads it."""
    assert tls.cert is not None
    assert tls.key is not None
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tls.cert, tls.key)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.load_verify_locations(tls.cert)
    client_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(there, back, server_side=True)
    client = client_side.wrap_bio(back, there)
    for _ in range(2):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            return {_EXPIRED: "it has expired, renew it", _NOT_YET: "it is not valid yet"}.get(
                error.verify_code
            )
        with contextlib.suppress(ssl.SSLWantReadError):
            server.do_handshake()
    return None


def _distrust(error: ssl.SSLCertVerificationError, address: str, tls: Tls, name: str) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return f"the certificate of {address}, or of its authority, has expired: the server needs a new one"
    if code == _NOT_YET:
        return f"the certificate of {address} is not valid yet: compare the clocks of both machines"
    if code in _UNKNOWN_ISSUER:
        trusted = "the public authorities" if tls.ca is None else str(tls.ca)
        return (
            f"the certificate of {address} is of none of the trusted authorities ({trusted}): give the file"
            " of its own as tls=Tls(ca=…), or --tls-ca"
        )
    if code in _WRONG_NAME:
        return (
            f"the certificate of {address} is not made out to {name}: connect by a name that is in it, or"
            " name one of these by tls=Tls(name=…), or --tls-name"
        )
    return f"the certificate of {address} is not trusted: {error.verify_message}"
