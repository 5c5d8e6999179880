"""What the data commands print. Knows stores and reports; changes nothing."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ase.data import chemical_symbols
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from equipot.train.importer import ImportReport, Progress
from equipot.train.manifest import Manifest, SourceEntry, Tally
from equipot.train.rejected_file import NAME as REJECTED
from equipot.train.storage.opening import JOURNAL
from equipot.train.store import Store

_SHOWN = 12
_FILES_SHOWN = 40


def print_import(report: ImportReport, console: Console) -> None:
    """Read, kept and left out per file; why and where; warnings; what to do next."""
    manifest = report.manifest
    for file in report.skipped[:_SHOWN]:
        console.print(f"{escape(file)}: skipped, the store holds it already (same checksum)", soft_wrap=True)
    if len(report.skipped) > _SHOWN:
        console.print(f"and {len(report.skipped) - _SHOWN} more skipped for the same reason")
    if not report.added:
        console.print("nothing new to import")
        return
    if report.resumed:
        console.print("went on with an import that had been stopped")
    _print_files([manifest.sources[k] for k in report.added], console)
    _print_tallies("Left out", manifest, manifest.rejected, report.added, console)
    _print_tallies("Kept, but take note", manifest, manifest.notes, report.added, console)
    for warning in manifest.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
    console.print(_summary(manifest), soft_wrap=True, highlight=False)
    if manifest.rejected_bytes:
        console.print(
            f"all frames that were left out: {escape(str(report.store / REJECTED))}",
            soft_wrap=True,
            highlight=False,
        )
    console.print(
        f"store: {escape(str(report.store))}\n"
        f"next:  equipot data info {escape(str(report.store))}, then equipot train RECIPE, which names it",
        soft_wrap=True,
        highlight=False,
    )


class ShownImport:
    """What a bar says of an import while it goes."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._began = time.monotonic()
        self._first = -1

    def line(self, at: Progress) -> str:
        """File, frames kept and left out, and frames a second since this command began."""
        if self._first < 0:
            self._first = at.read
        seconds = time.monotonic() - self._began
        name = self._files[at.source].name if at.source < len(self._files) else ""
        number = f" ({at.source + 1} of {len(self._files)})" if len(self._files) > 1 else ""
        parts = [f"{escape(name)}{number}: {at.kept} kept"]
        parts += [f"{at.rejected} left out"] if at.rejected else []
        parts += [f"{(at.read - self._first) / seconds:.0f} frames/s"] if at.read > self._first else []
        return ", ".join([*parts, *([at.doing] if at.doing else [])])


def _print_files(entries: Sequence[SourceEntry], console: Console) -> None:
    """Read, kept and left out: of every file, or of many those that lost frames; and of all."""
    table = Table("file", "read", "kept", "left out", title="Import", title_justify="left")
    rows = [(entry.file, entry.frames_read, entry.frames_kept) for entry in entries]
    shown = rows
    if len(rows) > _FILES_SHOWN:
        shown = [row for row in rows if row[1] > row[2]][:_FILES_SHOWN]
    for file, read, kept in shown:
        table.add_row(escape(file), str(read), str(kept), str(read - kept or "–"))
    if len(rows) > 1:
        read, kept = sum(row[1] for row in rows), sum(row[2] for row in rows)
        what = f"all {len(rows)} files" if len(shown) < len(rows) else "all"
        table.add_row(what, str(read), str(kept), str(read - kept or "–"))
    console.print(table)


def print_store(store: Store, console: Console, *, verified: bool) -> None:
    """A summary of a store."""
    m = store.manifest
    table = Table(title=escape(str(store.path)), title_justify="left", show_header=False)
    rows = {
        "name": m.name,
        "level of theory": m.level_of_theory,
        "licence": m.licence,
        "structures": f"{m.structures}, {m.atoms} atoms",
        "labels": f"energy {m.with_energy}, forces {m.with_forces}, stress {m.with_stress}",
        "periodic": str(m.periodic),
        "atoms per structure": _range(store),
        "elements": _elements(m),
        "charges": _counts(m.charges),
        "spin multiplicities": _counts(
            {("not stated" if k == "0" else k): v for k, v in m.spin_multiplicities.items()}
        ),
        "groups": f"{m.groups}, by {_counts(m.grouped_by)}",
        "digest": m.digest + (" (verified)" if verified else ""),
    }
    for key, value in rows.items():
        table.add_row(key, escape(value))
    console.print(table)
    if (store.path / JOURNAL).exists():
        console.print("an import into this store lies unfinished: run its command again to finish it")
    files = Table("file", "format", "frames read", "kept", "sha256", title="Sources", title_justify="left")
    for entry in m.sources[:_FILES_SHOWN]:
        files.add_row(
            escape(entry.file),
            entry.format,
            str(entry.frames_read),
            str(entry.frames_kept),
            entry.sha256[:16] + "…",
        )
    console.print(files)
    if len(m.sources) > _FILES_SHOWN:
        console.print(f"and {len(m.sources) - _FILES_SHOWN} more files, in manifest.json")
    everything = range(len(m.sources))
    _print_tallies("Left out", m, m.rejected, everything, console)
    _print_tallies("Kept, but take note", m, m.notes, everything, console)
    for warning in m.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)


def _print_tallies(
    title: str, manifest: Manifest, tallies: Mapping[str, Tally], sources: Sequence[int], console: Console
) -> None:
    table = Table("what", "frames", "file", "at frame", "for example", title=title, title_justify="left")
    for what, tally in tallies.items():
        wanted = {example[0] for example in tally.examples} & set(sources)
        for source in sorted(wanted)[:_SHOWN]:
            places = [example for example in tally.examples if example[0] == source]
            shown = ", ".join(str(frame) for _, frame, _ in places[:_SHOWN])
            of_all = len({example[0] for example in tally.examples}) == 1
            exact = of_all or tally.count == len(tally.examples)
            more = (tally.count if of_all else len(places)) - min(len(places), _SHOWN)
            table.add_row(
                escape(what),
                str(tally.count if of_all else len(places)) + ("" if exact else " or more"),
                escape(manifest.sources[source].file),
                shown + (f" and {more} more" if more > 0 else ""),
                escape(str(places[0][2])),
            )
    if table.row_count:
        console.print(table)


def _summary(m: Manifest) -> str:
    return (
        f"{m.structures} structures, {m.atoms} atoms of {escape(_elements(m))}; energy {m.with_energy}, "
        f"forces {m.with_forces}, stress {m.with_stress}; "
        f"{m.groups} groups by {escape(_counts(m.grouped_by))}; "
        f"level of theory {escape(m.level_of_theory)}, licence {escape(m.licence)}"
    )


def _range(store: Store) -> str:
    n = store.n_atoms
    return f"{n.min()} to {n.max()}, mean {n.mean():.1f}" if len(n) else "–"


def _elements(m: Manifest) -> str:
    return " ".join(chemical_symbols[z] for z in m.atomic_numbers)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in counts.items())
