"""ANI-1x: Hartree to eV, levels by name, NaN rows out, damage named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import h5py
import numpy as np
import pytest

from equipot.train.errors import DataError
from equipot.train.sources.ani1x import HARTREE, LEVELS, open_ani1x
from equipot.train.sources.base import ReadOptions, Reason

Sample = Callable[[str], Path]
Read = Callable[..., Any]


def open_level(path: Path, level: str) -> Any:
    return open_ani1x(path, ReadOptions(level=level))


def test_the_real_file_in_ev(sample: Sample, read: Read) -> None:
    path = sample("ani1x/ani1_n5.hdf5")
    kept, left_out = read(open_level(path, "wb97x_dz"))
    assert (len(kept), left_out) == (8, [])
    with h5py.File(path) as file:
        formulas = list(file)
        raw = [
            (formula, k, file[formula]["wb97x_dz.energy"][k], file[formula]["wb97x_dz.forces"][k])
            for formula in formulas
            for k in range(len(file[formula]["wb97x_dz.energy"]))
        ]
    for frame, (formula, k, energy, forces) in zip(kept, raw, strict=True):
        assert frame.energy == pytest.approx(energy * 27.211386245988, rel=1e-14)
        np.testing.assert_allclose(frame.forces, forces.astype(np.float64) * 27.211386245988, rtol=1e-12)
        assert frame.group == ("formula", formula)
        assert frame.name == f"{formula}/{k}"
        assert not frame.pbc.any()
    assert abs(kept[0].energy) > 10000  # a total energy of all electrons in eV


def test_energies_and_forces_are_those_published_in_ev(sample: Sample, read: Read) -> None:
    """The same 500 frames were published as extended xyz in eV and eV/Å by their authors."""
    kept, _ = read(open_level(sample("ani1x/ani1x-release-sample.h5"), "wb97x_dz"))
    frames = [frame for frame in kept if frame.name.startswith("C12H12N2O/")]
    published = ase.io.read(sample("molecules/3bpa_train_300K.xyz"), ":")
    assert len(frames) == len(published) == 500
    for frame, atoms in zip(frames, published, strict=True):
        values = {**atoms.arrays, **atoms.info, **(atoms.calc.results if atoms.calc else {})}
        assert frame.energy == pytest.approx(values["energy"], abs=1e-4)
        np.testing.assert_allclose(frame.forces, values["forces"], atol=1e-4)


@pytest.mark.parametrize("level", ["ccsd(t)_cbs", "mp2_tz"])
def test_rows_that_were_not_computed_are_left_out_by_name(sample: Sample, read: Read, level: str) -> None:
    kept, left_out = read(open_level(sample("ani1x/ani1_n5.hdf5"), level))
    assert [item.index for item in left_out] == [4, 5]
    assert {item.reason for item in left_out} == {Reason.NON_FINITE_LABEL}
    assert "C1H6N2O5/1" in left_out[0].detail
    assert len(kept) == 6
    assert all(frame.forces is None for frame in kept)


def test_correlation_energies_are_added_to_hartree_fock(sample: Sample, read: Read) -> None:
    path = sample("ani1x/ani1_n5.hdf5")
    kept, _ = read(open_level(path, "npno_ccsd(t)_dz"))
    with h5py.File(path) as file:
        group = file["C1H4N4O4"]
        total = group["hf_dz.energy"][0] + group["npno_ccsd(t)_dz.corr_energy"][0]
    assert kept[0].energy == pytest.approx(total * HARTREE, rel=1e-13)


def test_a_level_the_file_lacks_is_refused_with_those_it_has(sample: Sample) -> None:
    with pytest.raises(DataError, match=r"hf_tz\.energy.*there are wb97x_dz, wb97x_tz, ccsd\(t\)_cbs"):
        open_level(sample("ani1x/ani1x-release-sample.h5"), "mp2_tz")


def write_release(path: Path, **changes: Any) -> Path:
    """Two formulas in the release's layout: H2O with three conformations, CH4 with two."""
    water = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    methane = np.array(
        [[0, 0, 0], [0.63, 0.63, 0.63], [-0.63, -0.63, 0.63], [-0.63, 0.63, -0.63], [0.63, -0.63, -0.63]]
    )
    with h5py.File(path, "w") as file:
        for formula, numbers, positions, count in (
            ("C1H4", [6, 1, 1, 1, 1], methane, 2),
            ("H2O1", [8, 1, 1], water, 3),
        ):
            group = file.create_group(formula)
            arrays: dict[str, Any] = {
                "atomic_numbers": np.array(numbers, np.uint8),
                "coordinates": np.stack([positions + 0.01 * k for k in range(count)]).astype(np.float32),
                "wb97x_dz.energy": -76.0 - np.arange(count),
                "wb97x_dz.forces": np.full((count, len(numbers), 3), 0.1, np.float32),
            }
            for key, value in {**arrays, **changes.get(formula, {})}.items():
                if value is not None:
                    group[key] = value
    return path


def test_nan_anywhere_is_masked_or_left_out(tmp_path: Path, read: Read) -> None:
    forces = np.full((3, 3, 3), 0.1, np.float32)
    forces[0] = np.nan
    forces[1, 2, 0] = np.nan
    path = write_release(
        tmp_path / "nan.h5", H2O1={"wb97x_dz.forces": forces, "wb97x_dz.energy": np.array([-76, -76, np.nan])}
    )
    kept, left_out = read(open_level(path, "wb97x_dz"))
    assert [frame.index for frame in kept] == [0, 1, 2]
    assert kept[2].forces is None
    assert any(note.code.startswith("forces: NaN") for note in kept[2].notes)
    assert [(item.index, item.reason) for item in left_out] == [
        (3, Reason.NON_FINITE_LABEL),
        (4, Reason.NON_FINITE_LABEL),
    ]
    assert "forces holds nan at (2, 0)" in left_out[0].detail


def test_a_formula_that_does_not_fit_costs_that_formula(tmp_path: Path, read: Read) -> None:
    path = write_release(tmp_path / "shape.h5", C1H4={"atomic_numbers": np.array([6, 1, 1], np.uint8)})
    kept, left_out = read(open_level(path, "wb97x_dz"))
    assert [item.index for item in left_out] == [0]
    assert "C1H4: coordinates has shape (2, 5, 3) for 3 atomic_numbers" in left_out[0].detail
    assert [frame.index for frame in kept] == [1, 2, 3]
    path = write_release(tmp_path / "energies.h5", H2O1={"wb97x_dz.energy": np.zeros(2)})
    kept, left_out = read(open_level(path, "wb97x_dz"))
    assert {item.reason for item in left_out} == {Reason.WRONG_SHAPE}
    assert [item.index for item in left_out] == [2, 3, 4]


def test_what_is_not_the_release_is_refused(tmp_path: Path, sample: Sample) -> None:
    whole = write_release(tmp_path / "whole.h5").read_bytes()
    for name, body, match in (
        ("cut.h5", whole[: len(whole) // 2], "cut.h5.*truncated"),
        ("text.h5", b"not HDF5", "text.h5: cannot be read as HDF5"),
        ("packed.h5", b"\xfd7zXZ\x00 and so on", "xz -dk"),
    ):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(DataError, match=match):
            open_level(tmp_path / name, "wb97x_dz")
    with pytest.raises(DataError, match="no such file"):
        open_level(tmp_path / "none.h5", "wb97x_dz")
    with pytest.raises(DataError, match="not laid out as ani1x-release"):
        open_level(sample("qm7x/1000.hdf5"), "wb97x_dz")


def test_a_link_to_another_file_is_not_followed(tmp_path: Path, read: Read) -> None:
    secret = write_release(tmp_path / "secret.h5")
    path = write_release(tmp_path / "link.h5", H2O1={"wb97x_dz.energy": None})
    with h5py.File(path, "a") as file:
        file["H2O1"]["wb97x_dz.energy"] = h5py.ExternalLink(str(secret), "H2O1/wb97x_dz.energy")
    kept, left_out = read(open_level(path, "wb97x_dz"))
    assert len(kept) == 2
    assert {item.reason for item in left_out} == {Reason.REFUSED}
    with h5py.File(path, "a") as file:
        file["N2"] = h5py.ExternalLink(str(secret), "H2O1")
    kept, left_out = read(open_level(path, "wb97x_dz"))
    assert (len(kept), left_out[-1].reason) == (2, Reason.REFUSED)
    assert left_out[-1].detail.startswith("N2: ")


def test_damage_inside_costs_what_it_hits(tmp_path: Path, read: Read) -> None:
    path = write_release(tmp_path / "whole.h5")
    whole = path.read_bytes()
    at = whole.index(np.float64(-77.0).tobytes())  # an energy of CH4
    (tmp_path / "damaged.h5").write_bytes(whole[:at] + np.float64(np.inf).tobytes() + whole[at + 8 :])
    kept, left_out = read(open_level(tmp_path / "damaged.h5", "wb97x_dz"))
    assert len(kept) == 4
    assert [(item.index, item.reason) for item in left_out] == [(1, Reason.NON_FINITE_LABEL)]


def test_every_level_names_its_theory() -> None:
    assert len({level.text for level in LEVELS.values()}) == len(LEVELS)
