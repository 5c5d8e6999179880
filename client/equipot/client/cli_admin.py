"""`equipot admin`: what an operator does to the models of a running server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import grpc
import typer
from rich.console import Console
from rich.table import Table

from equipot.client.channel import channel_options, check_address
from equipot.client.credentials import TokenSource
from equipot.client.errors import from_rpc_error
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
from equipot.client.results import ModelInfo
from equipot.client.retry import seconds_of
from equipot.wire.v1 import admin_pb2 as pb
from equipot.wire.v1.admin_pb2_grpc import AdminServiceStub

MESSAGE_BYTES = 64 * 2**20
"""Enough for the cards of some thousand versions."""

Named = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="without a version: the newest, or all")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
_Reply = TypeVar("_Reply")


@dataclass(frozen=True, slots=True)
class _Door:
    """How to reach the server, and as whom."""

    address: str
    timeout: float
    open: Callable[[], grpc.Channel]
    headers: Callable[[], tuple[tuple[str, str | bytes], ...] | None]

    def ask(self, call: Callable[[AdminServiceStub], Callable[..., _Reply]], request: object) -> _Reply:
        """One call, once: whoever operates wants to know at once."""
        with self.open() as channel:
            try:
                method = call(AdminServiceStub(channel))
                return method(request, timeout=self.timeout, metadata=self.headers())
            except grpc.RpcError as error:
                raise from_rpc_error(error, self.address) from error


@app.callback()
def connect(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="HOST:PORT of the server")] = "127.0.0.1:50051",
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds; large models load for long")] = 600.0,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = "",
    token_file: TokenFile = None,
    allow_plaintext_token: AllowPlaintextToken = False,
) -> None:
    """Load, unload and label the models of a server that was started with --repository and --admin."""
    credentials = shown(
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
        token_file=token_file,
        allow_plaintext_token=allow_plaintext_token,
    ).credentials()
    check_address(address)
    credentials.check_address(address)
    context.obj = _Door(
        address,
        seconds_of(timeout),
        open=lambda: credentials.open(address, channel_options(address, MESSAGE_BYTES)),
        headers=TokenSource(credentials).headers,
    )


@app.command()
def status(context: typer.Context) -> None:
    """Show versions, their states and labels, and what is wrong in the repository."""
    _show(_door(context).ask(lambda stub: stub.GetRepository, pb.GetRepositoryRequest()))


@app.command()
def refresh(context: typer.Context) -> None:
    """Have the server look at its repository now, and show what came of it."""
    _show(_door(context).ask(lambda stub: stub.RefreshRepository, pb.RefreshRepositoryRequest()))


@app.command()
def load(context: typer.Context, model: Named) -> None:
    """Load a version beside what answers, or load it again if its folder has changed."""
    name, _, version = model.partition("@")
    request = pb.LoadModelRequest(name=name, version=version)
    loaded = _door(context).ask(lambda stub: stub.LoadModel, request)
    _say(f"{loaded.name}@{loaded.version} answers ({loaded.digest})")


@app.command()
def unload(context: typer.Context, model: Named) -> None:
    """Let nothing answer under a version any more; requests under way finish."""
    name, _, version = model.partition("@")
    request = pb.UnloadModelRequest(name=name, version=version)
    gone = _door(context).ask(lambda stub: stub.UnloadModel, request).versions
    _say(f"unloaded: {', '.join(f'{name}@{one}' for one in gone) or 'nothing was in memory'}")


@app.command()
def label(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    name: Annotated[str, typer.Argument(metavar="LABEL", help="stable, canary, shadow, or any other")],
    weight: Annotated[float, typer.Option(help="share, from 0 to 1, for canary and shadow")] = 1.0,
) -> None:
    """Let a label name a version, until the model's labels.toml changes or the server ends."""
    family, _, version = model.partition("@")
    wanted = pb.Label(model=family, label=name, version=version, weight=weight)
    _door(context).ask(lambda stub: stub.SetLabel, pb.SetLabelRequest(label=wanted))
    _say(f"{family}@{name} is {family}@{version}")


@app.command()
def unlabel(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="NAME")],
    name: Annotated[str, typer.Argument(metavar="LABEL")],
) -> None:
    """Take a label away, as long."""
    request = pb.RemoveLabelRequest(model=model, label=name)
    _door(context).ask(lambda stub: stub.RemoveLabel, request)
    _say(f"{model} has no label {name} any more")


def _door(context: typer.Context) -> _Door:
    door = context.obj
    assert isinstance(door, _Door)
    return door


def _show(repository: pb.Repository) -> None:
    weights = {(one.model, one.label): one.weight for one in repository.labels}
    table = Table(title=repository.url, title_justify="left")
    for column in ("model", "version", "state", "labels", "digest"):
        table.add_column(column, overflow="fold")
    for message in repository.models:
        info = ModelInfo.from_wire(message)
        labels = [
            f"{name} {weights[info.name, name]:g}" if weights[info.name, name] != 1 else name
            for name in info.labels
        ]
        table.add_row(
            info.name,
            info.version,
            f"{info.state}: {info.reason}" if info.reason else info.state,
            ", ".join([*labels, *(["plain name"] if info.is_current else [])]),
            info.digest[:19],
        )
    Console().print(table)
    for problem in repository.problems:
        _say(f"problem: {problem}")


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)
