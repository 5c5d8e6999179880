"""`equipot data`: import files into a store, look at a store, write a split back as frames."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from equipot.train.data_report import ShownImport, print_import, print_store
from equipot.train.errors import DataError
from equipot.train.frames import write_frames
from equipot.train.importer import ImportOptions, import_files
from equipot.train.reader_pool import MOST_WORKERS, default_workers
from equipot.train.sources.base import ReadOptions
from equipot.train.sources.npz_file import UNITS
from equipot.train.sources.registry import RELEASES, choose_level, find_files, split_source
from equipot.train.splits import NAMES, Splits, split
from equipot.train.store import Store

_LEVELS = "; ".join(f"{name} {', '.join(source.levels)}" for name, source in RELEASES.items())
app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Import, inspect and split labelled structures."
)


@app.command("import")
def import_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[SOURCE] PATH…",
            help=f"A release's name ({', '.join(RELEASES)}) and its files or the folders that hold them; or "
            "labelled files of any format ASE reads, .npz, .aselmdb, .lmdb, or lists of pymatgen JSON.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The store, a folder. An existing one is added to.", show_default=False
        ),
    ],
    level_of_theory: Annotated[
        str,
        typer.Option(
            help='Functional and basis, as "PBE/def2-SVP": energies of different ones are never compared.',
            show_default="the release's",
        ),
    ] = "",
    licence: Annotated[
        str, typer.Option(help='Licence of the data, as "CC-BY-4.0".', show_default="the release's")
    ] = "",
    level: Annotated[
        str, typer.Option(help=f"Which of a release's labels to take: {_LEVELS}.", show_default="the first")
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the data set; by default the store's.")] = "",
    group_by: Annotated[
        str,
        typer.Option(
            help="What stays together in a split: auto (by trajectory, mol_id, sid, material_id or the like "
            "if a frame has one, else block:10), frame, formula, file, block:N (N consecutive frames of one "
            "composition), info:KEY."
        ),
    ] = "auto",
    format: Annotated[
        str, typer.Option(help="ASE's name of the format, if the file's name does not tell.")
    ] = "",
    energy_key: Annotated[
        str, typer.Option(help="Key of the energy, if several are there or it is unusual.")
    ] = "",
    forces_key: Annotated[str, typer.Option(help="Key of the forces.")] = "",
    stress_key: Annotated[
        str, typer.Option(help='Key of the stress; one with "virial" in it is a virial.')
    ] = "",
    energy_per_atom: Annotated[
        bool,
        typer.Option("--energy-per-atom", help="The energies are per atom: multiply by the number of atoms."),
    ] = False,
    energy_unit: Annotated[
        str, typer.Option(help=f"Of an .npz that does not say it: {', '.join(UNITS)}.")
    ] = "",
    max_force: Annotated[
        float | None,
        typer.Option(help="Leave out frames with a force above this, in eV/Å.", show_default="no limit"),
    ] = None,
    keep_duplicates: Annotated[
        bool,
        typer.Option("--keep-duplicates", help="Keep frames that are the same as an earlier one to the bit."),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes that read; the store is the same whatever their number. 1: no further process.",
            show_default=f"the cores, at most {MOST_WORKERS}",
        ),
    ] = 0,
) -> None:
    """Packs labelled frames into a store; goes on where a killed import stopped.

    Energies are total energies in eV, forces in eV/Å, stress in eV/Å³ positive in tension (ASE's units); a
    virial is −stress × volume. Frames that cannot be used are left out and listed by file and index.
    """
    source, files = split_source(paths)
    if source is not None:
        files = find_files(files, source)
        level = choose_level(source, level, files)
        level_of_theory = level_of_theory or source.levels[level]
        licence = licence or source.licence
    elif level:
        raise DataError(f"--level {level}: only a release has levels, one of {', '.join(RELEASES)}")
    if energy_unit and energy_unit not in UNITS:
        raise DataError(f"--energy-unit {energy_unit}: one of {', '.join(UNITS)}")
    options = ImportOptions(
        level_of_theory=level_of_theory,
        licence=licence,
        name=name or out.resolve().name,
        group_by=group_by,
        read=ReadOptions(
            format=format or None,
            energy_key=energy_key or None,
            forces_key=forces_key or None,
            stress_key=stress_key or None,
            energy_per_atom=energy_per_atom,
            level=level or None,
            energy_unit=energy_unit or None,
        ),
        source="" if source is None else source.name,
        max_force=max_force,
        keep_duplicates=keep_duplicates,
    )
    with _stop_signals() as stopped, _bar() as bar:
        task = bar.add_task("opening", total=1.0)
        shown = ShownImport(files)
        report = import_files(
            files,
            out,
            options,
            workers=workers or default_workers(files),
            on_progress=lambda at: bar.update(task, completed=at.fraction, description=shown.line(at)),
            should_stop=lambda: bool(stopped),
        )
        bar.update(task, completed=1.0)
    print_import(report, Console())


@app.command("info")
def info_command(
    store: Annotated[Path, typer.Argument(help="A store.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and compare the checksum.")
    ] = False,
) -> None:
    """Shows what a store holds and where it came from."""
    opened = Store.open(store)
    if verify:
        opened.verify()
    print_store(opened, Console(), verified=verify)


@app.command("frames")
def frames_command(
    stores: Annotated[list[Path], typer.Argument(help="Stores, in the recipe's order.", show_default=False)],
    part: Annotated[str, typer.Option("--split", help=" | ".join(NAMES))],
    out: Annotated[Path, typer.Option("--out", "-o", help="Extended xyz to write.", show_default=False)],
    splits: Annotated[
        Path | None, typer.Option(help="splits.npz of a run: its very splits.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits, as in the recipe.")] = 0,
    fractions: Annotated[str, typer.Option(help="Of training, validation and test.")] = "0.8,0.1,0.1",
) -> None:
    """Writes the labelled frames of one split, to predict and compare."""
    opened = [Store.open(path) for path in stores]
    if splits is None:
        found = split(opened, fractions=_fractions(fractions), seed=seed)
    else:
        found = Splits.load(splits)
        found.check_stores(opened)
    count = write_frames(opened, found.part(part), out)
    Console().print(f"{count} {part} frames written to {out}", soft_wrap=True, highlight=False)


def _fractions(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise DataError(f"--fractions {text}: give three numbers that sum to 1, as 0.8,0.1,0.1") from None


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """While open, SIGINT and SIGTERM are noted instead of obeyed; a second one ends the process at once."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
