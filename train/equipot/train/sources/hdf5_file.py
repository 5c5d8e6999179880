"""Opens HDF5 files and reads plain arrays out of them; refuses what would reach outside of the file."""

from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.sources.base import FrameError, Reason, require_file

HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError)
"""What h5py raises for a damaged file, depending on where the damage is."""


def open_hdf5(path: Path) -> h5py.File:
    """Opens for reading.

    Raises:
        DataError: missing, compressed, cut short, or not HDF5.
    """
    require_file(path)
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\xfd7zXZ\x00":
        raise DataError(
            f"{path}: is compressed with xz, and HDF5 has to be read in any order; run: xz -dk {path}"
        )
    try:
        return h5py.File(path, "r")
    except HDF5_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read as HDF5 ({error}); get it again and compare its checksum"
        ) from None


def group_of(parent: h5py.Group, name: str) -> h5py.Group:
    """A group of a group.

    Raises:
        FrameError: not a group, or a link.
    """
    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        raise FrameError(Reason.REFUSED, f"{name} points elsewhere")
    found = parent[name]
    if not isinstance(found, h5py.Group):
        raise FrameError(Reason.UNREADABLE, f"{name} is not a group")
    return found


def rows_of(group: h5py.Group, name: str) -> h5py.Dataset:
    """A data set of numbers of a group.

    Raises:
        FrameError: absent, not numbers, or kept outside of this file.
    """
    link = group.get(name, getlink=True)
    if link is None:
        there = ", ".join(sorted(group)[:12])
        raise FrameError(Reason.NO_LABEL, f"{group.name} holds no {name}; there are {there}")
    if isinstance(link, h5py.ExternalLink):
        raise FrameError(Reason.REFUSED, f"{group.name}/{name} points to another file ({link.filename})")
    found = group[name]
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "biuf":
        raise FrameError(Reason.WRONG_SHAPE, f"{group.name}/{name} is not an array of numbers")
    if found.is_virtual or found.external:
        raise FrameError(Reason.REFUSED, f"{group.name}/{name} keeps its numbers in another file")
    return found


def array_of(group: h5py.Group, name: str) -> NDArray[np.float64]:
    """A whole data set of numbers."""
    return np.asarray(rows_of(group, name)[()])
