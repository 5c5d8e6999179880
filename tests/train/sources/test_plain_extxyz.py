"""What is read without ASE is what ASE reads; the quick look passes nothing that the full checks refuse."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipot.model.batch import System
from equipot.train.grouping import AUTO_KEYS
from equipot.train.sources import ase_file, structure
from equipot.train.sources.ase_file import open_ase_file
from equipot.train.sources.base import Frame, FrameError, ReadOptions
from equipot.train.sources.plain_extxyz import plain_frame
from equipot.train.sources.structure import check_structure
from equipot.train.sources.xyz_chunks import chunks

OPTIONS = ReadOptions(group_keys=AUTO_KEYS)
FRAME = """2
{comment}
O 0.0 0.0 0.0 0.1 0.0 1e-3
H 0.0 0.1 0.9 -0.1 0.0 -1.0E-3
"""
COLUMNS = "Properties=species:S:1:pos:R:3:forces:R:3"


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
        elif a != b:
            return False
    return True


def by_ase(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    with monkeypatch.context() as patched:
        patched.setattr(ase_file, "plain_frame", lambda chunk, options: None)
        return list(open_ase_file(path, OPTIONS).frames())


@pytest.mark.parametrize(
    "name",
    [
        "molecules/3bpa_train_300K.xyz",
        "molecules/acac_train_300K.xyz",
        "mattersim_TP/mpf-TP.xyz",
        "alexandria/alexandria-sample.xyz",
    ],
)
def test_real_files(
    name: str, sample: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head.xyz"
    with sample(name).open() as file:
        path.write_text("".join(next(file, "") for _ in range(1500)))
    ours = list(open_ase_file(path, OPTIONS).frames())
    with path.open("rb") as stream:
        plain = sum(plain_frame(chunk, OPTIONS) is not None for chunk in chunks(stream))
    assert plain >= len(ours) - 1  # the last may be cut short
    assert all(same(a, b) for a, b in zip(ours, by_ase(path, monkeypatch), strict=True))


@pytest.mark.parametrize(
    "words",
    [
        "energy=-1",
        "energy=-1.5 free_energy=-1.6 charge=1 spin_multiplicity=2",
        'energy=-1.5 Lattice="4 0 0 1 4 0 0 0 4" stress="1 2 3 4 5 6 7 8 9"',
        'energy=-1.5 Lattice="4 0 0 1 4 0 0 0 4" pbc="T F T" virial="1 2 3 4 5 6"',
        'energy=-1.5 Lattice="4 0 0 1 4 0 0 0 4" stress="1 2 3 2 5 6 3 6 9"',
        'energy=-1.5 Lattice="4 0 0 1 4 0 0 0 4" REF_stress="1 2 3 4 5 6 7 8 9"',
        'energy=-1.5 Lattice="4 0 0 1 4 0 0 0 4" REF_virial="1 2 3 4 5 6"',
        'energy=-1.5 note="energy=3 of {this}"',
        "energy=-1.5 trajectory=007",
        "energy=-1.5 trajectory=1e5",
        "energy=-1.5 sid=T",
        'energy=-1.5 sid="a b"',
        "energy=-1.5 group={1 2 3}",
        "energy=-1.5 energy=-2.5",
        "energy=-1.5 REF_energy=-2.5 flag",
        "energy=-1.5 spin=1.0 mol_id=nan",
        "energy=-1.5 energy_unit=eV forces_unit=eV/A",
        "energy_per_atom=-1.5 mol_id=x:1/2",
        "energy=1_0",
        "energy='-1.5'",
        'energy="-1.5"',
    ],
)
def test_comment_lines(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.extxyz"
    path.write_text(FRAME.format(comment=f"{COLUMNS} {words}"))
    ours = list(open_ase_file(path, OPTIONS).frames())
    (theirs,) = by_ase(path, monkeypatch)
    assert same(ours[0], theirs)


def test_what_is_plain_needs_no_ase_and_what_is_wrong_is_left_to_it() -> None:
    def plain(comment: str) -> Frame | None:
        (chunk,) = chunks(io.BytesIO(FRAME.format(comment=comment).encode()))
        return plain_frame(chunk, OPTIONS)

    good = plain(f"{COLUMNS} energy=-1.5 sid=12")
    assert good is not None
    assert good.group == ("sid", "12")
    assert plain(f"{COLUMNS} energy=nan") is None
    assert plain(COLUMNS) is None
    assert plain("energy=-1.5") is None


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 100),
    size=st.sampled_from([0.5, 1.5, 4.0, 12.0]),
    periodic=st.booleans(),
    near=st.sampled_from([0.0, 0.05, 0.099, 0.101, 0.5]),
)
def test_the_quick_look_is_sound(seed: int, n: int, size: float, periodic: bool, near: float) -> None:
    rng = np.random.default_rng(seed)
    cell = size * (np.eye(3) + rng.uniform(-0.6, 0.6, (3, 3)))
    positions = (rng.uniform(-2, 2, (n, 3)) @ cell).astype(np.float64)
    if n > 1:  # an atom near to another, or to an image of it
        step = rng.normal(size=3)
        shift = rng.integers(-1, 2, 3) @ cell if periodic else np.zeros(3)
        positions[-1] = positions[0] + shift + near * step / np.linalg.norm(step)
    system = System(
        atomic_numbers=np.full(n, 6),
        positions=positions.astype(np.float64),
        cell=cell,
        pbc=np.full(3, periodic),
    )
    if structure._plainly_fine(system):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(structure, "_plainly_fine", lambda system: False)
            check_structure(system)


def test_the_quick_look_settles_ordinary_structures_and_no_bad_one() -> None:
    grid = np.asarray(np.argwhere(np.ones((3, 3, 3))) * 2.0, dtype=np.float64)
    for pbc in (True, False):
        system = System(
            atomic_numbers=np.full(27, 29), positions=grid, cell=np.eye(3) * 6.0, pbc=np.full(3, pbc)
        )
        assert structure._plainly_fine(system)
    close = np.array([[0.01, 0.0, 0.0], [5.96, 6.0, -6.0]])  # 0.05 Å through the boundary
    bad = System(atomic_numbers=np.full(2, 29), positions=close, cell=np.eye(3) * 6.0, pbc=np.full(3, True))
    assert not structure._plainly_fine(bad)
    with pytest.raises(FrameError, match="through the periodic boundary"):
        check_structure(bad)
