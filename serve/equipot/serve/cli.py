"""`equipot serve`: words on the command line to a running server."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from equipot.serve.batcher import Budget
from equipot.serve.config import (
    BATCH_ATOMS,
    DEFAULT_AGE,
    DEFAULT_KEEPALIVE,
    DEFAULT_LIMITS,
    DEFAULT_QUEUE_EDGES,
    DEFAULT_SESSIONS,
    RequestLimits,
    ServeConfig,
    SessionLimits,
    default_budget,
)
from equipot.serve.logs import configure
from equipot.serve.repository.settings import Preload, RepositorySettings, default_cache

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Dtype(StrEnum):
    """What the network can compute in."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


class LogStyle(StrEnum):
    """How the log is written."""

    TEXT = "text"
    JSON = "json"


def _edges_or_auto(word: str) -> int | None:
    if word == "auto":
        return None
    try:
        return int(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is neither a number nor auto") from None


@app.command()
def serve(
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Written by `equipot export`; the first is the default model.")
    ] = None,
    repository: Annotated[
        str | None, typer.Option(help="Folder or fsspec URL that holds NAME/VERSION/ bundles.")
    ] = None,
    repository_poll: Annotated[
        float, typer.Option(help="Seconds between two looks at the repository; 0: only when told by --admin.")
    ] = 30.0,
    preload: Annotated[
        Preload,
        typer.Option(
            help="What of the repository is loaded before it is asked for: what plain names and labels mean,"
            " all versions, none."
        ),
    ] = Preload.DEFAULT,
    max_loaded: Annotated[
        int | None, typer.Option(help="Most versions in memory; the one longest unused goes.")
    ] = None,
    unload_after: Annotated[
        float, typer.Option(help="Seconds after its last request when a replaced version leaves memory.")
    ] = 10.0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where remote bundles are kept; by default the user's cache folder."),
    ] = None,
    default_model: Annotated[
        str, typer.Option(help="The repository's model that callers get who name none.")
    ] = "",
    admin: Annotated[
        list[str] | None,
        typer.Option(help="Identity that may load, unload and label models; '*' lets anyone. Repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Name or address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the gRPC service; 0 takes any free one.")] = 50051,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0 takes any free one.")] = 9090,
    no_metrics: Annotated[bool, typer.Option("--no-metrics", help="Serve no metrics.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="What to compute in; by default as stored.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute, as torch names it.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="Threads that compute; by default as many as a batch keeps busy.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same bits for a structure whatever shares its batch.")
    ] = False,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="Processes to spread each model's weights over; they share the threads, or take a GPU each."
        ),
    ] = 1,
    max_atoms: Annotated[
        int, typer.Option(help="Most atoms in one structure.")
    ] = DEFAULT_LIMITS.structure_atoms,
    max_edges: Annotated[
        int, typer.Option(help="Most pairs of atoms within the cutoff, both ways, in one structure.")
    ] = DEFAULT_LIMITS.structure_edges,
    max_request_structures: Annotated[
        int, typer.Option(help="Most structures in one request.")
    ] = DEFAULT_LIMITS.request_structures,
    max_request_atoms: Annotated[
        int, typer.Option(help="Most atoms in one request.")
    ] = DEFAULT_LIMITS.request_atoms,
    max_batch_edges: Annotated[
        int | None,
        typer.Option(
            parser=_edges_or_auto,
            metavar="INTEGER|auto",
            help="Most edges computed together; auto measures at start what suits model, machine and memory.",
        ),
    ] = None,
    max_queue_edges: Annotated[
        int, typer.Option(help="Edges that may wait before requests are refused.")
    ] = DEFAULT_QUEUE_EDGES,
    max_message_mb: Annotated[int, typer.Option(help="Most MiB in one request message.")] = (
        DEFAULT_LIMITS.message_bytes // 2**20
    ),
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of the server's certificate; read again when it changes.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of CAs, of one of which callers must have a certificate (mTLS)."),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="File of bearer tokens, one of which callers must show; `equipot token` makes them."
        ),
    ] = None,
    allow_plaintext_tokens: Annotated[
        bool, typer.Option("--allow-plaintext-tokens", help="Take tokens without TLS from other machines.")
    ] = False,
    identity_limits: Annotated[
        Path | None, typer.Option(help="TOML file of what each identity may ask for.")
    ] = None,
    no_reflection: Annotated[
        bool, typer.Option("--no-reflection", help="Do not tell callers which services there are.")
    ] = False,
    metrics_host: Annotated[
        str | None, typer.Option(help="Name or address of /metrics; by default that of --host.")
    ] = None,
    max_connection_age: Annotated[
        float, typer.Option(help="Seconds after which callers are told to connect anew; 0 is never.")
    ] = DEFAULT_AGE,
    keepalive: Annotated[
        float, typer.Option(help="Seconds of silence after which a caller is asked if it is there.")
    ] = DEFAULT_KEEPALIVE,
    log_format: Annotated[LogStyle, typer.Option(help="Of the log on stderr.")] = LogStyle.TEXT,
    log_structures: Annotated[
        bool, typer.Option("--log-structures", help="Log the structures of requests, too.")
    ] = False,
    max_sessions: Annotated[
        int, typer.Option(help="Most sessions open at once; 0 lets none be opened.")
    ] = DEFAULT_SESSIONS.most,
    session_idle: Annotated[
        float, typer.Option(help="Seconds without a step after which a session is ended.")
    ] = DEFAULT_SESSIONS.idle_seconds,
    drain_seconds: Annotated[
        float, typer.Option(help="How long accepted requests may take once the server is told to stop.")
    ] = 30.0,
    linger_seconds: Annotated[
        float,
        typer.Option(help="How long before that new calls are still taken, while health says NOT_SERVING."),
    ] = 0.0,
) -> None:
    """Serve bundles over gRPC, with health, reflection and Prometheus metrics, until SIGTERM."""
    configure(log_format.value)
    config = ServeConfig(
        bundles=tuple(bundles or ()),
        repository=None
        if repository is None
        else RepositorySettings(
            url=repository,
            poll=repository_poll,
            preload=preload,
            max_loaded=max_loaded,
            unload_after=unload_after,
            cache=cache or default_cache(),
            default=default_model,
        ),
        admins=tuple(admin or ()),
        host=host,
        port=port,
        metrics_port=None if no_metrics else metrics_port,
        dtype=dtype.value if dtype else None,
        device=device,
        threads=threads,
        deterministic=deterministic,
        tensor_parallel=tensor_parallel,
        sessions=SessionLimits(most=max_sessions, idle_seconds=session_idle),
        drain_seconds=drain_seconds,
        linger_seconds=linger_seconds,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        tokens=tokens,
        allow_plaintext_tokens=allow_plaintext_tokens,
        identity_limits=identity_limits,
        reflection=not no_reflection,
        metrics_host=metrics_host,
        max_connection_age=max_connection_age,
        keepalive=keepalive,
        log_format=log_format.value,
        log_structures=log_structures,
        budget=Budget(
            batch_edges=default_budget(device).batch_edges if max_batch_edges is None else max_batch_edges,
            batch_atoms=BATCH_ATOMS,
            queue_edges=max_queue_edges,
        ),
        calibrate=max_batch_edges is None,
        limits=RequestLimits(
            structure_atoms=max_atoms,
            structure_edges=max_edges,
            request_structures=max_request_structures,
            request_atoms=max_request_atoms,
            message_bytes=max_message_mb * 2**20,
        ),
    )
    # Only now: torch takes seconds to import, and neither help nor a wrong word should wait for it.
    from equipot.serve.server import run

    asyncio.run(run(config, typer.echo))
