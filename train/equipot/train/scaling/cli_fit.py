"""``equipot scaling fit``, ``report`` and ``memory``: what a study's finished points say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from equipot.train.long_work import told_bar
from equipot.train.scaling.folder import StudyFolder, write_json
from equipot.train.scaling.rows import MEMORY, ResultError, StudyResults, read_study, write_results

if TYPE_CHECKING:
    from equipot.train.scaling.fit import Fits
    from equipot.train.scaling.tables import Table

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study, as --out of its run.")]
Replicates = Annotated[int, typer.Option(min=50, help="Of each bootstrap: finer bands, longer.")]
Level = Annotated[float, typer.Option(min=0.5, max=0.99, help="Of bands and intervals.")]


def fit(
    directory: Folder,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            metavar="FLOPS",
            help="Model FLOPs of training to find the best width and data for; may be given several times.",
            show_default="those of the dearest point, and ten times as many",
        ),
    ] = None,
    replicates: Replicates = 400,
    level: Level = 0.95,
) -> None:
    """Fit saturating power laws in parameters, data and compute to a study's finished points.

    Prints exponents and floors with bootstrap intervals, predictions of held-out points, and the best use of
    a budget; all of it is written to fits.json, and the points to results.csv.
    """
    results = _results(directory)
    fits = _fit(results, budget or [], replicates, level)
    from equipot.train.scaling import tables, verdicts
    from equipot.train.scaling.report import write_fits

    console = Console(highlight=False)
    for table in (tables.brief(fits), tables.joint(fits), tables.held_out(fits), tables.optima(fits)):
        _print(table, console)
    for line in (*verdicts.of_held_out(fits), *verdicts.of_compute(fits)):
        console.print(escape(line), soft_wrap=True)
    console.print(escape(f"results: {write_fits(results, fits)}, {write_results(results)}"), soft_wrap=True)
    console.print(escape(f"next: equipot scaling report {directory}"), soft_wrap=True)


def report(directory: Folder, replicates: Replicates = 400, level: Level = 0.95) -> None:
    """Write report.html, one page that needs nothing else, and its figures as PNG.

    A study that is not finished is reported as far as it is; what is missing is named.
    """
    results = _results(directory)
    fits = _fit(results, [], replicates, level)
    from equipot.train.scaling.report import write_report

    written = write_report(results, fits, time.strftime("%Y-%m-%d"))
    console = Console(highlight=False)
    console.print(
        escape(
            f"report: {written.page}; {len(written.figures)} figures in {written.figures[0].parent}; fits: "
            f"{written.fits}; points: {written.table}"
        ),
        soft_wrap=True,
    )


def memory(
    directory: Folder,
    width: Annotated[
        list[int] | None,
        typer.Option(help="To predict; may be given several times.", show_default="128 to 4096"),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes to divide among.")] = 2,
) -> None:
    """Predict memory and time of a step over widths: as it is, with checkpointing, and with ZeRO.

    Of the recipe of the study's best point, by the planner of `equipot memory plan`; nothing is trained.
    Written to memory.json, for the report.
    """
    results = _results(directory)
    from equipot.train.run_card import RunCard
    from equipot.train.run_directory import RunDirectory
    from equipot.train.scaling.memory_baseline import memory_baseline
    from equipot.train.scaling.report import best_row
    from equipot.train.scaling.slices import base_family

    if not results.usable:
        raise ResultError(f"{directory}: no point is finished, whose recipe could be taken")
    best = best_row(results.usable, base_family(results.usable))
    recipe = RunCard.read(RunDirectory(StudyFolder(directory).point(best.name).run).card).recipe
    with told_bar() as show:
        found = memory_baseline(
            recipe, width or [128, 256, 512, 1024, 2048, 4096], ranks, lambda text: show(text, 0.0)
        )
    write_json(directory / MEMORY, found)
    Console(highlight=False).print(escape(f"results: {directory / MEMORY}"), soft_wrap=True)


def _results(directory: Path) -> StudyResults:
    results = read_study(directory)
    if results.left_out:
        ends = ", ".join(f"{count} {word}" for word, count in results.left_out.items())
        Console(stderr=True, highlight=False).print(
            escape(f"note: points left out of all fits: {ends}"), soft_wrap=True
        )
    return results


def _fit(results: StudyResults, budgets: Sequence[float], replicates: int, level: float) -> Fits:
    from equipot.train.scaling.bootstrap import TooFewPointsError
    from equipot.train.scaling.fit import fit_study

    if any(budget <= 0 for budget in budgets):
        raise ResultError("--budget: give a positive number of model FLOPs, as 1e15")
    try:
        with told_bar() as show:
            return fit_study(results, budgets=budgets, replicates=replicates, level=level, on_progress=show)
    except TooFewPointsError as error:
        raise ResultError(f"{results.path}: {error}; run it: equipot scaling run STUDY --out …") from None


def _print(table: Table, console: Console) -> None:
    if not table.rows:
        return
    shown = Shown(*map(escape, table.head), title=escape(table.title), title_justify="left", box=None)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
