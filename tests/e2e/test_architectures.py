"""What another architecture than the default has learnt is what a client is answered."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read
from tests.e2e.conftest import DATA, RECIPE, succeed

from equipot.client import Client
from equipot.model.batch import System, build_graphs, collate
from equipot.model.bundle import load_potential


@pytest.mark.slow
@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_moments_are_trained_exported_and_served(forces: str, tmp_path: Path) -> None:
    level = ("--level-of-theory", "PBE/def2-SVP", "--licence", "MIT", "--group-by", "block:10")
    succeed("data", "import", DATA, "--out", tmp_path / "store", *level, cwd=tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(store=tmp_path / "store"))
    changes = ["model.architecture=moments", f"model.forces={forces}", "optimizer.steps=20"]
    words = [word for change in changes for word in ("--set", change)]
    succeed("train", "recipe.toml", "--ranks", 2, "--out", "run", *words, cwd=tmp_path)
    succeed("export", "run", "--out", "bundle", "--name", "moments", cwd=tmp_path)
    frames = read(DATA, ":5")
    potential = load_potential(tmp_path / "bundle")[0].double()
    systems = [System(f.numbers, f.positions, f.cell.array, f.pbc) for f in frames]
    expected = potential(
        collate(build_graphs(systems, potential.config.cutoff), dtype=torch.float64), forces=True
    )
    command = [sys.executable, "-m", "equipot.cli", "serve", str(tmp_path / "bundle"), "--port", "0"]
    with (tmp_path / "log").open("w") as stderr:
        server = subprocess.Popen(
            [*command, "--no-metrics", "--dtype", "float64"], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert server.stdout is not None
    try:
        line = next((line for line in server.stdout if line.startswith("serving ")), None)
        assert line is not None, (tmp_path / "log").read_text()
        with Client(line.split(" on ")[1].split()[0]) as client:
            served = client.predict(frames)
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0
    assert not served.failures
    np.testing.assert_allclose(served.energy, expected.energy.numpy(), rtol=1e-12)
    assert served.forces is not None
    assert abs(served.forces).max() > 0.01
    np.testing.assert_allclose(served.forces, expected.forces.numpy(), atol=1e-8)
