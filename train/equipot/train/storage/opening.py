"""Finds out what a store is by its address, and opens it there. Reads no data."""

from pathlib import Path

from equipot.train.errors import DataError
from equipot.train.manifest import Manifest, read_json
from equipot.train.storage.base import Storage
from equipot.train.storage.bp_layout import is_bp, read_guard
from equipot.train.storage.memory_map import MemoryMap

MANIFEST = "manifest.json"
JOURNAL = "journal.json"
RAY = "ray:"


def open_storage(address: str | Path) -> tuple[Path, Manifest, Storage]:
    """Opens what lies at an address: its folder, what it says of itself, and its arrays.

    Args:
        address: folder of a store, or an ADIOS2 file that `convert` wrote; "ray:" before it has it served
            from the memory of the Ray cluster's nodes.

    Raises:
        DataError: not a store, an unfinished one, of a newer version, or damaged; or a package is missing.
    """
    if str(address).startswith(RAY):
        folder, manifest, storage = open_storage(str(address).removeprefix(RAY))
        try:
            from equipot.train.storage.ray_store import RayStore
        except ModuleNotFoundError as error:
            raise missing(address, "is to be served by Ray", error) from None
        return folder, manifest, RayStore(folder.resolve(), manifest, storage)
    folder = Path(address)
    if is_bp(folder):
        return folder, *_open_bp(folder)
    return folder, *_open_folder(folder)


def missing(address: str | Path, what: str, error: ModuleNotFoundError) -> DataError:
    """The error for an optional package that is not installed; each has an extra of its own name."""
    package = str(error.name).partition(".")[0]
    extra = {"adios2": "adios", "ray": "ray"}.get(package)
    if extra is None:
        raise error
    return DataError(f"{address}: {what}, which needs {package}: pip install 'equipot[{extra}]'")


def _open_bp(folder: Path) -> tuple[Manifest, Storage]:
    manifest = read_guard(folder)
    try:
        from equipot.train.storage.adios_bp import AdiosBp
    except ModuleNotFoundError as error:
        raise missing(folder, "is an ADIOS2 file", error) from None
    return manifest, AdiosBp(folder, manifest)


def _open_folder(folder: Path) -> tuple[Manifest, Storage]:
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
    return manifest, storage
