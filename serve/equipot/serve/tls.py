"""The server's certificates: read, checked, and handed to gRPC again when they change on disk."""

from __future__ import annotations

import logging
import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from equipot.serve.errors import ServeError
from equipot.serve.reread import Reread, read_bytes

if TYPE_CHECKING:
    from cryptography import x509

_BEGIN = re.compile(rb"^-----BEGIN (?:X509 )?CERTIFICATE-----", re.MULTILINE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the certificates are.

    Attributes:
        certificate: the server's own, followed by those that lead to its CA, as PEM.
        key: its private key, as PEM and without a password.
        client_ca: of those whose certificates are accepted; None asks callers for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """All of them."""
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]


@dataclass(frozen=True, slots=True)
class Material:
    """What the files held when they were read.

    Attributes:
        chain: PEM.
        key: PEM.
        client_ca: PEM; None asks callers for no certificate.
        expires: when the server's certificate is no longer valid.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime


class Certificates:
    """The server's side of TLS, rotated without a restart: new connections get what is on disk now.

    Raises:
        ServeError: a file cannot be read, or certificate and key cannot be used together now.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._material = Reread("TLS certificate", files.paths, lambda: read_material(files))
        self._fresh: grpc.ServerCertificateConfiguration | None = None
        self._web: ssl.SSLContext | None = None

    @property
    def expires(self) -> float:
        """When the certificate in use ends, as a Unix time."""
        return self._material.value.expires.timestamp()

    def refresh(self) -> bool:
        """Reads the files again if they have changed; a pair that cannot be used is logged and left out."""
        changed = self._material.refresh()
        if changed:
            self._fresh = _configuration(self._material.value)
            if self._web is not None:
                try:
                    self._web = _web_context(self._files)
                except ServeError as error:
                    logger.error("the page's certificate stays as it is: %s", error)
        return changed

    def web_context(self) -> ssl.SSLContext:
        """For an HTTPS server, which asks callers for no certificate.

        Raises:
            ServeError: HTTPS cannot use them: they have changed since they were read, or are too weak.
        """
        front = self._web = _web_context(self._files)

        def latest(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._web or front

        # Asked in each handshake: a context that is in use is not given another certificate.
        front.sni_callback = latest
        return front

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of a server."""
        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            _configuration(self._material.value),
            self._fetch,  # type: ignore[arg-type]  # None means no change
            require_client_authentication=self._files.client_ca is not None,
        )
        return credentials

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """In a thread of gRPC's, before each handshake: what has changed since the last one."""
        fresh, self._fresh = self._fresh, None
        return fresh


def read_material(files: TlsFiles) -> Material:
    """Reads and checks the files.

    Raises:
        ServeError: as in `Certificates`, naming the file and the remedy.
    """
    chain = read_bytes(files.certificate, "--tls-cert")
    key = read_bytes(files.key, "--tls-key")
    client_ca = None if files.client_ca is None else read_bytes(files.client_ca, "--tls-client-ca")
    certificates = _certificates(chain, files.certificate, "--tls-cert")
    _check_pair(certificates, key, files)
    _check_dates(certificates[0], files.certificate, "--tls-cert")
    if client_ca is not None:
        assert files.client_ca is not None
        # The newest: a bundle in which one CA takes over from another may hold one that has expired.
        authorities = _certificates(client_ca, files.client_ca, "--tls-client-ca")
        newest = max(authorities, key=lambda authority: authority.not_valid_after_utc)
        _check_dates(newest, files.client_ca, "--tls-client-ca")
    return Material(chain, key, client_ca, certificates[0].not_valid_after_utc)


def _web_context(files: TlsFiles) -> ssl.SSLContext:
    """A context of what is in the files now.

    Raises:
        ServeError: it cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.certificate, files.key, password="")
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise ServeError(f"HTTPS cannot use {files.certificate} with {files.key}: {why}") from error
    return context


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    pairs = [(material.key, material.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=material.client_ca)


def _certificates(pem: bytes, path: Path, flag: str) -> list[x509.Certificate]:
    # Only now: a server without TLS need not wait for it.
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ServeError(f"{flag} {path} holds no certificate in PEM form ({error})") from error
    # What is only half there is passed over in reading: callers would miss what leads to their CA.
    if len(_BEGIN.findall(pem)) != len(found):
        raise ServeError(
            f"{flag} {path} holds a certificate that is cut off, or whose BEGIN does not begin its line:"
            " write the file again"
        )
    return found


def _check_pair(chain: list[x509.Certificate], pem: bytes, files: TlsFiles) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise ServeError(
            f"--tls-key {files.key} is locked by a password: write it without one (openssl pkey -in … -out …)"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ServeError(f"--tls-key {files.key} holds no private key in PEM form") from error
    public = key.public_key()
    try:
        owners = [certificate.public_key() == public for certificate in chain]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ServeError(
            f"--tls-cert {files.certificate} has a certificate whose key is of no kind known here ({error})"
        ) from error
    if not any(owners):
        raise ServeError(
            f"--tls-key {files.key} is not the key of --tls-cert {files.certificate}: give the pair that was"
            " made together"
        )
    if not owners[0]:
        raise ServeError(
            f"--tls-cert {files.certificate} has the server's own certificate at place"
            f" {owners.index(True) + 1}: put it first, and those of its CAs after it"
        )
    _check_kind(public, files.certificate)


def _check_kind(public: object, path: Path) -> None:
    """With other keys gRPC listens, or says that it cannot, and each handshake fails without a word here."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if isinstance(public, rsa.RSAPublicKey):
        return
    if isinstance(public, ec.EllipticCurvePublicKey):
        if isinstance(public.curve, ec.SECP256R1 | ec.SECP384R1):
            return
        kind = public.curve.name
    else:
        kind = type(public).__name__.removeprefix("_").removesuffix("PublicKey")
    raise ServeError(
        f"--tls-cert {path} has a key of the kind {kind}, with which gRPC's callers make no connection: make"
        " one with a key of RSA or of the curve P-256 or P-384"
    )


def _check_dates(certificate: x509.Certificate, path: Path, flag: str) -> None:
    now = datetime.now(UTC)
    if now >= certificate.not_valid_after_utc:
        raise ServeError(
            f"{flag} {path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: renew it"
        )
    if now < certificate.not_valid_before_utc:
        raise ServeError(
            f"{flag} {path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and"
            f" it is {now:%Y-%m-%d %H:%M}: wait, or set the clock"
        )
