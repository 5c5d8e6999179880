"""The store's manifest: what is in it, in which units, where it came from. Knows nothing of arrays."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equipot.train.errors import DataError

FORMAT = "equipot-store"
VERSION = 1
UNITS: Mapping[str, str] = {
    "positions": "Å",
    "cell": "Å, rows are lattice vectors",
    "energy": "eV, total",
    "forces": "eV/Å",
    "stress": "eV/Å³, positive in tension",
    "charge": "e",
    "spin_multiplicity": "2S+1, 0 = not stated",
}
EXAMPLES_LIMIT = 50
"""Places kept per reason; the count goes on."""


@dataclass(kw_only=True, slots=True)
class SourceEntry:
    """One imported file: its name without folders, its checksum, and how many frames it gave."""

    file: str
    sha256: str
    bytes: int
    format: str
    frames_read: int = 0
    frames_kept: int = 0


@dataclass(kw_only=True, slots=True)
class ShardEntry:
    """One folder of flat arrays."""

    name: str
    structures: int = 0
    atoms: int = 0


@dataclass(kw_only=True, slots=True)
class Tally:
    """How often something happened, and the first places: [source index, frame index, detail]."""

    count: int = 0
    examples: list[list[Any]] = field(default_factory=list)

    def add(self, source: int, frame: int, detail: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < EXAMPLES_LIMIT:
            self.examples.append([source, frame, detail])


@dataclass(kw_only=True, slots=True)
class Manifest:
    """Everything `manifest.json` says.

    Attributes:
        name: the data set's name.
        level_of_theory: functional and basis or plane-wave set; one per store, as energies depend on it.
        licence: of the data.
        structures, atoms: how many.
        with_energy, with_forces, with_stress, periodic: number of structures that have it.
        groups: number of distinct groups.
        grouped_by: rule the groups were made by → number of structures.
        elements: atomic number (as text, JSON's keys are) → number of atoms.
        charges, spin_multiplicities: value (as text) → number of structures.
        sources: imported files; a structure's origin is (index in this list, frame).
        rejected: reason → frames left out.
        rejected_bytes: length of `rejected.csv`, which lists all of them.
        notes: what was decided or found odd about kept frames.
        warnings: what the labels as a whole look wrong for, with the evidence.
        shards: folders, in order.
        columns: optional arrays that the shards hold, of `arrays.OPTIONAL_PER_STRUCTURE` and `…_PER_ATOM`.
        chain: running checksum of all structures, in order.
        digest: identity of the content: level of theory and chain. The same frames give the same digest.
    """

    name: str
    level_of_theory: str
    licence: str
    structures: int = 0
    atoms: int = 0
    with_energy: int = 0
    with_forces: int = 0
    with_stress: int = 0
    periodic: int = 0
    groups: int = 0
    grouped_by: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    charges: dict[str, int] = field(default_factory=dict)
    spin_multiplicities: dict[str, int] = field(default_factory=dict)
    sources: list[SourceEntry] = field(default_factory=list)
    rejected: dict[str, Tally] = field(default_factory=dict)
    rejected_bytes: int = 0
    notes: dict[str, Tally] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    shards: list[ShardEntry] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    chain: str = ""
    digest: str = ""

    @property
    def has_forces(self) -> bool:
        """Whether any structure has forces."""
        return self.with_forces > 0

    @property
    def has_stress(self) -> bool:
        """Whether any structure has a stress."""
        return self.with_stress > 0

    @property
    def atomic_numbers(self) -> tuple[int, ...]:
        """The elements present, as sorted atomic numbers."""
        return tuple(sorted(int(z) for z in self.elements))

    def reject(self, reason: str, source: int, frame: int, detail: str) -> None:
        """Counts a frame that is left out."""
        self.rejected.setdefault(reason, Tally()).add(source, frame, detail)

    def note(self, code: str, source: int, frame: int, detail: str) -> None:
        """Counts something decided or found odd about a kept frame."""
        self.notes.setdefault(code, Tally()).add(source, frame, detail)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, with format, version and units."""
        body = asdict(self)
        for key in ("elements", "charges", "spin_multiplicities"):
            body[key] = dict(sorted(body[key].items(), key=lambda item: int(item[0])))
        for key in ("rejected", "notes", "grouped_by"):
            body[key] = dict(sorted(body[key].items()))
        return {"format": FORMAT, "version": VERSION, "units": dict(UNITS), **body}

    @classmethod
    def from_json(cls, body: Mapping[str, Any], where: Path) -> "Manifest":
        """From a JSON object.

        Raises:
            DataError: of another format, of a newer version, or with fields missing.
        """
        if body.get("format") != FORMAT:
            raise DataError(f"{where}: is not the manifest of an equipot store")
        if body.get("version", 0) > VERSION:
            raise DataError(
                f"{where}: store version {body['version']}, this equipot reads up to {VERSION}; "
                "upgrade equipot"
            )
        known = {key: value for key, value in body.items() if key not in ("format", "version", "units")}
        try:
            known["sources"] = [SourceEntry(**entry) for entry in known["sources"]]
            known["shards"] = [ShardEntry(**entry) for entry in known["shards"]]
            for key in ("rejected", "notes"):
                known[key] = {reason: Tally(**tally) for reason, tally in known[key].items()}
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: damaged ({error}); import the data again") from None


def content_digest(level_of_theory: str, chain: str) -> str:
    """Identity of a store's content: the same frames, groups and level of theory give the same digest."""
    text = json.dumps([FORMAT, VERSION, level_of_theory, chain])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; DataError names the file if it is none."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); import the data again") from None
    if not isinstance(body, dict):
        raise DataError(f"{path}: damaged (not a JSON object); import the data again")
    return body


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Writes aside, then renames: at any moment the file is the old one or the new one, whole."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
