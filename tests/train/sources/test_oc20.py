"""OC20: frames and their companion lines, both energies, tags and fixed atoms, truncation and shifts."""

import itertools
import lzma
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
from ase.build import fcc111
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from equipot.train.errors import DataError
from equipot.train.sources.base import ReadOptions, Reason
from equipot.train.sources.oc20 import open_oc20
from equipot.train.sources.oc22 import open_oc22

Sample = Callable[[str], Path]
Read = Callable[..., Any]


def open_level(path: Path, level: str = "total") -> Any:
    return open_oc20(path, ReadOptions(level=level))


def text_of(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode()


def test_the_sample_against_ase(sample: Sample, read: Read, tmp_path: Path) -> None:
    path = sample("oc20/s2ef_train_sample/3.extxyz.xz")
    kept, left_out = read(open_level(path))
    assert (len(kept), left_out) == (444, [])
    lines = text_of(path.parent / "3.txt.xz").splitlines()
    text = text_of(path).splitlines(keepends=True)
    end = 0
    for _ in range(8):
        end += int(text[end]) + 2
    (tmp_path / "some.extxyz").write_text("".join(text[:end]))
    shown = ase.io.read(tmp_path / "some.extxyz", ":")
    assert len(shown) == 8
    for frame, atoms, line in zip(kept[: len(shown)], shown, lines, strict=False):
        np.testing.assert_array_equal(frame.atomic_numbers, atoms.numbers)
        np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-12)
        np.testing.assert_allclose(frame.cell, atoms.cell.array, atol=1e-12)
        np.testing.assert_array_equal(frame.pbc, atoms.pbc)
        assert frame.energy == atoms.calc.results["energy"]  # not the free energy
        np.testing.assert_array_equal(frame.forces, atoms.calc.results["forces"])
        np.testing.assert_array_equal(frame.extras["tags"], atoms.arrays["tags"])
        np.testing.assert_array_equal(np.flatnonzero(frame.extras["fixed"]), atoms.constraints[0].index)
        system, number, _ = line.split(",")
        assert (frame.group, frame.name) == (("sid", system), f"{system}/{number}")
    fixed = np.concatenate([f.forces[f.extras["fixed"]] for f in kept])
    assert np.abs(fixed).max() > 0.1  # fixed atoms keep their forces


def test_referenced_energies_are_total_minus_reference(sample: Sample) -> None:
    path = sample("oc20/s2ef_train_sample/3.extxyz.xz")
    lines = text_of(path.parent / "3.txt.xz").splitlines()
    total = list(open_level(path).frames())
    referenced = list(open_level(path, "referenced").frames())
    for a, b, line in zip(total, referenced, lines, strict=True):
        assert b.energy == pytest.approx(a.energy - float(line.split(",")[2]), abs=1e-9)


def test_a_relaxation_is_downhill_by_its_forces(sample: Sample, read: Read) -> None:
    """ΔE = −work of the mean force over small steps: the sign and unit of energy and forces."""
    change, work = [], []
    for name, count in (("random1000142", 59), ("random1000188", 93), ("random1000100", 126)):
        kept, left_out = read(open_level(sample(f"oc20/relaxation_traj/{name}.traj")))
        assert (len(kept), left_out) == (count, [])
        for a, b in itertools.pairwise(kept):
            step = b.positions - a.positions
            if 1e-3 < np.abs(step).max() < 0.05:
                change.append(b.energy - a.energy)
                work.append(-0.5 * np.sum((a.forces + b.forces) * step))
    assert len(work) > 50
    assert np.dot(work, change) / np.dot(work, work) == pytest.approx(1, abs=0.1)
    assert kept[0].group == ("sid", "random1000100")  # that of the system's S2EF frames
    assert kept[0].extras["fixed"].any()
    assert np.abs(kept[0].forces[kept[0].extras["fixed"]]).max() > 0.01


def slab(shift: float = 0.0, symbol: str = "Cu") -> ase.Atoms:
    atoms = fcc111(symbol, size=(2, 2, 3), vacuum=6.0, a=3.6)
    atoms.pbc = True
    atoms.positions[-1, 2] += shift
    atoms.set_tags(np.where(atoms.get_tags() == 1, 1, 0))
    atoms.set_constraint(FixAtoms(np.flatnonzero(atoms.get_tags() == 0)))
    forces = np.full((len(atoms), 3), 0.5 + shift)
    atoms.calc = SinglePointCalculator(atoms, energy=-40.0 - shift, free_energy=-41.0, forces=forces)
    return atoms


def write_s2ef(folder: Path, frames: list[ase.Atoms], lines: list[str], name: str = "0") -> Path:
    """Frames and lines as the release has them."""
    text = []
    for atoms in frames:
        results = atoms.calc.results
        lattice = " ".join(map(str, atoms.cell.array.ravel()))
        fixed = atoms.constraints[0].index
        text.append(
            f'{len(atoms)}\nLattice="{lattice}" Properties=species:S:1:pos:R:3:move_mask:L:1:'
            f"tags:I:1:forces:R:3 "
            f'energy={results["energy"]} free_energy={results["free_energy"]} pbc="T T T"\n'
        )
        for k, atom in enumerate(atoms):
            numbers = " ".join(repr(float(x)) for x in atom.position)
            force = " ".join(repr(float(x)) for x in results["forces"][k])
            text.append(f"{atom.symbol} {numbers} {'F' if k in fixed else 'T'} {atom.tag} {force}\n")
    path = folder / f"{name}.extxyz.xz"
    path.write_bytes(lzma.compress("".join(text).encode()))
    (folder / f"{name}.txt.xz").write_bytes(lzma.compress("".join(line + "\n" for line in lines).encode()))
    return path


def lines_of(count: int) -> list[str]:
    return [f"random{k % 3},frame{k},{-30.0 - k}" for k in range(count)]


def test_a_companion_with_fewer_lines_costs_the_frames_without_one(tmp_path: Path, read: Read) -> None:
    path = write_s2ef(tmp_path, [slab(0.01 * k) for k in range(6)], lines_of(4))
    kept, left_out = read(open_level(path))
    assert [frame.name for frame in kept] == [
        "random0/frame0",
        "random1/frame1",
        "random2/frame2",
        "random0/frame3",
    ]
    assert [(i.index, i.reason) for i in left_out] == [(4, Reason.NO_COMPANION), (5, Reason.NO_COMPANION)]
    assert "0.txt.xz ends before this frame" in left_out[0].detail
    np.testing.assert_array_equal(kept[0].extras["fixed"], slab().get_tags() == 0)


def test_lines_that_are_shifted_show_by_the_composition(tmp_path: Path, read: Read) -> None:
    frames = [slab(0.01 * k, ("Cu", "Ni", "Pt")[k % 3]) for k in range(9)]
    lines = lines_of(9)
    del lines[4]
    kept, left_out = read(open_level(write_s2ef(tmp_path, frames, lines)))
    assert [frame.index for frame in kept] == [0, 1, 2, 3]
    assert {item.reason for item in left_out} == {Reason.NO_COMPANION}
    assert "had another composition" in left_out[0].detail


def test_a_malformed_line_costs_its_frame(tmp_path: Path, read: Read) -> None:
    lines = lines_of(3)
    lines[1] = "random1,frame1"
    kept, left_out = read(open_level(write_s2ef(tmp_path, [slab(0.01 * k) for k in range(3)], lines)))
    assert [frame.index for frame in kept] == [0, 2]
    assert left_out[0].reason is Reason.NO_COMPANION


def test_a_truncated_file_keeps_what_is_whole(tmp_path: Path, read: Read) -> None:
    frames = [slab(0.01 * k) for k in range(40)]
    rng = np.random.default_rng(0)
    for atoms in frames:
        atoms.calc.results["forces"] = rng.normal(size=(len(atoms), 3))  # so that it does not compress away
    path = write_s2ef(tmp_path, frames, lines_of(40))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    kept, left_out = read(open_level(path))
    assert 5 < len(kept) < 40
    assert left_out[-1].reason is Reason.UNREADABLE
    assert len(left_out) <= 2
    plain = tmp_path / "7.extxyz"  # as 20M/1050.extxyz: plain text that ends inside a frame
    text = lzma.decompress(whole)
    plain.write_bytes(text[: len(text) - 300])
    (tmp_path / "7.txt.xz").write_bytes((tmp_path / "0.txt.xz").read_bytes())
    kept, left_out = read(open_level(plain))
    assert len(kept) == 39
    assert [item.index for item in left_out] == [39]
    plain.write_bytes(text[: len(text) // 2])
    kept, left_out = read(open_level(plain))
    assert "line(s) of 7.txt.xz have none" in left_out[-1].detail


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("-40.0 ", "nan ", Reason.NON_FINITE_LABEL),
        ("0.5 ", "inf ", Reason.NON_FINITE_LABEL),
        ("energy=-40.0 ", "", Reason.NO_LABEL),
        ("Cu ", "Xx ", Reason.INVALID),
        ("Cu 0.0", "Cu x.0", Reason.UNREADABLE),
        ("forces:R:3", "forces:R:2", Reason.UNREADABLE),
    ],
)
def test_bad_values_cost_their_frame(tmp_path: Path, read: Read, old: str, new: str, reason: Reason) -> None:
    path = write_s2ef(tmp_path, [slab(), slab(0.02)], lines_of(2))
    text = lzma.decompress(path.read_bytes()).decode()
    if new == "":
        text = text.replace(" energy=-40.0", "", 1).replace("free_energy=-41.0", "", 1)
    else:
        text = text.replace(old, new, 1)
    path.write_bytes(lzma.compress(text.encode()))
    kept, left_out = read(open_level(path))
    assert [frame.index for frame in kept] == [1]
    assert [item.reason for item in left_out] == [reason]


def test_a_relaxation_takes_its_reference_from_system_txt(tmp_path: Path, read: Read) -> None:
    ase.io.write(tmp_path / "random7.traj", [slab(), slab(0.02)])
    ase.io.write(tmp_path / "random8.extxyz", [slab(), slab(0.02)], format="extxyz")
    with pytest.raises(DataError, match=r"system\.txt"):
        open_level(tmp_path / "random7.traj", "referenced")
    (tmp_path / "system.txt").write_text("random6,-1.0\nrandom7,-35.0\nrandom8,-36.0\n")
    for name, reference in (("random7.traj", -35.0), ("random8.extxyz", -36.0)):
        kept, left_out = read(open_level(tmp_path / name, "referenced"))
        assert left_out == []
        assert [frame.energy for frame in kept] == pytest.approx([-40.0 - reference, -40.02 - reference])
        assert kept[0].extras["fixed"].sum() == 8
        np.testing.assert_allclose(kept[0].forces, 0.5)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_level(tmp_path / "random1.traj")
    path = write_s2ef(tmp_path, [slab()], lines_of(1))
    (tmp_path / "0.txt.xz").unlink()
    with pytest.raises(DataError, match=r"no 0\.txt\.xz"):
        open_level(path)
    (tmp_path / "random2.extxyz.xz").write_bytes(b"not xz")
    with pytest.raises(DataError, match="cannot be read"):
        open_level(tmp_path / "random2.extxyz.xz")


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def test_a_trajectory_that_is_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    body = pickle.dumps(Runs(f"touch {marker}"))
    for name, start in (("a.traj", b""), ("b.traj", b"PickleTrajectory")):
        (tmp_path / name).write_bytes(start + body)
        for opener in (open_oc20, open_oc22):
            with pytest.raises(DataError, match="not a trajectory of ASE"):
                opener(tmp_path / name, ReadOptions(level="total"))
    assert not marker.exists()


def test_a_truncated_trajectory_keeps_what_is_whole(sample: Sample, tmp_path: Path, read: Read) -> None:
    path = sample("oc20/relaxation_traj/random1000163.traj")
    whole, _ = read(open_level(path))
    body = path.read_bytes()
    (tmp_path / "random1000163.traj").write_bytes(body[: len(body) // 2])
    kept, left_out = read(open_level(tmp_path / "random1000163.traj"))
    assert 0 < len(kept) < len(whole)
    assert len(kept) + len(left_out) == len(whole) == 27
    assert {item.reason for item in left_out} == {Reason.UNREADABLE}
    assert [frame.energy for frame in kept] == [whole[frame.index].energy for frame in kept]


def test_bombs_cost_a_frame_and_little_memory(tmp_path: Path, read: Read) -> None:
    """A line of 200 MB and a frame of 10^12 atoms, both of a few bytes when compressed."""
    path = write_s2ef(tmp_path, [slab(), slab(0.02)], lines_of(5))
    text = lzma.decompress(path.read_bytes())
    bombs = b"2\n" + b"x" * 200_000_000 + b"\n" + b"9" * 12 + b"\nx\nCu 0 0 0\n" + b"9" * 5000 + b"\nx\n"
    path.write_bytes(lzma.compress(bombs + text, preset=0))
    tracemalloc.start()
    kept, left_out = read(open_level(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [frame.energy for frame in kept] == [-40.0, -40.02]
    assert {item.reason for item in left_out} == {Reason.UNREADABLE}
    assert peak < 50e6
