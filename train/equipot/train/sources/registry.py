"""Which reader opens what: releases by name, containers by their file's name or by `--format`.

A further source is one module with a `SOURCE`, and a line in `RELEASES` or `CONTAINERS` here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from equipot.train.errors import DataError
from equipot.train.sources import (
    ani1x,
    ase_db,
    aselmdb,
    mptrj,
    npz_file,
    oc20,
    oc22,
    pyg_lmdb,
    pymatgen_json,
    qm7x,
)
from equipot.train.sources.ase_file import open_ase_file
from equipot.train.sources.base import Reader, ReadOptions, Source
from equipot.train.sources.json_stream import JsonDamage, JsonStream
from equipot.train.sources.lmdb_file import DATA as LMDB_DATA
from equipot.train.sources.lmdb_file import is_folder as is_lmdb_folder

RELEASES: Mapping[str, Source] = {
    source.name: source for source in (ani1x.SOURCE, qm7x.SOURCE, oc20.SOURCE, oc22.SOURCE, mptrj.SOURCE)
}
CONTAINERS: Mapping[str, Source] = {
    source.name: source
    for source in (npz_file.SOURCE, ase_db.SOURCE, aselmdb.SOURCE, pyg_lmdb.SOURCE, pymatgen_json.SOURCE)
}


def split_source(words: Sequence[Path]) -> tuple[Source | None, list[Path]]:
    """(the release that the first word names, the files). A file of that name is meant by ./NAME."""
    first = words[0] if words else Path()
    if str(first) in RELEASES:
        return RELEASES[str(first)], list(words[1:])
    return None, list(words)


def find_files(paths: Sequence[Path], source: Source) -> list[Path]:
    """The files of a release: as given, and in folders those of its patterns, at any depth, in order.

    Raises:
        DataError: nothing was given, or a folder holds none.
    """
    if not paths:
        raise DataError(f"import {source.name}: name the release's files, or folders that hold them")
    found: list[Path] = []
    for path in paths:
        if not path.is_dir() or is_lmdb_folder(path):
            found.append(path)
            continue
        inside = {
            file
            for pattern in source.files
            for file in path.rglob(pattern)
            if file.is_file() or is_lmdb_folder(file)
        }
        if "*.lmdb" in source.files:  # LMDB's own layout: a folder of any name
            inside |= {file.parent for file in path.rglob(LMDB_DATA) if file.parent != path}
        if not inside:
            raise DataError(f"{path}: holds no {' or '.join(source.files)}")
        found += sorted(inside, key=_natural)
    return found


def _natural(path: Path) -> tuple[str, int, str]:
    """Sorts 2.extxyz.xz before 10.extxyz.xz."""
    stem = path.name.split(".")[0]
    return str(path.parent), int(stem) if stem.isdigit() else -1, path.name


def choose_level(source: Source, asked: str, files: Sequence[Path]) -> str:
    """The level that is asked for, or else the source's default.

    Raises:
        DataError: the source has no such level.
    """
    if asked and asked not in source.levels:
        raise DataError(f"--level {asked}: {source.name} has {', '.join(source.levels)}")
    if asked:
        return asked
    if source.default_level is not None and files:
        return source.default_level(files[0])
    return next(iter(source.levels))


def find_container(path: Path, options: ReadOptions) -> Source | None:
    """The container that a file is, by its name alone but for .json; None for a file that ASE is to read."""
    if options.format is not None:
        return CONTAINERS.get(options.format)
    if path.suffix == ".json":
        return pymatgen_json.SOURCE if path.is_file() and _is_structure_list(path) else None
    for source in CONTAINERS.values():
        if "*" + path.suffix in source.files:
            return source
    return pyg_lmdb.SOURCE if path.is_dir() else None


def open_container(path: Path, options: ReadOptions) -> Reader:
    """Opens a file that no release was named for: a known container, or else whatever ASE reads."""
    source = find_container(path, options)
    return open_ase_file(path, options) if source is None else source.open(path, options)


def _is_structure_list(path: Path) -> bool:
    """Whether a .json is a list of pymatgen structures; ASE's own databases are objects."""
    try:
        with JsonStream(path) as stream:
            if stream.peek() != "[":
                return False
            for _ in stream.entries():
                return pymatgen_json.is_entry(stream.value())
    except JsonDamage:
        return False
    return False
