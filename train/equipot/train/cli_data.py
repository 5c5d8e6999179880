"""`equipot data`: import files into a store, look at a store, write a split back as frames."""

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from equipot.train import convert
from equipot.train.cli_audit import audit_command
from equipot.train.cli_mix import mix_command, open_data, parse_fractions
from equipot.train.data_report import ShownImport, print_import, print_store
from equipot.train.errors import DataError
from equipot.train.frames import write_frames
from equipot.train.importer import ImportOptions, import_files
from equipot.train.long_work import progress_bar, stop_signals
from equipot.train.mix import CARD, Mix
from equipot.train.mix_report import print_mix
from equipot.train.reader_pool import MOST_WORKERS, default_workers
from equipot.train.sources.base import ReadOptions
from equipot.train.sources.npz_file import UNITS
from equipot.train.sources.registry import RELEASES, choose_level, find_files, split_source
from equipot.train.splits import NAMES
from equipot.train.store import Store

_LEVELS = "; ".join(f"{name} {', '.join(source.levels)}" for name, source in RELEASES.items())
app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Import, inspect and split labelled structures."
)
app.command("audit")(audit_command)


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
    with stop_signals() as stopped, progress_bar() as bar:
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


app.command("mix")(mix_command)


@app.command("info")
def info_command(
    place: Annotated[Path, typer.Argument(help="A store or a mix.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and compare the checksum.")
    ] = False,
    store_root: Annotated[
        Path | None, typer.Option(help="Folder of a mix's stores, if they were moved.", show_default=False)
    ] = None,
) -> None:
    """Shows what a store or a mix holds and where it came from."""
    if (place / CARD).is_file():
        mix = Mix.open(place, store_root=store_root)
        if verify:
            mix.verify()
        print_mix(mix, Console(), verified=verify)
        return
    opened = Store.open(place)
    if verify:
        opened.verify()
    print_store(opened, Console(), verified=verify)


@app.command("frames")
def frames_command(
    places: Annotated[
        list[Path],
        typer.Argument(help="A run, a mix, or stores that are to be split.", show_default=False),
    ],
    part: Annotated[str, typer.Option("--split", help=" | ".join(NAMES))],
    out: Annotated[Path, typer.Option("--out", "-o", help="Extended xyz to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Seed of the stores' split, as in the recipe.")] = 0,
    fractions: Annotated[str, typer.Option(help="Of training, validation and test.")] = "0.8,0.1,0.1",
    store_root: Annotated[
        Path | None, typer.Option(help="Folder of a mix's stores, if they were moved.", show_default=False)
    ] = None,
) -> None:
    """Writes the labelled frames of one split, to predict and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        mix = open_data(
            places,
            seed=seed,
            fractions=parse_fractions(fractions),
            store_root=store_root,
            scratch=Path(scratch),
        )
        count = write_frames(mix.stores, mix.part(part), out)
    Console().print(f"{count} {part} frames written to {out}", soft_wrap=True, highlight=False)


class Layout(StrEnum):
    """What a store can be converted to."""

    bp = "bp"
    npy = "npy"


@app.command("convert")
def convert_command(
    store: Annotated[str, typer.Argument(help="A store.", show_default=False)],
    to: Annotated[
        Layout, typer.Option(help="bp: an ADIOS2 file. npy: memory-mapped files.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new name, for bp NAME.bp.", show_default=False)],
) -> None:
    """Writes a store anew in another layout, the same to the last bit.

    What is written takes its name when it is complete; a conversion that was killed is begun again.
    """
    opened = Store.open(store)
    with progress_bar() as bar:
        task = bar.add_task(f"writing {out.name}", total=len(opened))
        write = convert.to_bp if to is Layout.bp else convert.to_npy
        write(opened, out, on_progress=lambda written: bar.update(task, completed=written))
    Console().print(
        f"{len(opened)} structures written to {out}, digest {opened.manifest.digest}\n"
        f"next:  equipot data info {out} --verify",
        soft_wrap=True,
        highlight=False,
    )
