"""`equipot data audit`: asks stores whether they are consistent."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from equipot.train.audit.findings import Severity
from equipot.train.audit.page import render
from equipot.train.audit.report import to_json
from equipot.train.audit.run import SAMPLE, Audit, AuditOptions, audit_stores
from equipot.train.errors import DataError
from equipot.train.long_work import progress_bar, stop_signals
from equipot.train.manifest import write_json
from equipot.train.splits import Splits
from equipot.train.store import Store

PAGE, NUMBERS = "audit.html", "audit.json"
_COLOUR = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}
_SHOWN = 3


def audit_command(
    stores: Annotated[list[Path], typer.Argument(help="Stores.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the page and the numbers.", show_default=False)
    ],
    splits: Annotated[
        Path | None,
        typer.Option(
            help="splits.npz of a run, of these stores in this order: looks for leaks between its "
            "splits, and fits "
            "reference energies on its training structures alone.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=100, help="Structures looked at closely: near duplicates, nearest distances.")
    ] = SAMPLE,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if there are errors.")] = False,
) -> None:
    """Asks stores whether they are consistent: units and signs, duplicates, leaks, outliers, offsets.

    Energies, forces, stress, cells and exact duplicates are read in full; near duplicates and distances from
    a sample, which takes structures that may be copies together. Writes a page (audit.html) and all numbers
    (audit.json). Findings are no failure: the exit code is 0 unless --strict is given.
    """
    opened = [Store.open(path) for path in stores]
    if len({store.path.resolve() for store in opened}) < len(opened):
        raise DataError("a store is named twice; name each once")
    read = Splits.load(splits) if splits is not None else None
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; give a folder as --out")
    with stop_signals() as stopped, progress_bar() as bar:
        task = bar.add_task("opening", total=1.0)
        audit = audit_stores(
            opened,
            AuditOptions(sample=sample, seed=seed),
            splits=read,
            splits_path=splits,
            report=lambda what, done: bar.update(task, completed=done, description=escape(what)),
            should_stop=lambda: bool(stopped),
        )
    _write(audit, out)
    _print(audit, out, Console())
    if strict and any(finding.severity is Severity.ERROR for finding in audit.findings):
        raise typer.Exit(1)


def _write(audit: Audit, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside = out / f"{PAGE}.part"
        aside.write_text(render(audit, time.strftime("%Y-%m-%d %H:%M %Z")), encoding="utf-8")
        aside.replace(out / PAGE)
        write_json(out / NUMBERS, to_json(audit))
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); give another --out"
        ) from error


def _print(audit: Audit, out: Path, console: Console) -> None:
    for finding in audit.findings:
        colour = _COLOUR[finding.severity]
        console.print(
            f"[{colour}]{finding.severity.value}:[/] {escape(', '.join(finding.stores))}: "
            f"{escape(finding.summary)}\n         {escape(finding.evidence)}",
            soft_wrap=True,
            highlight=False,
        )
        if finding.severity is not Severity.NOTE:
            for place in finding.places[:_SHOWN]:
                where = f"{place.store}: frame {place.frame} of {place.file}"
                console.print(
                    f"         {escape(where)} {escape(place.detail)}", soft_wrap=True, highlight=False
                )
            console.print(f"         remedy: {escape(finding.remedy)}", soft_wrap=True, highlight=False)
    console.print(f"[bold]{escape(audit.answer)}[/]", soft_wrap=True, highlight=False)
    console.print(
        f"page:    {escape(str(out / PAGE))}\nnumbers: {escape(str(out / NUMBERS))}",
        soft_wrap=True,
        highlight=False,
    )
