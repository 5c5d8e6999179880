"""Finds out what a store is by its address, and opens it there. Reads no data."""

from pathlib import Path

from equipot.train.errors import DataError
from equipot.train.manifest import Manifest, read_json
from equipot.train.storage.base import Storage
from equipot.train.storage.memory_map import MemoryMap

MANIFEST = "manifest.json"
JOURNAL = "journal.json"


def open_storage(address: str | Path) -> tuple[Path, Manifest, Storage]:
    """Opens what lies at an address: its folder, what it says of itself, and its arrays.

    Raises:
        DataError: not a store, an unfinished one, of a newer version, or damaged.
    """
    folder = Path(address)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such store; make one with: equipot data import FILE… --out {folder}")
    if not (folder / MANIFEST).exists():
        if (folder / JOURNAL).exists():
            raise DataError(f"{folder}: its import is not finished; run the same import command again")
        raise DataError(f"{folder}: is not an equipot store (no {MANIFEST})")
    manifest = Manifest.from_json(read_json(folder / MANIFEST), folder / MANIFEST)
    if sum(entry.structures for entry in manifest.shards) != manifest.structures:
        raise DataError(f"{folder / MANIFEST}: damaged, its shards do not add up; import the data again")
    storage = MemoryMap(folder, manifest)
    storage.check()
    return folder, manifest, storage
