"""Real files and small synthetic ones for the tests of the data side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from equipot.train.importer import ImportOptions, ImportReport, import_files
from equipot.train.sources.base import ReadOptions
from equipot.train.store import Store

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"

MakeFrames = Callable[..., list[ase.Atoms]]
WriteFrames = Callable[[Sequence[ase.Atoms], str], Path]
Import = Callable[..., ImportReport]


@pytest.fixture
def shared() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"shared data absent: {name}")
        return path

    return find


@pytest.fixture(scope="session")
def alcohols() -> Path:
    return ROOT / "examples" / "data" / "ethanol-methanol.extxyz"


@pytest.fixture(scope="session")
def make_frames() -> MakeFrames:
    def make(
        count: int, *, seed: int = 0, periodic: bool = False, sizes: tuple[int, ...] = (2, 3, 5)
    ) -> list[ase.Atoms]:
        rng = np.random.default_rng(seed)
        frames = []
        for k in range(count):
            n = sizes[k % len(sizes)]
            grid = np.argwhere(np.ones((3, 3, 3)))[rng.permutation(27)[:n]] * 1.5
            atoms = ase.Atoms(
                rng.choice([1, 6, 8], n),
                grid + rng.uniform(-0.2, 0.2, (n, 3)),
                cell=np.eye(3) * 6,
                pbc=periodic,
            )
            results = {"energy": float(rng.normal(-5 * n)), "forces": rng.normal(size=(n, 3))}
            if periodic:
                results["stress"] = rng.normal(size=6)
            atoms.calc = SinglePointCalculator(atoms, **results)
            frames.append(atoms)
        return frames

    return make


@pytest.fixture
def write_frames_to(tmp_path: Path) -> WriteFrames:
    def write(frames: Sequence[ase.Atoms], name: str) -> Path:
        path = tmp_path / name
        ase.io.write(path, frames, format="extxyz")
        return path

    return write


@pytest.fixture
def run_import(tmp_path: Path) -> Import:
    def run(
        *files: Path,
        out: Path | None = None,
        group_by: str = "auto",
        level: str = "PBE/def2-SVP",
        read: ReadOptions | None = None,
        commit_structures: int = 2048,
    ) -> ImportReport:
        options = ImportOptions(
            level_of_theory=level, licence="MIT", name="test", group_by=group_by, read=read or ReadOptions()
        )
        return import_files(files, out or tmp_path / "store", options, commit_structures=commit_structures)

    return run


@pytest.fixture
def make_store(run_import: Import, write_frames_to: WriteFrames, tmp_path: Path) -> Callable[..., Store]:
    def make(frames: Sequence[ase.Atoms], name: str = "made", **options: str) -> Store:
        file = write_frames_to(frames, f"{name}.extxyz")
        report = run_import(file, out=tmp_path / name, **options)
        return Store.open(report.store)

    return make


@pytest.fixture
def tree_bytes() -> Callable[[Path], dict[str, bytes]]:
    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read
