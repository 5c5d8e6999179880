"""What the main job promises from its first file to its last: data in, forces out over the network."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.io import read

from equipot.client import Client, EquipotCalculator
from equipot.model.batch import System, build_graph, collate
from equipot.model.bundle import load_potential


def test_the_served_answers_are_the_bundles_own(main_job: Any, address: str) -> None:
    frames = read(main_job.test_frames, ":")[:40]
    potential, card = load_potential(main_job.bundle, dtype=torch.float64)
    systems = [
        System(
            atomic_numbers=frame.numbers.astype(np.int64), positions=frame.positions, cell=np.zeros((3, 3)),
            pbc=np.zeros(3, dtype=bool),
        )
        for frame in frames
    ]  # fmt: skip
    graphs = [build_graph(system, card.config.cutoff) for system in systems]
    local = potential(collate(graphs, dtype=torch.float64))
    with Client(address) as client:
        served = client.predict(frames)
    assert not served.failures
    np.testing.assert_allclose(served.energy, local.energy.numpy(), rtol=1e-12)
    assert served.forces is not None
    np.testing.assert_allclose(served.forces, local.forces.numpy(), atol=1e-10)


def test_training_beat_the_trivial_model_and_the_card_says_by_how_much(main_job: Any, address: str) -> None:
    frames = read(main_job.test_frames, ":")
    labelled = np.concatenate([frame.get_forces() for frame in frames])
    with Client(address) as client:
        served = client.predict(frames)
        card = json.loads(client.model().card_json)
    assert served.forces is not None
    error = float(np.abs(served.forces - labelled).mean())
    assert error < 0.8 * float(np.abs(labelled).mean())
    assert "PBE/def2-SVP" in card["config"]["levels_of_theory"]
    assert np.isclose(error, card["metrics"]["test"]["forces_mae_ev_per_angstrom"], rtol=1e-3)


def test_no_test_frame_was_trained_on(main_job: Any) -> None:
    names = ("train", "validation", "test")
    parts = [set(np.load(main_job.run / "mix" / f"{name}.npy").tolist()) for name in names]
    assert all(parts)
    assert parts[0] & parts[1] == parts[0] & parts[2] == parts[1] & parts[2] == set()


def test_calculator_and_batch_agree(main_job: Any, address: str) -> None:
    atoms = read(main_job.test_frames, "0")
    with Client(address) as client:
        batch = client.predict(read(main_job.test_frames, ":8"))
    with EquipotCalculator(address) as calculator:
        atoms.calc = calculator
        assert np.isclose(atoms.get_potential_energy(), batch.energy[0], rtol=1e-12)
        assert batch.forces is not None
        np.testing.assert_allclose(atoms.get_forces(), batch.forces[: len(atoms)], atol=1e-10)


def test_predict_writes_every_frame_in_order(
    main_job: Any, address: str, tmp_path: Path, run_equipot: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "predicted.extxyz"
    done = run_equipot("predict", main_job.test_frames, "--address", address, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = read(main_job.test_frames, ":"), read(out, ":")
    assert [frame.get_chemical_formula() for frame in after] == [
        frame.get_chemical_formula() for frame in before
    ]
    np.testing.assert_allclose(after[3].positions, before[3].positions, atol=1e-6)
    assert np.isfinite(after[3].get_potential_energy())
    assert str(out) in done.stdout.replace("\n", "")


def test_a_client_without_torch_gets_the_same_answer(
    main_job: Any, address: str, client_python: Path, tmp_path: Path
) -> None:
    atoms = read(main_job.test_frames, "0")
    code = (
        "import json, sys, numpy as np\n"
        "from equipot.client import Client, Structure\n"
        "assert 'torch' not in sys.modules\n"
        f"structure = Structure(atomic_numbers=np.array({atoms.numbers.tolist()}),"
        f" positions=np.array({atoms.positions.tolist()}))\n"
        f"print(json.dumps(Client('{address}').predict(structure)[0].forces.tolist()))\n"
    )
    ran = subprocess.run(
        [client_python, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    with Client(address) as client:
        served = client.predict(atoms)
    assert served.forces is not None
    np.testing.assert_allclose(json.loads(ran.stdout), served.forces, atol=1e-12)
