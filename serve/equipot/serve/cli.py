"""`equipot serve`: words on the command line to a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from equipot.serve.config import (
    BATCH_ATOMS,
    CPU_BUDGET,
    DEFAULT_AGE,
    DEFAULT_KEEPALIVE,
    DEFAULT_LIMITS,
    DEFAULT_QUEUE_EDGES,
    DEFAULT_SESSIONS,
    ServeConfig,
)
from equipot.serve.config_file import overlay, read_toml
from equipot.serve.errors import ServeError
from equipot.serve.foreign.spec import calculators
from equipot.serve.heap import share_one
from equipot.serve.logs import configure
from equipot.serve.repository.settings import Preload, anchored

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Dtype(StrEnum):
    """What the network can compute in."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


class LogStyle(StrEnum):
    """How the log is written."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """From which on there are lines in the log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _edges_or_auto(word: str) -> int | None:
    if word == "auto":
        return None
    try:
        return int(word)
    except ValueError:
        raise typer.BadParameter(f"{word!r} is neither a number nor auto") from None


RAY = "ray"
"""The table of a configuration that is about replicas under Ray."""

TABLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "max_atoms": ("limits", "structure_atoms"),
        "max_edges": ("limits", "structure_edges"),
        "max_request_structures": ("limits", "request_structures"),
        "max_request_atoms": ("limits", "request_atoms"),
        "max_queue_edges": ("budget", "queue_edges"),
        "max_batch_atoms": ("budget", "batch_atoms"),
        "ageing_seconds": ("budget", "ageing_seconds"),
        "max_sessions": ("sessions", "most"),
        "session_idle": ("sessions", "idle_seconds"),
        "jobs": ("jobs", "folder"),
        "repository": ("repository", "url"),
        "repository_poll": ("repository", "poll"),
        "preload": ("repository", "preload"),
        "max_loaded": ("repository", "max_loaded"),
        "unload_after": ("repository", "unload_after"),
        "cache": ("repository", "cache"),
        "default_model": ("repository", "default"),
        "replicas": (RAY, "replicas"),
        "max_replicas": (RAY, "max_replicas"),
    }
)
"""Options that have another name in a configuration: its table and key. All others are called alike."""


@app.command()
def serve(
    context: typer.Context,
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Written by `equipot export`; the first is the default model.")
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file of what is said here; what is said here goes before it."),
    ] = None,
    calculator: Annotated[
        list[str] | None,
        typer.Option(
            help="Serve an ASE calculator, module:factory (ase.calculators.emt:EMT), chgnet, mace:FILE, or a"
            " FILE.toml that says more. Repeatable."
        ),
    ] = None,
    calculator_arguments: Annotated[
        str, typer.Option(help="Keyword arguments of the one calculator, as a JSON object.")
    ] = "",
    level_of_theory: Annotated[str, typer.Option(help="Of the one calculator's energies.")] = "",
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
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="Serve as a Ray Serve application, in a Ray of its own or of RAY_ADDRESS."
        ),
    ] = False,
    mii: Annotated[
        bool, typer.Option("--mii", help="Serve through DeepSpeed-MII's server, for MII's clients alone.")
    ] = False,
    replicas: Annotated[int, typer.Option(help="How many servers: under Ray at least, under MII.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="How many servers under Ray there may be while there is work.")
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
    worker_hosts: Annotated[
        int, typer.Option(help="Other machines that take their share of these processes; see equipot join.")
    ] = 0,
    worker_port: Annotated[int, typer.Option(help="Port on which they are waited for.")] = 50052,
    worker_key: Annotated[
        Path | None, typer.Option(help="File of random text that they and this server have.")
    ] = None,
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
    max_batch_atoms: Annotated[
        int, typer.Option(help="Most atoms computed together, for structures with few edges.")
    ] = BATCH_ATOMS,
    ageing_seconds: Annotated[
        float,
        typer.Option(
            help="Seconds for which more urgent requests pass others over until those rise a priority."
        ),
    ] = CPU_BUDGET.ageing_seconds,
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
    ui: Annotated[
        bool | None,
        typer.Option(
            "--ui/--no-ui",
            help="Offer a page to look at, at /ui where /metrics is, by HTTPS if there is a certificate; by"
            " default to this machine alone.",
        ),
    ] = None,
    max_connection_age: Annotated[
        float, typer.Option(help="Seconds after which callers are told to connect anew; 0 is never.")
    ] = DEFAULT_AGE,
    keepalive: Annotated[
        float, typer.Option(help="Seconds of silence after which a caller is asked if it is there.")
    ] = DEFAULT_KEEPALIVE,
    log_format: Annotated[LogStyle, typer.Option(help="Of the log on stderr.")] = LogStyle.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option(help="From which on the log has lines; calls have theirs at info.")
    ] = LogLevel.INFO,
    log_structures: Annotated[
        bool, typer.Option("--log-structures", help="Log the structures of requests, too.")
    ] = False,
    max_sessions: Annotated[
        int, typer.Option(help="Most sessions open at once; 0 lets none be opened.")
    ] = DEFAULT_SESSIONS.most,
    session_idle: Annotated[
        float, typer.Option(help="Seconds without a step after which a session is ended.")
    ] = DEFAULT_SESSIONS.idle_seconds,
    max_session_mb: Annotated[
        int,
        typer.Option(
            help="Most MiB of structures and neighbour lists that sessions and motions keep together."
        ),
    ] = DEFAULT_SESSIONS.memory_bytes // 2**20,
    jobs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for jobs, which go on without their callers and after restarts; this server's own.",
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="How long accepted requests may take once the server is told to stop.")
    ] = 30.0,
    linger_seconds: Annotated[
        float,
        typer.Option(help="How long before that new calls are still taken, while health says NOT_SERVING."),
    ] = 0.0,
) -> None:
    """Serve bundles over gRPC, with health, reflection and Prometheus metrics, until SIGTERM."""
    if ray and mii:
        raise ServeError("--ray and --mii exclude each other")
    words = said(context)
    if not ray:
        _refuse_replicas(words, mii=mii)
    mapping, base = configuration(config_file, words)
    # Only below: torch and Ray take seconds to import, and neither help nor a wrong word should wait for it.
    if ray:
        configure(LogStyle.TEXT.value, log_level.value)
        from equipot.serve.ray_app.local import run as run_under_ray

        run_under_ray(mapping, base=base, announce=typer.echo)
        return
    mapping.pop(RAY, None)
    config = ServeConfig.from_mapping(mapping, base=base)
    configure(config.log_format, config.log_level)
    if mii:
        from equipot.serve.mii_front.server import run as run_under_mii

        run_under_mii(config, replicas=replicas, announce=typer.echo)
        return
    share_one()
    from equipot.serve.server import run

    asyncio.run(run(config, typer.echo))


def _refuse_replicas(words: Mapping[str, object], *, mii: bool) -> None:
    """A file's table may be of another start of the same servers; what is typed is meant for this one."""
    replicas = words.get(RAY, {})
    if isinstance(replicas, Mapping) and "max_replicas" in replicas:
        raise ServeError("--max-replicas is for servers under Ray: give --ray, too")
    if not mii and isinstance(replicas, Mapping) and "replicas" in replicas:
        raise ServeError("--replicas is for servers under Ray or MII: give --ray or --mii, too")


def configuration(file: Path | None, words: Mapping[str, object]) -> tuple[dict[str, object], Path]:
    """What the file and, before it, the words say, and the folder that relative paths in it start from.

    Raises:
        ServeError: the file cannot be read.
    """
    if file is None:
        return dict(words), Path()
    return overlay(read_toml(file), words), file.absolute().parent


def said(context: typer.Context) -> dict[str, object]:
    """What the command line says itself, as a configuration has it."""
    given = {}
    for option, value in context.params.items():
        source = context.get_parameter_source(option)
        # By name: typer brings a click of its own, or not.
        if source is not None and source.name == "COMMANDLINE":
            given[option] = value
    for other in ("metrics_port", "metrics_host"):
        if "no_metrics" in given and other in given:
            raise ServeError(f"--no-metrics and --{other.replace('_', '-')} exclude each other")
    named = given.pop("calculator", [])
    foreign = calculators(
        named,
        arguments=given.pop("calculator_arguments", ""),
        level_of_theory=given.pop("level_of_theory", ""),
    )
    words: dict[str, object] = {"calculators": foreign} if named else {}
    for option, value in given.items():
        words = overlay(words, _setting(option, value))
    return words


def _setting(option: str, value: object) -> dict[str, object]:
    """One option in the words of a configuration."""
    match option, value:
        case "config_file" | "ray" | "mii", _:
            return {}
        case "no_metrics", _:
            return {"metrics_port": None}
        case "no_reflection", _:
            return {"reflection": False}
        case "admin", identities:
            return {"admins": identities}
        case "max_batch_edges", None:
            return {"calibrate": True}
        case "max_batch_edges", edges:
            return {"calibrate": False, "budget": {"batch_edges": edges}}
        case "max_session_mb", int(megabytes):
            return {"sessions": {"memory_bytes": megabytes * 2**20}}
        case "max_message_mb", int(megabytes):
            return {"limits": {"message_bytes": megabytes * 2**20}}
        case "repository", str(url):
            value = anchored(url, Path.cwd())
        case _, Path():
            value = value.absolute()
        case _, StrEnum():
            value = value.value
        case "bundles", list(paths):
            value = [Path(path).absolute() for path in paths]
    if option in TABLES:
        table, key = TABLES[option]
        return {table: {key: value}}
    return {option: value}
