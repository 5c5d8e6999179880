"""A small store labelled by a real potential, recipes on it, and two ways to train: here, or as users do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from filelock import FileLock

from equipot.train.checkpoint import read_weights
from equipot.train.importer import ImportOptions, import_files
from equipot.train.launch import free_port, rank_environment
from equipot.train.recipe import Recipe, load_recipe
from equipot.train.worker import Job, StopRequest, work
from equipot.train.world import World

MadeOnce = Callable[[str, Callable[[Path], None]], Path]

RECIPE = """
seed = 3
[data]
stores = ["{store}"]
fractions = [0.7, 0.2, 0.1]
[model]
width = 16
layers = 2
radial = 8
cutoff = 4.0
[batch]
structures = 8
[optimizer]
steps = 6
warmup_steps = 2
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Several processes share few cores: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def frames() -> list[Atoms]:
    """Rattled clusters and crystals of copper and nickel: isolated and periodic, 3 to 8 atoms."""
    random = np.random.default_rng(11)
    frames = []
    for number in range(60):
        if number % 3:
            size = 3 + number % 4
            positions = 2.5 * np.array([[i % 2, i // 2 % 2, i // 4] for i in range(size)], dtype=float)
            atoms = Atoms(random.choice(["Cu", "Ni"], size), positions)
        else:
            atoms = bulk("Cu", cubic=True) if number % 2 else bulk("Ni", cubic=True).repeat((1, 1, 2))
        atoms.positions += random.normal(scale=0.08, size=(len(atoms), 3))
        atoms.calc = EMT()
        atoms.get_potential_energy()
        atoms.get_forces()
        if atoms.pbc.all():
            atoms.get_stress()
        frames.append(atoms)
    return frames


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """A folder of a name, filled by the first worker that asks for it, for all of them to read."""
    home = tmp_path_factory.getbasetemp()
    # Tests of one file may go to all workers, which have folders of their own in that of the session.
    home = home.parent if "PYTEST_XDIST_WORKER" in os.environ else home

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = home / name, home / f"{name}.done"
        with FileLock(home / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def store(frames: list[Atoms], made_once: MadeOnce) -> Path:
    """The frames as a packed store."""

    def fill(home: Path) -> None:
        write(home / "emt.extxyz", frames)
        options = ImportOptions(level_of_theory="EMT", licence="CC0-1.0", name="emt", group_by="frame")
        import_files([home / "emt.extxyz"], home / "store", options)

    return made_once("emt", fill) / "store"


@pytest.fixture(scope="session")
def recipe_file(store: Path, made_once: MadeOnce) -> Path:
    """A recipe that trains a tiny model on the store for six steps."""

    def fill(home: Path) -> None:
        (home / "tiny.toml").write_text(RECIPE.format(store=store))

    return made_once("recipe", fill) / "tiny.toml"


@pytest.fixture(scope="session")
def recipe(recipe_file: Path) -> Callable[..., Recipe]:
    """The tiny recipe with changes, as `recipe("zero.stage=2")`."""
    return lambda *changes: load_recipe(recipe_file, changes)


@pytest.fixture(scope="session")
def train(recipe: Callable[..., Recipe]) -> Callable[..., Path]:
    """Trains in this process as a world of one rank: `train(directory, *changes, resume=False)`."""

    def run(out: Path, *changes: str, resume: bool = False, stop: StopRequest | None = None) -> Path:
        work(Job(recipe=recipe(*changes), out=out, resume=resume), stop or StopRequest())
        return out

    return run


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """This process as a world of one rank, for tests that drive the parts themselves."""
    from equipot.train.engine import start_world

    for name, value in rank_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    return start_world()


@pytest.fixture(scope="session")
def equipot() -> Callable[..., subprocess.Popen[str]]:
    """Starts `equipot …` in a process of its own; one thread a rank."""

    def start(*arguments: object, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-m", "equipot.cli", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture(scope="session")
def weights() -> Callable[..., dict[str, torch.Tensor]]:
    """Whole fp32 tensors of a run's newest checkpoint, or of the one after `step` steps."""

    def read(run: Path, kind: str = "weights", step: int | None = None) -> dict[str, torch.Tensor]:
        pattern = "step-*" if step is None else f"step-{step:08d}"
        path = max((run / "checkpoints").glob(pattern))
        return dict(read_weights(path, kind))

    return read
