"""A mix: which structures of which stores are trained on, validated on, tested on. An index, no data.

A folder with `mix.json` and one flat list of structure indices per split, source after source. The training
list of a source is in an order drawn by the seed, so that a subset is the beginning of each source's list:
smaller ones lie inside larger ones, and all have the same shares of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipot.model.references import References
from equipot.train.arrays import OFFSETS, map_rows, per_atom, per_structure
from equipot.train.chemistry import Chemistry
from equipot.train.errors import DataError
from equipot.train.manifest import read_json
from equipot.train.mix_request import SourceRequest
from equipot.train.places import BLOCK, Places, Segment
from equipot.train.sections import parse_bytes
from equipot.train.splits import NAMES
from equipot.train.store import Store

CARD = "mix.json"
PICTURE = "composition.png"
FORMAT = "equipot-mix"
VERSION = 1
_PARTS = 10**6
"""A subset given in bytes is a whole number of these parts of every source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """How much of a source is in a split; bytes are those its store takes for it."""

    structures: int
    atoms: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MixSource:
    """One store in a mix.

    Attributes:
        name: in the mix.
        path: of the store when the mix was made, absolute.
        relative: the same from the mix's folder.
        digest, level_of_theory, licence, structures: of the store.
        weight: how often an epoch sees a training structure, as a fraction in text.
        caps: what was asked for.
        groups: that something was taken of.
        counts: by split.
        left_out: reason → structures of the store in no split.
        elements: atomic number (as text) → atoms in the training split.
        sizes: training structures with 2ᵏ to 2ᵏ⁺¹ − 1 atoms, k from 0.
    """

    name: str
    path: str
    relative: str
    digest: str
    level_of_theory: str
    licence: str
    structures: int
    weight: str
    caps: Mapping[str, int | None]
    groups: int
    counts: Mapping[str, Count]
    left_out: Mapping[str, int]
    elements: Mapping[str, int]
    sizes: Sequence[int]

    @property
    def draws(self) -> int:
        """How many structures an epoch takes from the whole training split."""
        return int(self.counts["train"].structures * Fraction(self.weight))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixCard:
    """What `mix.json` says.

    Attributes:
        digest: identity of what is trained, validated and tested on; not of where it lies.
        seed, fractions: what was asked for.
        chemistry: of the whole training split.
        levels: of theory, rows of the references.
        references: fitted to the whole training split, every structure once.
        sources: in the order of the store indices.
        files: list → its checksum and rows.
    """

    digest: str
    seed: int
    fractions: tuple[float, float, float]
    chemistry: Chemistry
    levels: tuple[str, ...]
    references: References
    sources: tuple[MixSource, ...]
    files: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "digest": self.digest,
            "seed": self.seed,
            "fractions": list(self.fractions),
            "chemistry": asdict(self.chemistry),
            "levels_of_theory": list(self.levels),
            "references": self.references.to_json(),
            "sources": [asdict(source) for source in self.sources],
            "files": {name: dict(entry) for name, entry in self.files.items()},
        }

    @staticmethod
    def from_json(body: Mapping[str, Any], where: Path) -> MixCard:
        """From a JSON object; DataError if it is of another format, newer, or incomplete."""
        if body.get("format") != FORMAT:
            raise DataError(f"{where}: is not the index of a mix")
        if body.get("version", 0) > VERSION:
            raise DataError(
                f"{where}: mix version {body['version']}, this equipot reads up to {VERSION}; upgrade equipot"
            )
        try:
            a, b, c = (float(share) for share in body["fractions"])
            return MixCard(
                digest=body["digest"],
                seed=body["seed"],
                fractions=(a, b, c),
                chemistry=Chemistry(**{key: tuple(values) for key, values in body["chemistry"].items()}),
                levels=tuple(body["levels_of_theory"]),
                references=References.from_json(body["references"]),
                sources=tuple(_source(entry) for entry in body["sources"]),
                files=body["files"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: damaged ({error}); make the mix again") from None

    def identity(self) -> str:
        """The digest, from everything but places and names of files."""
        body = self.to_json()
        for key in ("digest", "files"):
            del body[key]
        for source in body["sources"]:
            del source["path"], source["relative"]
        body["checksums"] = {name: entry["sha256"] for name, entry in self.files.items()}
        text = json.dumps(body, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class Mix:
    """A mix whose stores are open and are those it was made of.

    Attributes:
        path: its folder.
        card: what it says of itself.
        stores: in the order of the store indices.
    """

    def __init__(self, path: Path, card: MixCard, stores: Sequence[Store]) -> None:
        self.path = path
        self.card = card
        self.stores = tuple(stores)
        self._lists = {name: self._map(name) for name in NAMES}

    @staticmethod
    def open(path: str | Path, *, stores: Sequence[Path] = (), store_root: Path | None = None) -> Mix:
        """Opens a mix and its stores, and checks that they are what was mixed.

        Args:
            path: folder of the mix.
            stores: where its stores lie, in its order; by default where they lay, as seen from the mix's
                folder or absolutely.
            store_root: folder that holds them, by the names of their folders.

        Raises:
            DataError: no mix, a damaged or newer one, or a store that is missing, has grown or changed.
        """
        folder = Path(path)
        card = read_card(folder)
        if stores and len(stores) != len(card.sources):
            raise DataError(f"{folder}: is of {len(card.sources)} store(s), {len(stores)} given")
        opened = []
        for k, source in enumerate(card.sources):
            place = stores[k] if stores else _find(folder, source, store_root)
            store = Store.open(place)
            if store.manifest.digest != source.digest:
                raise DataError(
                    f"{store.path}: is not the store that {folder} was made of, or has grown since "
                    f"({store.manifest.digest[:15]}…, then {source.digest[:15]}…); give the store as it was, "
                    "or make the mix (or begin the run) anew to take in what has changed"
                )
            opened.append(store)
        return Mix(folder, card, opened)

    def part(self, name: str) -> Places:
        """Every structure of a split, once.

        Raises:
            DataError: there is no such split.
        """
        if name not in NAMES:
            raise DataError(f"no split {name!r}; one of {', '.join(NAMES)}")
        return Places([Segment(k, indices) for k, indices in enumerate(self._segments(name))])

    def training(self, subset: float | str = 1.0) -> tuple[Places, Places]:
        """(structures of a subset of the training split, what an epoch draws of them by weight).

        Args:
            subset: fraction in (0, 1], or bytes in text.

        Raises:
            DataError: not even one structure of each source fits into so many bytes.
        """
        share = self.share(subset)
        once, drawn = [], []
        for k, indices in enumerate(self._segments("train")):
            taken = indices[: _entries(len(indices), share)]
            once.append(Segment(k, taken))
            drawn.append(Segment(k, taken, Fraction(self.card.sources[k].weight)))
        return Places(once), Places(drawn)

    def share(self, subset: float | str) -> Fraction:
        """The fraction of every source's training structures that a subset is."""
        if not isinstance(subset, str):
            return Fraction(repr(float(subset)))
        budget = parse_bytes(subset)
        measures = [_Measure(store, self._segments("train")[k]) for k, store in enumerate(self.stores)]

        def size(parts: int) -> int:
            share = Fraction(parts, _PARTS)
            return sum(measure.bytes(_entries(len(measure), share)) for measure in measures)

        parts = bisect_right(range(1, _PARTS + 1), budget, key=size)
        if not parts:
            raise DataError(
                f"subset = {subset!r}: the smallest subset of {self.path} takes {size(1):,} bytes; give more"
            )
        return Fraction(parts, _PARTS)

    def verify(self) -> None:
        """Reads the lists and compares their checksums; DataError if a byte has changed."""
        for name in NAMES:
            path = self.path / f"{name}.npy"
            if file_digest(path) != self.card.files[name]["sha256"]:
                raise DataError(f"{path}: has changed since the mix was made; make the mix again")

    def _map(self, name: str) -> NDArray[Any]:
        path = self.path / f"{name}.npy"
        rows = self.card.files[name]["rows"]
        if not rows:
            return np.empty(0, dtype=np.uint32)
        try:
            return map_rows(path, rows)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: {error}; the mix is damaged, make it again") from None

    def _segments(self, name: str) -> list[NDArray[Any]]:
        lengths = [source.counts[name].structures for source in self.card.sources]
        return np.split(self._lists[name], np.cumsum(lengths)[:-1])


def read_card(folder: Path) -> MixCard:
    """What a mix says of itself, without its stores.

    Raises:
        DataError: no mix, or a damaged or newer one.
    """
    if not (folder / CARD).is_file():
        what = "is not a mix" if folder.exists() else "no such mix"
        raise DataError(f"{folder}: {what}; make one with: equipot data mix STORE… --out {folder}")
    return MixCard.from_json(read_json(folder / CARD), folder / CARD)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_of(store: Store, structures: int, atoms: int) -> int:
    """What so many structures and atoms take in a store."""
    columns = store.manifest.columns
    a_structure = OFFSETS.row_bytes + sum(field.row_bytes for field in per_structure(columns).values())
    an_atom = sum(field.row_bytes for field in per_atom(columns).values())
    return structures * a_structure + atoms * an_atom


def _entries(length: int, share: Fraction) -> int:
    """So many of a list's entries, rounded up, are a share of it."""
    return -(-length * share.numerator // share.denominator)


class _Measure:
    """Bytes of the first structures of a list, from sums over its blocks."""

    def __init__(self, store: Store, indices: NDArray[Any]) -> None:
        self._store, self._indices = store, indices
        sums = [self._atoms(at, at + BLOCK) for at in range(0, len(indices), BLOCK)]
        self._before = np.concatenate([[0], np.cumsum(sums, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._indices)

    def bytes(self, count: int) -> int:
        whole = count // BLOCK
        atoms = int(self._before[whole]) + self._atoms(whole * BLOCK, count)
        return bytes_of(self._store, count, atoms)

    def _atoms(self, start: int, stop: int) -> int:
        return int(self._store.n_atoms[self._indices[start:stop]].sum())


def _source(entry: Mapping[str, Any]) -> MixSource:
    counts = {name: Count(**count) for name, count in entry["counts"].items()}
    return MixSource(**{**entry, "counts": counts})


def _find(folder: Path, source: MixSource, store_root: Path | None) -> Path:
    if store_root is not None:
        places = [store_root / Path(source.path).name]
    else:
        places = [Path(os.path.normpath(folder.resolve() / source.relative)), Path(source.path)]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"{folder}: the store of its source {source.name} is not at {' nor at '.join(map(str, places))}; if "
        "it was moved, say where its folder lies now: --store-root DIR, or data.store_root in a recipe"
    )


def caps_of(request: SourceRequest) -> dict[str, int | None]:
    """A request's caps as JSON types."""
    return {name: getattr(request, name) for name in ("max_structures", "max_per_group", "max_atoms")}
