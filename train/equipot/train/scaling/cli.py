"""``equipot scaling``: studies of how errors fall with parameters, data and compute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from equipot.train.launch import available_cores
from equipot.train.long_work import stop_signals
from equipot.train.scaling.cli_fit import fit, memory, report
from equipot.train.scaling.declaration import load_study
from equipot.train.scaling.folder import StudyFolder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
for command in (fit, report, memory):
    app.command()(command)


@app.callback()
def scaling() -> None:
    """Run scaling studies: declared grids of training runs, within a budget, resumable."""


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="TOML study; its paths are relative to this directory.")],
    out: Annotated[Path, typer.Option(help="Folder of the study; one that is there is continued.")],
    workers: Annotated[
        int,
        typer.Option(min=0, help="Points at once on this machine, a core each.", show_default="the cores"),
    ] = 0,
    budget: Annotated[
        str | None,
        typer.Option(
            help='A time, as "15 min", after which all is saved; or model FLOPs, as 2e14, for the points '
            "that it covers, in order of value.",
            show_default="everything",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GROUP", help="Experiments to run, and no others.")
    ] = None,
    folder: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Where a folder of the study's data lies.")
    ] = None,
    share: Annotated[
        str, typer.Option(metavar="K/N", help="Of N machines that share no folder, the part of the K-th.")
    ] = "1/1",
    dry: Annotated[
        bool, typer.Option("--dry", help="List the points and what they take, and train none.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the study, as in length.steps=500."),
    ] = None,
) -> None:
    """Train the points of a study; what is finished already is not done again.

    Ctrl-C and SIGTERM save and end; the same command continues, also after a kill. Several machines that see
    the same --out share the points among themselves.
    """
    began = time.time()
    settings = load_study(study, set_ or [], folder or [])
    from equipot.train.scaling import session  # torch: seconds

    choice = session.Choice(only=tuple(only or ()), budget=budget, share=share)
    console = Console(highlight=False)
    with stop_signals() as stopped:
        begun = session.begin(settings, StudyFolder(out), choice, began, stopped, console)
        if dry:
            session.print_points(begun, console)
            return
        session.declare(begun, settings, study)
        end = session.go_on(begun, workers or available_cores(), stopped, console)
    code = session.conclude(begun, end, console, stopped=bool(stopped))
    if code:
        raise typer.Exit(code)
