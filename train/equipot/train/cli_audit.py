"""`equipot data audit`: asks stores whether they are consistent."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from equipot.train.audit.findings import Severity
from equipot.train.audit.page import render
from equipot.train.audit.report import to_json
from equipot.train.audit.run import SAMPLE, Audit, AuditOptions, audit_stores
from equipot.train.cli_mix import mix_at
from equipot.train.errors import DataError
from equipot.train.long_work import stop_signals, told_bar
from equipot.train.manifest import write_json
from equipot.train.mix import Mix
from equipot.train.store import Store

PAGE, NUMBERS = "audit.html", "audit.json"
_COLOUR = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}
_SHOWN = 3


def audit_command(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="STORE | MIX | RUN…",
            help="Stores. A mix or a run stands for its stores and their splits: leaks between the splits "
            "are looked for, and copies of them in the other stores named.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the page and the numbers.", show_default=False)
    ],
    store_root: Annotated[
        Path | None, typer.Option(help="Folder of a mix's stores, if they were moved.", show_default=False)
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
    stores, mix = _open(places, store_root)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; give a folder as --out")
    with stop_signals() as stopped, told_bar() as report:
        audit = audit_stores(
            stores,
            AuditOptions(sample=sample, seed=seed),
            mix=mix,
            report=report,
            should_stop=lambda: bool(stopped),
        )
    _write(audit, out)
    _print(audit, out, Console())
    if strict and any(finding.severity is Severity.ERROR for finding in audit.findings):
        raise typer.Exit(1)


def _open(places: Sequence[Path], store_root: Path | None) -> tuple[list[Store], Mix | None]:
    """The mix if one is meant, and the stores beside its own."""
    stores: list[Store] = []
    mix = None
    for place in places:
        found = mix_at(place, store_root=store_root)
        if found is None:
            stores.append(Store.open(place))
        elif mix is not None:
            raise DataError(f"{place}: is a second mix; give one mix or run, and stores")
        mix = mix or found
    paths = [store.path.resolve() for store in (*stores, *(mix.stores if mix else ()))]
    if len(set(paths)) < len(paths):
        also = ", and none of those that are in the mix" if mix else ""
        raise DataError(f"a store is named twice; name each once{also}")
    return stores, mix


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
