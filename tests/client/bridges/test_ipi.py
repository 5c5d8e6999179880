"""i-PI itself moves atoms with a server's forces."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from tests.client.bridges.conftest import ROOT, Place

from equipot.client import EquipotCalculator, ServerUnavailable
from equipot.client.bridges.ipi import answer_ipi

EXAMPLE = ROOT / "examples" / "ipi_client.py"

INPUT = """<simulation verbosity="low">
  <output prefix="run">
    <properties stride="1" filename="out">
      [ step, conserved{{electronvolt}}, potential{{electronvolt}} ]
    </properties>
  </output>
  <total_steps> 20 </total_steps>
  <ffsocket name="equipot" mode="unix"> <address> {socket} </address> </ffsocket>
  <system>
    <initialize nbeads="2">
      <file mode="ase"> {structure} </file>
      <velocities mode="thermal" units="kelvin"> 20 </velocities>
    </initialize>
    <forces> <force forcefield="equipot"/> </forces>
    <motion mode="dynamics">
      <dynamics mode="nve"> <timestep units="femtosecond"> 0.5 </timestep> </dynamics>
    </motion>
    <ensemble> <temperature units="kelvin"> 20 </temperature> </ensemble>
  </system>
</simulation>
"""


@pytest.mark.slow
def test_two_beads(place_with: Callable[..., Place], server: Any, cluster: Any, tmp_path: Path) -> None:
    ipi = place_with("ipi==3.3.1")
    atoms: Atoms = cluster(4)
    atoms.set_cell([20.0] * 3)
    write(tmp_path / "start.extxyz", atoms)
    name = f"equipot-{uuid.uuid4().hex[:8]}"
    (tmp_path / "input.xml").write_text(INPUT.format(socket=name, structure="start.extxyz"))
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [ipi.bin / "i-pi", "input.xml"], cwd=tmp_path, env=ipi.environment, stdout=log, stderr=log
        )
        try:
            socket = Path("/tmp") / f"ipi_{name}"
            end = time.monotonic() + 120
            while not socket.exists() and running.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            ran = ipi.run(EXAMPLE, server.address, tmp_path / "start.extxyz", "--unix", name)
            assert ran.returncode == 0, ran.stderr + (tmp_path / "log").read_text()
            running.wait(timeout=60)
        finally:
            running.kill()
            running.wait()
    rows = np.loadtxt(tmp_path / "run.out")
    assert len(rows) == 21
    assert "answered 42 steps" in ran.stdout
    with EquipotCalculator(server.address) as calculator:
        # Beads start where the atoms are.
        assert rows[0, 2] == pytest.approx(calculator.get_potential_energy(atoms), rel=1e-5)
    assert np.ptp(rows[:, 1]) < 0.05 * max(np.ptp(rows[:, 2]), 1e-4)


def test_an_ipi_that_is_not_there(server: Any, cluster: Any) -> None:
    with (
        EquipotCalculator(server.address) as calculator,
        pytest.raises(ServerUnavailable, match="cannot reach i-PI at the socket nobody"),
    ):
        answer_ipi(cluster(3), calculator, unix_socket="nobody")
