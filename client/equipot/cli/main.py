"""Dispatches `equipot VERB …` to the part that owns the verb, which is imported only then."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from equipot.cli.telemetry import set_up


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb of the command line: what it does, where its typer app lies, which extra it needs."""

    summary: str
    module: str
    app: str
    extra: str


VERBS: dict[str, Verb] = {
    "data": Verb("import, inspect and split labelled structures", "equipot.train.cli_data", "app", "train"),
    "train": Verb("train a potential from a recipe", "equipot.train.cli_train", "app", "train"),
    "memory": Verb(
        "predict and measure what a training run takes", "equipot.train.memory.cli_memory", "app", "train"
    ),
    "scaling": Verb("run studies of scaling laws", "equipot.train.scaling.cli", "app", "train"),
    "export": Verb("turn a checkpoint into a bundle", "equipot.train.cli_export", "app", "train"),
    "ensemble": Verb("join bundles into one", "equipot.train.cli_uncertainty", "ensemble_app", "train"),
    "calibrate": Verb(
        "measure how sure a bundle's answers are", "equipot.train.cli_uncertainty", "calibrate_app", "train"
    ),
    "bench": Verb("load a server and say how it fares", "equipot.serve.bench.cli", "app", "serve"),
    "serve": Verb("serve bundles over gRPC", "equipot.serve.cli", "app", "serve"),
    "join": Verb("lend this machine to a server's model", "equipot.serve.cli_join", "app", "serve"),
    "models": Verb("list the models of a server", "equipot.client.cli", "models_app", ""),
    "probe": Verb("ask for a server's health, or check its answer", "equipot.client.cli_probe", "app", ""),
    "fetch": Verb("fetch a bundle from a URL, by checksum", "equipot.model.cli_fetch", "app", "model"),
    "admin": Verb("load, unload and label a server's models", "equipot.client.cli_admin", "app", ""),
    "token": Verb("make a bearer token for a server's callers", "equipot.cli.token", "app", ""),
    "doctor": Verb("say what this machine and installation have", "equipot.cli.doctor", "app", ""),
    "predict": Verb("predict every frame of a file", "equipot.client.cli", "predict_app", "ase"),
    "md": Verb(
        "run molecular dynamics of a file's frames on a server", "equipot.client.cli_md", "app", "ase"
    ),
    "relax": Verb("relax every frame of a file on a server", "equipot.client.cli_relax", "app", "ase"),
    "jobs": Verb("list, fetch and end the jobs that a server keeps", "equipot.client.cli_jobs", "app", "ase"),
}


# What each extra brings that its verbs cannot do without, as import names.
EXTRAS: dict[str, tuple[str, ...]] = {
    "": (),
    "ase": ("ase",),
    "model": ("torch", "vesin", "safetensors"),
    "train": ("torch", "vesin", "safetensors", "ase", "deepspeed", "pydantic", "matplotlib"),
    "serve": ("torch", "vesin", "safetensors", "grpc_health", "grpc_reflection", "prometheus_client"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit code is 0 done, 1 partly done, 2 a mistake that the message explains."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):
        # The deepspeed launcher puts it before a program's own arguments; LOCAL_RANK says the same.
        del arguments[0]
    # What gRPC's core has to say reaches users in our errors, and in the server's log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    errors = Console(stderr=True)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        Console().print(_overview())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        Console().print(f"equipot {importlib.metadata.version('equipot')}")
        return 0
    name, *rest = arguments
    verb = VERBS.get(name)
    if verb is None:
        errors.print(f"[red]error:[/] no such command: {escape(name)}; one of {', '.join(VERBS)}")
        return 2
    missing = [package for package in EXTRAS[verb.extra] if importlib.util.find_spec(package) is None]
    if missing:
        needed = f"`equipot {name}` needs {escape(', '.join(missing))}"
        errors.print(f"[red]error:[/] {needed}: pip install '{_wanted(verb)}'", soft_wrap=True)
        return 2
    if verb.module.startswith(("equipot.client", "equipot.serve")):
        problem = set_up(os.environ, f"equipot-{name}")
        if problem is not None:
            errors.print(f"[yellow]warning:[/] {escape(problem)}", soft_wrap=True)
    app = getattr(importlib.import_module(verb.module), verb.app)
    return _run(app, name, rest, errors)


def _run(app: object, name: str, arguments: list[str], errors: Console) -> int:
    assert callable(app)
    try:
        app(args=arguments, prog_name=f"equipot {name}")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        # Errors meant for users carry their exit code; anything else is our own defect and shows itself.
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return code
    return 0


def _overview() -> Table:
    table = Table(title="equipot VERB --help tells more", title_justify="left", box=None, pad_edge=False)
    for column in ("verb", "what it does", "install"):
        table.add_column(column)
    for name, verb in VERBS.items():
        table.add_row(f"[bold]{name}[/]", verb.summary, f"pip install '{_wanted(verb)}'")
    return table


def _wanted(verb: Verb) -> str:
    return escape(f"equipot[{verb.extra}]") if verb.extra else "equipot"
