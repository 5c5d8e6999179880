"""`equipot data mix`: a training set from several stores; and how the other data commands find one."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from equipot.train.errors import DataError
from equipot.train.long_work import told_bar
from equipot.train.mix import CARD, PICTURE, Mix
from equipot.train.mix_build import build_mix
from equipot.train.mix_report import draw_mix, print_mix
from equipot.train.mix_request import FRACTIONS, MixRequest, load_request, parse_request
from equipot.train.prepare import reopen_mix
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.splits import check_fractions
from equipot.train.store import Store


def mix_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE.toml | STORE…",
            help="A mix file, or stores; the sources have the stores' names.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The mix, a folder that is not there yet.", show_default=False)
    ],
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=W", help="How often an epoch sees a structure: 2 twice, 0.5 every second one."
        ),
    ] = None,
    max_structures: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="At most so many of a source, by whole groups.")
    ] = None,
    max_per_group: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]N", help="At most so many of a group, evenly spread over it."),
    ] = None,
    max_atoms: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]N", help="Structures with more atoms are left out."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides splits and subsets.", show_default="0, or the file's")
    ] = None,
    fractions: Annotated[
        str | None,
        typer.Option(help="Of training, validation and test.", show_default="0.8,0.1,0.1, or the file's"),
    ] = None,
) -> None:
    """Builds a training set from several stores. Nothing is copied: a mix is an index.

    Splits are by group, the same for every subset of the training split. Reference energies are fitted to the
    training split, one set per level of theory.
    """
    options = {
        "weight": weight or [],
        "max_structures": max_structures or [],
        "max_per_group": max_per_group or [],
        "max_atoms": max_atoms or [],
    }
    if len(paths) == 1 and paths[0].suffix == ".toml":
        request = load_request(paths[0])
        given = [name for name, values in options.items() if values]
        if given:
            raise DataError(
                f"--{given[0].replace('_', '-')}: say it in {paths[0]}, as {given[0]} of a source"
            )
        changes: dict[str, object] = {} if seed is None else {"seed": seed}
        if fractions is not None:
            changes["fractions"] = parse_fractions(fractions)
        request = parse_request({**request.model_dump(), **changes}, str(paths[0]))
    else:
        request = _of_options(
            paths, options, seed or 0, parse_fractions(fractions) if fractions else FRACTIONS
        )
    with terminated_is_interrupted(), told_bar() as progress:
        mix = build_mix(request, out, on_progress=progress)
    draw_mix(mix.card, mix.path / PICTURE)
    print_mix(mix, Console())
    console = Console()
    console.print(
        f'next: equipot train RECIPE, which says [data] mix = "{out}"', soft_wrap=True, markup=False,
        highlight=False,
    )  # fmt: skip


def open_data(
    paths: Sequence[Path], *, seed: int, fractions: Sequence[float], store_root: Path | None, scratch: Path
) -> Mix:
    """The mix that is meant by a mix, by a run, or by stores that are to be split.

    Args:
        paths: one mix, one run, or stores.
        seed: of stores that are to be split.
        fractions: of these.
        store_root: of a mix whose stores were moved.
        scratch: folder that may hold the mix of the stores.

    Raises:
        DataError: none of these.
    """
    mix = mix_at(paths[0], store_root=store_root) if len(paths) == 1 else None
    if mix is not None:
        return mix
    names = [f"store {k}" for k in range(len(paths))]
    sources = {name: {"store": path} for name, path in zip(names, paths, strict=True)}
    for path in paths:
        Store.open(path)  # its own words for what is no store
    request = parse_request({"seed": seed, "fractions": fractions, "sources": sources}, "--fractions")
    with told_bar() as progress:
        return build_mix(request, scratch / "mix", on_progress=progress)


def mix_at(path: Path, *, store_root: Path | None = None) -> Mix | None:
    """The mix that is meant by its folder, or by that of a run; None for anything else.

    Raises:
        DataError: it is damaged, or a store of it is missing or has changed.
    """
    if (path / CARD).is_file():
        return Mix.open(path, store_root=store_root)
    run = RunDirectory(path)
    if run.card.is_file():
        return reopen_mix(run, RunCard.read(run.card), store_root=store_root)
    return None


def parse_fractions(text: str) -> tuple[float, float, float]:
    """Three shares from "0.8,0.1,0.1"; DataError if they are none."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        raise DataError(f"--fractions {text}: give three numbers that sum to 1, as 0.8,0.1,0.1") from None
    return check_fractions(shares)


@contextmanager
def terminated_is_interrupted() -> Iterator[None]:
    """While open, SIGTERM ends what is done as Ctrl-C does, with nothing left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _of_options(
    paths: Sequence[Path], options: Mapping[str, Sequence[str]], seed: int, fractions: Sequence[float]
) -> MixRequest:
    sources: dict[str, dict[str, object]] = {}
    for path in paths:
        if path.suffix == ".toml":
            raise DataError(f"{path}: give one mix file alone, or stores")
        name = Store.open(path).manifest.name
        if name in sources:
            raise DataError(
                f"{sources[name]['store']} and {path} are both called {name}; write a mix file, where each "
                f'source has a name of its own: [sources.NAME] store = "{path}"'
            )
        sources[name] = {"store": path}
    for option, values in options.items():
        flag = f"--{option.replace('_', '-')}"
        for text in values:
            name, _, value = text.rpartition("=")
            if not name and option == "weight":
                raise DataError(f"{flag} {text}: write it as NAME=WEIGHT; names: {', '.join(sources)}")
            number = _number(flag, text, value, whole=option != "weight")
            for source in [name] if name else list(sources):
                if source not in sources:
                    raise DataError(f"{flag} {text}: no source {source!r}{_near(source, sources)}")
                sources[source][option] = number
    return parse_request({"seed": seed, "fractions": fractions, "sources": sources}, "the mix")


def _number(flag: str, text: str, value: str, *, whole: bool) -> float:
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise DataError(f"{flag} {text}: {value!r} is no {'whole ' if whole else ''}number") from None


def _near(name: str, names: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; one of {', '.join(names)}"
