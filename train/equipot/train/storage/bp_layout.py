"""How a store lies in an ADIOS2 BP5 file: names and attributes, and what guards the file. Knows no adios2.

One step of global arrays under one label, as HydraGNN's AdiosDataset has them. For each key k of the string
attribute `dataset/keys`, the rows of all structures stand one after the other along the first dimension
(attribute `dataset/k/variable_dim` = 0) of `dataset/k`; structure i has the `dataset/k/variable_count`[i]
rows from `dataset/k/variable_offset`[i] on. A matrix of a structure, as its cell, is three rows.
`dataset/ndata` is the number of structures. Arrays that are no keys (origin, group, tags, …) have no counts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipot.train.arrays import Field, per_atom, per_structure
from equipot.train.errors import DataError
from equipot.train.manifest import UNITS, Manifest, read_json, write_json

LABEL = "dataset"
GUARD = "equipot.json"
FORMAT = "equipot-bp"
VERSION = 1
KEYS = (
    "positions", "atomic_numbers", "forces",
    "energy", "cell", "pbc", "stress", "charge", "spin_multiplicity",
)  # fmt: skip
"""What a reader of graphs wants: arrays with `variable_count` and `variable_offset`."""
_NAMES: Mapping[str, str] = {"positions": "pos"}
_TYPES: Mapping[str, str] = {"atomic_numbers": "<i4", "pbc": "<i4", "fixed": "<i4", "name": "|u1"}
"""ADIOS2 has no booleans and no fixed-length text; AdiosDataset takes bytes for text, so keys have none."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One array of a store as a global array of the file.

    Attributes:
        name: in the file.
        field: type and row in a shard.
        dtype: type in the file.
        rows: rows of the file that one row of a shard becomes.
        row: shape of a row of the file.
        of_atoms: whether it has rows per atom, else per structure.
        key: whether it has counts and offsets.
    """

    name: str
    field: Field
    dtype: str
    rows: int
    row: tuple[int, ...]
    of_atoms: bool
    key: bool


def variables(columns: Sequence[str]) -> dict[str, Variable]:
    """The global arrays of a store with these optional arrays, by the store's names."""
    found = {}
    for fields, of_atoms in ((per_structure(columns), False), (per_atom(columns), True)):
        for name, field in fields.items():
            row = (int(np.dtype(field.dtype).itemsize),) if field.dtype.startswith("|S") else field.row
            rows = row[0] if row and not of_atoms else 1
            found[name] = Variable(
                name=f"{LABEL}/{_NAMES.get(name, name)}",
                field=field,
                dtype=_TYPES.get(name, field.dtype),
                rows=rows,
                row=row if of_atoms else row[1:],
                of_atoms=of_atoms,
                key=name in KEYS,
            )
    return found


def attributes(manifest: Manifest) -> dict[str, str | int | list[str]]:
    """What the file says of itself to any reader of ADIOS2 files."""
    of_file = variables(manifest.columns)
    found: dict[str, str | int | list[str]] = {
        "dataset_name": manifest.name,
        "total_ndata": manifest.structures,
        f"{LABEL}/ndata": manifest.structures,
        f"{LABEL}/keys": [of_file[name].name.removeprefix(f"{LABEL}/") for name in KEYS],
        "level_of_theory": manifest.level_of_theory,
        "licence": manifest.licence,
        "digest": manifest.digest,
        "manifest": json.dumps(manifest.to_json(), ensure_ascii=False),
    }
    for name, variable in of_file.items():
        if variable.key:
            found[f"{variable.name}/variable_dim"] = 0
        if name in UNITS:
            found[f"{variable.name}/unit"] = UNITS[name]
    return found


def is_bp(path: Path) -> bool:
    """Whether this is, or is called like, an ADIOS2 file: BP5's is a folder."""
    inside = any((path / name).exists() for name in ("md.idx", GUARD))
    return inside or (path.suffix == ".bp" and not (path / "manifest.json").exists())


def write_guard(folder: Path, manifest: Manifest) -> None:
    """Notes beside the data which files belong to it: sizes, and checksums of those that hold metadata."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size}
        if not path.name.startswith("data."):
            files[path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    body = {"format": FORMAT, "version": VERSION, "files": files, "manifest": manifest.to_json()}
    write_json(folder / GUARD, body)


def read_guard(folder: Path) -> Manifest:
    """Compares the files with what was noted when they were written, and gives the store's manifest.

    The ADIOS2 library waits for ever for the missing end of a truncated file, and reads damaged metadata as
    if it were sound: nothing is given to it that is not as it was written.

    Raises:
        DataError: absent, another program's file, of a newer version, truncated or damaged.
    """
    remedy = "convert the store again: equipot data convert STORE --to bp --out " + str(folder)
    if not folder.is_dir():
        what = "is no ADIOS2 BP5 file, which is a folder" if folder.exists() else "no such ADIOS2 file"
        raise DataError(f"{folder}: {what}; {remedy}")
    if not (folder / GUARD).exists():
        raise DataError(
            f"{folder}: is no ADIOS2 file that equipot wrote (no {GUARD}); import the data from its source"
        )
    body = read_json(folder / GUARD)
    if body.get("format") != FORMAT:
        raise DataError(f"{folder / GUARD}: damaged; {remedy}")
    if body.get("version", 0) > VERSION:
        raise DataError(
            f"{folder}: version {body['version']} of the layout, this equipot reads up to {VERSION}; "
            "upgrade equipot"
        )
    for name, noted in body["files"].items():
        path = folder / name
        if not path.exists():
            raise DataError(f"{path}: is missing; {remedy}")
        size = path.stat().st_size
        if size != noted["bytes"]:
            raise DataError(f"{path}: has {size} bytes instead of {noted['bytes']}, it is damaged; {remedy}")
        if "sha256" in noted and hashlib.sha256(path.read_bytes()).hexdigest() != noted["sha256"]:
            raise DataError(f"{path}: has changed since it was written, it is damaged; {remedy}")
    return Manifest.from_json(body["manifest"], folder / GUARD)
