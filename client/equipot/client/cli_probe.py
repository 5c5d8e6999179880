"""`equipot probe`: asks a server for its health, or for a structure whose answer it checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

import grpc
import typer

from equipot.client.channel import HEALTH_METHOD, Health, channel_options, check_address, decode_health
from equipot.client.credentials import TokenSource
from equipot.client.diagnosis import explained
from equipot.client.errors import ClientError, from_rpc_error
from equipot.client.options import (
    AllowPlaintextToken,
    TlsCa,
    TlsCert,
    TlsKey,
    TlsName,
    TokenFile,
    UseTls,
    shown,
)
from equipot.client.retry import seconds_of

if TYPE_CHECKING:
    from equipot.client.check import Checked

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
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = "",
    token_file: TokenFile = None,
    allow_plaintext_token: AllowPlaintextToken = False,
) -> None:
    """Exit with 0 if the server says SERVING (and answers rightly), else with 1 and the reason.

    With --structure a small cluster of each model's own elements is sent, in two orientations: energies
    must be finite and equal, forces must turn with the cluster.
    """
    credentials = shown(
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
        token_file=token_file,
        allow_plaintext_token=allow_plaintext_token,
    ).credentials()
    credentials.check_address(address)
    options = channel_options(check_address(address), MESSAGE_BYTES)
    channel, timeout = credentials.open(address, options), seconds_of(timeout)
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

                for checked in check(
                    channel, timeout=timeout, metadata=TokenSource(credentials).headers() or ()
                ):
                    _report(checked)
        except grpc.RpcError as error:
            problem = explained(from_rpc_error(error, address), address, credentials.tls)
            raise _Unhealthy(str(problem)) from error


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
