"""QM7-X: each energy with its own forces, duplicates out, molecules together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from equipot.train.errors import DataError
from equipot.train.sources.base import ReadOptions, Reason
from equipot.train.sources.qm7x import default_level, open_qm7x

Sample = Callable[[str], Path]
Read = Callable[..., Any]
WATER = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])


def write_release(path: Path, molecules: dict[str, list[str]], *, leave_out: tuple[str, ...] = ()) -> Path:
    """Water in every geometry, with labels that tell the levels apart."""
    with h5py.File(path, "w") as file:
        for molecule, geometries in molecules.items():
            for k, geometry in enumerate(geometries):
                arrays = {
                    "atNUM": np.array([8, 1, 1]),
                    "atXYZ": WATER + 0.01 * k,
                    "ePBE0": np.array([-2000.0 - k]),
                    "eMBD": np.array([-0.5]),
                    "ePBE0+MBD": np.array([-2000.5 - k]),
                    "pbe0FOR": np.full((3, 3), 0.1),
                    "vdwFOR": np.full((3, 3), 0.02),
                    "totFOR": np.full((3, 3), 0.12),
                }
                group = file.create_group(f"{molecule}/{geometry}")
                for key, value in arrays.items():
                    if key not in leave_out:
                        group[key] = value
    return path


def test_the_sample(sample: Sample, read: Read) -> None:
    path = sample("qm7x/1000.hdf5")
    assert default_level(path) == "pbe0"  # that file holds no MBD
    kept, left_out = read(open_qm7x(path, ReadOptions(level="pbe0")))
    assert (len(kept), left_out) == (10, [])
    with h5py.File(path) as file:
        for frame in kept:
            group = file[frame.name]
            assert frame.energy == group["ePBE0"][0]  # eV already
            np.testing.assert_array_equal(frame.forces, group["pbe0FOR"][()])
            assert np.abs(frame.forces.sum(axis=0)).max() < 0.05
    with pytest.raises(DataError, match=r"ePBE0\+MBD for --level pbe0\+mbd; there are pbe0"):
        open_qm7x(path, ReadOptions(level="pbe0+mbd"))


@pytest.mark.parametrize(("level", "energy", "force"), [("pbe0+mbd", -2000.5, 0.12), ("pbe0", -2000.0, 0.1)])
@pytest.mark.parametrize("leave_out", [(), ("ePBE0+MBD", "totFOR")])
def test_each_energy_has_its_own_forces(
    tmp_path: Path, read: Read, level: str, energy: float, force: float, leave_out: tuple[str, ...]
) -> None:
    path = write_release(tmp_path / "1000.hdf5", {"1": ["Geom-m1-i1-c1-opt"]}, leave_out=leave_out)
    assert default_level(path) == "pbe0+mbd"
    (frame,), left_out = read(open_qm7x(path, ReadOptions(level=level)))
    assert left_out == []
    assert frame.energy == energy
    np.testing.assert_allclose(frame.forces, force)
    assert frame.group == ("molecule", "qm7x 1")


def test_listed_duplicates_are_left_out_with_all_their_geometries(tmp_path: Path, read: Read) -> None:
    names = [f"Geom-m1-i1-c{c}-{k}" for c in (1, 2, 12) for k in ("opt", "1", "100")]
    path = write_release(tmp_path / "1000.hdf5", {"1": names})
    kept, _ = read(open_qm7x(path, ReadOptions(level="pbe0")))
    assert len(kept) == 9
    assert all(note.code.startswith("duplicates: no DupMols.dat") for frame in kept for note in frame.notes)
    (tmp_path / "DupMols.dat").write_text("Geom-m1-i1-c2-opt\nGeom-m9-i1-c1-opt\n")
    kept, left_out = read(open_qm7x(path, ReadOptions(level="pbe0")))
    assert [frame.name for frame in kept] == ["1/" + name for name in sorted(names) if "-c2-" not in name]
    assert len(left_out) == 3
    assert {item.reason for item in left_out} == {Reason.DUPLICATE}
    assert not kept[0].notes


def test_damage_costs_the_geometry_it_hits(tmp_path: Path, read: Read) -> None:
    path = write_release(tmp_path / "1000.hdf5", {"1": ["a-1", "a-2", "a-3", "a-4"], "2": ["b-1"]})
    with h5py.File(path, "a") as file:
        del file["1/a-1/ePBE0"]
        file["1/a-2/pbe0FOR"][0, 0] = np.nan
        del file["1/a-3/atXYZ"]
        file["1/a-3/atXYZ"] = WATER[:2]
        del file["1/a-4"]
        file["1/a-4"] = h5py.ExternalLink("/etc/passwd", "/")
    kept, left_out = read(open_qm7x(path, ReadOptions(level="pbe0")))
    assert [frame.name for frame in kept] == ["2/b-1"]
    assert [item.reason for item in left_out] == [
        Reason.NO_LABEL,
        Reason.NON_FINITE_LABEL,
        Reason.INVALID,
        Reason.REFUSED,
    ]
    assert all(item.detail.startswith("1/a-") for item in left_out)


def test_what_is_not_the_release_is_refused(tmp_path: Path, sample: Sample) -> None:
    (tmp_path / "1000.xz").write_bytes(b"\xfd7zXZ\x00....")
    with pytest.raises(DataError, match="xz -dk"):
        open_qm7x(tmp_path / "1000.xz", ReadOptions(level="pbe0"))
    with pytest.raises(DataError, match="not laid out as QM7-X"):
        open_qm7x(sample("ani1x/ani1_n5.hdf5"), ReadOptions(level="pbe0"))
