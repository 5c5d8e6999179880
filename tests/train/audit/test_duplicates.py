"""Copies are found however they are moved, turned, renumbered or repeated; different structures are not."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.build import bulk, make_supercell, molecule
from numpy.typing import NDArray

from equipot.model.batch import System
from equipot.train.audit.duplicates import TOLERANCE, exact_copies
from equipot.train.audit.findings import Severity
from equipot.train.audit.geometry import describe, difference
from equipot.train.audit.run import AuditOptions, audit_stores
from equipot.train.importer import ImportOptions, import_files
from equipot.train.places import in_blocks
from equipot.train.splits import NAMES
from equipot.train.store import Store

from .conftest import MakeMix, MakeStore, labelled


def system(atoms: ase.Atoms) -> System:
    return System(atoms.numbers, atoms.positions, atoms.cell[:], atoms.pbc)


def rotation(seed: int, *, proper: bool = True) -> NDArray[np.float64]:
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return np.asarray(turn * np.linalg.det(turn) * (1 if proper else -1))


def ethanol() -> ase.Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def perovskite() -> ase.Atoms:
    atoms = bulk("SrTi", "cesiumchloride", a=3.9)
    atoms += ase.Atoms("O3", atoms.cell.cartesian_positions([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]))
    atoms.rattle(0.1, seed=2)
    return atoms


def slab() -> ase.Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 2, 1)
    atoms.rattle(0.05, seed=3)
    atoms.pbc = (True, True, False)
    return atoms


def turned(atoms: ase.Atoms, *, proper: bool = True) -> ase.Atoms:
    turn = rotation(4, proper=proper)
    return ase.Atoms(atoms.numbers, atoms.positions @ turn, cell=atoms.cell[:] @ turn, pbc=atoms.pbc)


def renumbered(atoms: ase.Atoms) -> ase.Atoms:
    return atoms[np.random.default_rng(5).permutation(len(atoms))]


def moved(atoms: ase.Atoms) -> ase.Atoms:
    copy = atoms.copy()
    copy.positions += [1.3, -0.7, 2.9]
    if copy.pbc.all():
        copy.wrap()
    return copy


def shaken(atoms: ase.Atoms, size: float = 0.001) -> ase.Atoms:
    copy = atoms.copy()
    copy.rattle(size, seed=6)
    return copy


COPIES: dict[str, Callable[[ase.Atoms], ase.Atoms]] = {
    "turned": turned,
    "mirrored": lambda atoms: turned(atoms, proper=False),
    "renumbered": renumbered,
    "moved": moved,
    "shaken by 0.001 Å": shaken,
    "all at once": lambda atoms: shaken(moved(renumbered(turned(atoms)))),
}
PERIODIC_COPIES: dict[str, Callable[[ase.Atoms], ase.Atoms]] = {
    "doubled": lambda atoms: atoms * (2, 1, 1),
    "another cell": lambda atoms: make_supercell(atoms, [[1, 1, 0], [0, 1, 0], [0, 0, 1]]),
    "skew supercell, renumbered": lambda atoms: renumbered(
        make_supercell(atoms, [[1, 1, 0], [-1, 1, 0], [0, 0, 1]])
    ),
}


@pytest.mark.parametrize("make", [ethanol, perovskite, slab])
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_alike(make: Callable[[], ase.Atoms], how: str) -> None:
    one, two = describe(system(make())), describe(system(COPIES[how](make())))
    assert difference(one, two) < TOLERANCE
    assert np.abs(one.features - two.features).max() < TOLERANCE


@pytest.mark.parametrize("how", PERIODIC_COPIES)
def test_other_cells_of_a_crystal_are_alike(how: str) -> None:
    one, two = describe(system(perovskite())), describe(system(PERIODIC_COPIES[how](perovskite())))
    assert difference(one, two) < 1e-6
    assert np.abs(one.features - two.features).max() < 1e-6
    np.testing.assert_array_equal(one.proportions, two.proportions)


@pytest.mark.parametrize("make", [ethanol, perovskite, slab])
def test_thermal_motion_is_no_copy(make: Callable[[], ase.Atoms]) -> None:
    assert difference(describe(system(make())), describe(system(shaken(make(), 0.05)))) > 2 * TOLERANCE


def test_other_arrangements_are_no_copies() -> None:
    perfect = bulk("Cu", cubic=True) * (2, 2, 2)
    together, apart = perfect.copy(), perfect.copy()
    together.numbers[[0, 1]] = 79
    far = int(np.argmax(perfect.get_distances(0, range(len(perfect)), mic=True)))
    apart.numbers[[0, far]] = 79
    assert difference(describe(system(together)), describe(system(apart))) > 0.5
    strained = perfect.copy()
    strained.set_cell(perfect.cell[:] * 1.01, scale_atoms=True)
    assert difference(describe(system(perfect)), describe(system(strained))) > TOLERANCE


def test_a_description_moves_no_more_than_distances_do() -> None:
    for make, size in ((ethanol, 0.01), (perovskite, 0.003), (perovskite, 0.03)):
        atoms = make()
        step = np.random.default_rng(0).uniform(-1, 1, (len(atoms), 3))
        step *= size / np.linalg.norm(step, axis=1, keepdims=True)
        other = atoms.copy()
        other.positions += step
        one, two = describe(system(atoms)), describe(system(other))
        assert difference(one, two) <= 2 * size + 1e-9
        assert np.abs(one.features - two.features).max() <= 2 * size + 1e-9


def disguised(frames: list[ase.Atoms]) -> list[ase.Atoms]:
    """The same, each moved, turned and renumbered."""
    copies: list[ase.Atoms] = []
    for atoms in frames:
        order = np.random.default_rng(7).permutation(len(atoms))
        turn = rotation(len(copies))
        copy = ase.Atoms(atoms.numbers[order], atoms.positions[order] @ turn + 3.0, cell=atoms.cell[:] @ turn)
        copy.pbc = atoms.pbc
        forces = atoms.calc.results["forces"][order] @ turn
        copies.append(labelled(copy, energy=atoms.calc.results["energy"], forces=forces))
    return copies


@pytest.mark.parametrize("which", ["alcohols", "alloy"])
def test_disguised_copies_across_splits_are_leaks(
    which: str, request: pytest.FixtureRequest, make_store: MakeStore, make_mix: MakeMix
) -> None:
    frames = request.getfixturevalue(which)[:60]
    store = make_store([*frames, *disguised(frames[:20])], group_by="frame")
    mix = make_mix([store], (0.5, 0.0, 0.5))
    split_of = {int(i): name for name in NAMES for block in in_blocks(mix.part(name)) for i in block[:, 1]}
    apart = {(k, 60 + k) for k in range(20) if split_of[k] != split_of[60 + k]}
    audit = audit_stores([], AuditOptions(), mix=mix)
    (leak,) = [finding for finding in audit.findings if finding.code == "leak"]
    assert leak.severity is Severity.ERROR
    assert "train and test" in leak.summary
    pairs = {tuple(sorted((a.frame, b.frame))) for a, b in list(pairwise(leak.places))[::2]}
    assert pairs == apart
    assert leak.count == len(apart)
    assert audit.answer.startswith("not consistent")


def test_a_mix_is_compared_with_stores_outside_it(
    alcohols: list[ase.Atoms], make_store: MakeStore, make_mix: MakeMix
) -> None:
    store, outside = make_store(alcohols[:100]), make_store(disguised(alcohols[:40]), "benchmark")
    mix = make_mix([store])
    audit = audit_stores([outside], AuditOptions(), mix=mix)
    counts = {f.summary: f.count for f in audit.findings if f.code == "duplicates-across-stores"}
    for name in NAMES:
        taken = sum(int((block[:, 1] < 40).sum()) for block in in_blocks(mix.part(name)))
        assert counts.get(f"structures of store ({name}) and benchmark are nearly the same", 0) == taken
    assert sum(counts.values()) == 40
    assert "leak" not in {finding.code for finding in audit.findings}


def test_honest_splits_do_not_leak(alcohol_store: Store, make_mix: MakeMix) -> None:
    audit = audit_stores([], AuditOptions(), mix=make_mix([alcohol_store]))
    assert "leak" not in {finding.code for finding in audit.findings}


def test_copies_with_other_energies_are_a_conflict(
    alloy: list[ase.Atoms], alloy_store: Store, make_store: MakeStore
) -> None:
    shifted = [
        labelled(a, energy=a.calc.results["energy"] + 0.3 * len(a), forces=a.calc.results["forces"])
        for a in alloy
    ]
    stores = [alloy_store, make_store(shifted, "two")]
    codes = {f.code: f for f in audit_stores(stores, AuditOptions()).findings}
    assert codes["duplicates-across-stores"].count >= len(alloy)
    assert codes["label-conflict"].severity is Severity.ERROR
    assert "+0.3 eV per atom" in codes["label-conflict"].evidence
    elsewhere = [stores[0], make_store(shifted, "three", level="PBE0")]
    assert "label-conflict" not in {f.code for f in audit_stores(elsewhere, AuditOptions()).findings}


def test_exact_copies_across_stores_whatever_the_number_of_passes(
    alcohols: list[ase.Atoms], alcohol_store: Store, make_store: MakeStore
) -> None:
    stores = [alcohol_store, make_store(alcohols[150:], "two")]
    no_split = lambda store, indices: np.full(len(indices), -1)  # noqa: E731
    counts = []
    for at_once in (7, 100, 10_000):
        found = exact_copies(stores, no_split, lambda: None, at_once)
        counts.append({kind.relation: pairs.count for kind, pairs in found.items()})
    assert counts == [{"stores": 50}] * 3
    near = audit_stores(stores, AuditOptions()).near
    assert not any(kind.relation == "stores" for kind in near.pairs)


def test_copies_are_taken_into_a_small_sample_together(
    alloy: list[ase.Atoms], alloy_store: Store, make_store: MakeStore
) -> None:
    shaken_alloy = [labelled(shaken(a), energy=a.calc.results["energy"]) for a in alloy]
    stores = [alloy_store, make_store(shaken_alloy, "two")]
    audit = audit_stores(stores, AuditOptions(sample=100))
    assert audit.compared <= 100
    across = [pairs.count for kind, pairs in audit.near.pairs.items() if kind.relation == "stores"]
    # Drawn apart, half of each store would bring a quarter of the pairs together.
    assert sum(across) >= 0.7 * audit.compared / 2


def test_keep_duplicates_are_found_again(alcohols: list[ase.Atoms], tmp_path: Path) -> None:
    ase.io.write(tmp_path / "twice.extxyz", [*alcohols[:30], *alcohols[:30]])
    options = ImportOptions(level_of_theory="x", licence="x", name="x", keep_duplicates=True)
    store = Store.open(import_files([tmp_path / "twice.extxyz"], tmp_path / "store", options).store)
    (pairs,) = audit_stores([store], AuditOptions()).exact.values()
    assert pairs.count == 30
