"""`equipot probe`: asks a server for its health, or for a structure whose answer it checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import grpc
import typer

from equipot.client.channel import HEALTH_METHOD, Health, channel_options, check_address, decode_health
from equipot.client.errors import ClientError, from_rpc_error

if TYPE_CHECKING:
    from equipot.client.check import Checked, Metadata

MESSAGE_BYTES = 4 * 2**20
"""Enough for any model's card and for the few atoms of the check."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def probe(
    address: Annotated[str, typer.Argument(help="HOST:PORT, or dns:///NAME:PORT")] = "127.0.0.1:50051",
    service: Annotated[
        str, typer.Option(help="whose health is asked for: equipot.readiness, equipot.liveness, or another")
    ] = "equipot.readiness",
    structure: Annotated[
        bool, typer.Option("--structure", help="have each model compute a structure, and check the answer")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds for each call")] = 5.0,
    tls_ca: Annotated[Path | None, typer.Option(help="certificates to trust; this turns TLS on")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="our certificate, if the server wants one")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="the key of our certificate")] = None,
    tls_name: Annotated[str, typer.Option(help="name in the server's certificate, if not the address")] = "",
    token_file: Annotated[Path | None, typer.Option(help="file with our bearer token")] = None,
) -> None:
    """Exit with 0 if the server says SERVING (and answers rightly), else with 1 and the reason.

    With --structure a small cluster of each model's own elements is sent, in two orientations: energies
    must be finite and equal, forces must turn with the cluster.
    """
    credentials = _credentials(tls_ca, tls_cert, tls_key)
    options = channel_options(check_address(address), MESSAGE_BYTES)
    if tls_name:
        options.append(("grpc.ssl_target_name_override", tls_name))
    channel = (
        grpc.secure_channel(address, credentials, options=options)
        if credentials
        else grpc.insecure_channel(address, options=options)
    )
    with channel:
        try:
            health = decode_health(
                channel.unary_unary(HEALTH_METHOD, None, None)(_health_request(service), timeout=timeout)
            )
            if health is not Health.SERVING:
                _fail(f"{address} says {service or 'the server'} is {health}")
            typer.echo(f"{address}: {service or 'the server'} is serving")
            if structure:
                from equipot.client.check import check

                for checked in check(channel, timeout=timeout, metadata=_metadata(token_file)):
                    _report(checked)
        except grpc.RpcError as error:
            raise _Unhealthy(str(from_rpc_error(error, address))) from error


class _Unhealthy(ClientError):
    exit_code = 1


def _fail(reason: str) -> NoReturn:
    raise _Unhealthy(reason)


def _report(checked: Checked) -> None:
    if checked.wrong:
        _fail(f"{checked.model}: {checked.wrong}")
    typer.echo(
        f"{checked.model}: {checked.formula} has {checked.energy:.6f} eV, largest force "
        f"{checked.largest_force:.6f} eV/Å; energies of two orientations differ by "
        f"{checked.energy_error:.1e} eV, forces by {checked.force_error:.1e} eV/Å"
    )


def _health_request(service: str) -> bytes:
    """A grpc.health.v1.HealthCheckRequest, whose one field is a string; by hand as in `channel`."""
    name = service.encode()
    if len(name) > 127:
        raise ClientError(f"the service's name has {len(name)} bytes, 127 are allowed")
    return b"\x0a" + bytes([len(name)]) + name if name else b""


def _credentials(
    ca: Path | None, certificate: Path | None, key: Path | None
) -> grpc.ChannelCredentials | None:
    if (certificate is None) != (key is None):
        raise ClientError("--tls-cert and --tls-key go together: give both or neither")
    if certificate is not None and ca is None:
        raise ClientError("--tls-cert needs --tls-ca: our certificate is shown to servers that we know")
    if ca is None:
        return None
    return grpc.ssl_channel_credentials(
        _read(ca), _read(key) if key else None, _read(certificate) if certificate else None
    )


def _metadata(token_file: Path | None) -> Metadata:
    if token_file is None:
        return ()
    return (("authorization", f"Bearer {_read(token_file).decode().strip()}"),)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read {path}: {error.strerror}") from error
