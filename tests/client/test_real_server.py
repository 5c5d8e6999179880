"""The client against `equipot serve` itself: a tiny bundle, a process of its own, a real port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.optimize import BFGS

from equipot.client import (
    AsyncClient,
    Client,
    EquipotCalculator,
    FailureReason,
    Health,
    InvalidRequest,
    ModelChanged,
    ModelNotFound,
    RetryPolicy,
)
from equipot.model.bundle import load_potential, write_bundle
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References

ELEMENTS = (1, 6, 8, 14)


def write_tiny_bundle(path: Path, *, seed: int) -> Path:
    import torch

    config = ModelConfig(
        elements=ELEMENTS, levels_of_theory=("PBE",), width=16, layers=2, radial=6, mean_neighbors=8.0
    )
    references = References(energy=-10.0 * np.arange(1.0, 5.0)[None], scale=np.ones(1))
    torch.manual_seed(seed)
    weights = Potential(config, references).state_dict()
    write_bundle(
        path,
        name="tiny",
        config=config,
        references=references,
        tensors=weights.items(),
        provenance={},
        metrics={},
        dtype=torch.float64,
    )
    return path


@dataclass
class Served:
    """`equipot serve` in a process of its own; it may be stopped, killed and started again on its port."""

    log: Path
    port: int = 0
    process: subprocess.Popen[str] | None = field(default=None)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, bundle: Path) -> None:
        words = ["serve", str(bundle), "--port", str(self.port), "--no-metrics", "--max-atoms", "300"]
        with self.log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "equipot.cli", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith("serving ")), None)
        assert line is not None, self.log.read_text()
        self.port = int(line.split(" on ")[1].split()[0].rpartition(":")[2])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.communicate(timeout=60)
            self.process = None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", seed=1)


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served") / "log")
    served.start(bundle)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    frames = [molecule(name) for name in ("H2O", "CH4", "CH3CH2OH", "C6H6", "SiH4")] * 4
    frames += [bulk("Si", cubic=True), bulk("SiC", "zincblende", a=4.36)]
    for seed, frame in enumerate(frames):
        frame.rattle(0.05, seed=seed)
    return frames


def test_answers_are_the_bundles_own(served: Served, bundle: Path, frames: list[Atoms]) -> None:
    import torch

    from equipot.model.batch import System, build_graph, collate

    potential, card = load_potential(bundle, dtype=torch.float64)
    systems = [
        System(frame.numbers.astype(np.int64), frame.positions, frame.cell.array, frame.pbc)
        for frame in frames
    ]
    graphs = [build_graph(system, card.config.cutoff) for system in systems]
    local = potential(collate(graphs, dtype=torch.float64), stress=True)
    with Client(served.address, atoms_per_request=30) as client:
        answer = client.predict(frames, stress=True)
    assert not answer.failures
    assert answer.model is not None
    assert answer.model.digest == card.digest
    np.testing.assert_allclose(answer.energy, local.energy.detach(), rtol=1e-12)
    assert answer.forces is not None
    np.testing.assert_allclose(answer.forces, local.forces.detach(), atol=1e-10)
    assert answer.stress is not None
    np.testing.assert_allclose(answer.stress, local.stress.detach(), atol=1e-12)
    assert np.isnan(answer.stress[:-2]).all()


def test_each_bad_structure_has_its_failure(served: Served, frames: list[Atoms]) -> None:
    overlapping, unknown, flat, charged = (frames[0].copy() for _ in range(4))
    overlapping.positions[1] = overlapping.positions[0]
    unknown.numbers[2] = 92
    flat.set_cell([[1, 0, 0], [2, 0, 0], [0, 0, 1]])
    flat.pbc = True
    charged.info["charge"] = 2
    large = Atoms("H301", 2.0 * np.arange(301)[:, None] * np.array([[1.0, 0, 0]]))
    with Client(served.address) as client:
        answer = client.predict([frames[0], overlapping, unknown, flat, charged, large, Atoms(), frames[0]])
    found = [(failure.index, failure.reason, failure.field) for failure in answer.failures]
    assert found == [
        (1, FailureReason.INVALID_STRUCTURE, "positions"),
        (2, FailureReason.UNSUPPORTED, "atomic_numbers"),
        (3, FailureReason.INVALID_STRUCTURE, "cell"),
        (4, FailureReason.UNSUPPORTED, "charge"),
        (5, FailureReason.TOO_LARGE, "n_atoms"),
        (6, FailureReason.INVALID_STRUCTURE, "atomic_numbers"),
    ]
    assert all(failure.message and failure.remedy for failure in answer.failures)
    assert answer.energy[0] == pytest.approx(answer.energy[7], rel=1e-12)


def test_what_is_asked_wrongly_is_said(served: Served, frames: list[Atoms]) -> None:
    with Client(served.address) as client:
        with pytest.raises(ModelNotFound, match="other"):
            client.predict(frames, model="other")
        with pytest.raises((ModelNotFound, InvalidRequest), match="B3LYP"):
            client.predict(frames, level_of_theory="B3LYP")
        (info,) = client.models()
        assert client.health() is Health.SERVING
        assert client.model(f"tiny@{info.digest}").card["name"] == "tiny"
    assert (info.name, info.elements, info.levels_of_theory) == ("tiny", ELEMENTS, ("PBE",))
    assert info.limits.max_atoms_per_structure == 300


def test_async_client_agrees(served: Served, frames: list[Atoms]) -> None:
    import asyncio

    async def run() -> Any:
        async with AsyncClient(served.address, atoms_per_request=30) as client:
            return await client.predict(frames), await client.health()

    with Client(served.address) as client:
        expected = client.predict(frames)
    answer, health = asyncio.run(run())
    assert health is Health.SERVING
    np.testing.assert_allclose(answer.energy, expected.energy, rtol=1e-12)
    assert expected.forces is not None
    np.testing.assert_allclose(answer.forces, expected.forces, atol=1e-10)


def test_forces_are_the_gradient_of_the_served_energy(served: Served, frames: list[Atoms]) -> None:
    atoms, step = frames[2].copy(), 1e-4
    with EquipotCalculator(served.address) as calculator:
        atoms.calc = calculator
        forces = atoms.get_forces()
        for atom, axis in ((0, 0), (4, 2)):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.calc = calculator
                moved.positions[atom, axis] += sign * step
                energies.append(moved.get_potential_energy())
            assert forces[atom, axis] == pytest.approx((energies[1] - energies[0]) / (2 * step), abs=1e-6)


def test_predict_command(
    served: Served,
    frames: list[Atoms],
    tmp_path: Path,
    run_equipot: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ase.io import read, write

    source, out = tmp_path / "frames.traj", tmp_path / "out.extxyz"
    write(source, [*frames, Atoms("U")])
    done = run_equipot("predict", source, "--address", served.address, "--out", out, "--stress")
    assert done.returncode == 1, done.stderr
    back = read(out, ":")
    assert len(back) == len(frames) + 1
    assert back[-1].calc is None
    assert "stress" in back[-2].calc.results
    assert "equipot_failure" in back[-1].info
    monkeypatch.setenv("COLUMNS", "160")
    done = run_equipot("models", "--address", served.address)
    assert done.returncode == 0
    assert "tiny (default)" in done.stdout


def test_a_killed_server_is_waited_for_and_another_bundle_noticed(
    served: Served, frames: list[Atoms], tmp_path: Path
) -> None:
    other = write_tiny_bundle(tmp_path / "other", seed=2)
    patient = RetryPolicy(attempts=200, max_delay=0.5)
    atoms = frames[2].copy()
    with Client(served.address, retry=patient) as client, EquipotCalculator(client) as calculator:
        atoms.calc = calculator
        BFGS(atoms, logfile=None).run(steps=3)
        served.stop(signal.SIGKILL)
        restart = threading.Thread(target=served.start, args=(other,))
        restart.start()
        answer = client.predict(frames)
        restart.join()
        assert not answer.failures
        atoms.positions += 1.0
        with pytest.raises(ModelChanged, match="no longer serves tiny@sha256"):
            atoms.get_forces()
        assert calculator.results == {}
