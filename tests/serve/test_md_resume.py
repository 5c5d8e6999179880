"""`equipot md --resume` against a real server: what was computed is not lost by a wrong word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from tests.serve.conftest import Process, molecule

from equipot.cli.main import main
from equipot.client import Client, ModelReference, MotionFrame, Restart
from equipot.client.dynamics import Begun, Ended, SimulateWords
from equipot.client.open_files import OpenFiles
from equipot.client.recording import Recording
from equipot.wire.v1.codec import Failure, FailureReason

SEED, STEPS = 5, 60
HOW: SimulateWords = {"integrator": "langevin", "timestep": 0.5, "temperature": 100.0, "observe_every": 10}


def stopped(address: str, atoms: Atoms, out: Path, frame_every: int) -> None:
    """What a run leaves that was killed behind its token of step 40."""
    with OpenFiles() as files, Client(address, model="tiny") as client:
        recording, model = Recording([out], files, timestep=0.5, resume=False), ""
        how: SimulateWords = {**HOW, "seed": SEED, "frame_every": frame_every, "token_every": 20}
        telling = client.simulate_iter(atoms, steps=STEPS, **how)
        for _, told in telling:
            model = told.model.pinned if isinstance(told, Begun) else model
            recording.take(0, atoms, told, model, SEED)
            if isinstance(told, Restart) and told.step == 40:
                telling.close()
                return


@pytest.mark.parametrize(("name", "frame_every"), [("out.extxyz", 10), ("out.traj", 10), ("out.extxyz", 0)])
def test_a_wrong_word_costs_nothing(
    server: Process,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    frame_every: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    system = molecule(5, 3)
    write("in.extxyz", Atoms(system.atomic_numbers, system.positions))
    words = ["md", "in.extxyz", "--address", server.address, "--model", "tiny", "--steps", str(STEPS)]
    words += ["--integrator", "langevin", "--timestep", "0.5", "--frame-every", str(frame_every)]
    stopped(server.address, read("in.extxyz"), Path(name), frame_every)
    there = {path.name: path.read_bytes() for path in tmp_path.glob("out.*")}
    assert there.keys() == {name, f"{name}.csv", f"{name}.token"}

    assert main([*words, "--out", name, "--temperature", "101", "--resume"]) == 1
    said = capsys.readouterr().out
    assert "ask with the settings that it was made with" in said
    assert f"can go on from {name}.token" in said
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out.*")} == there

    before = server.sample("equipot_structures_total", outcome="ok")
    assert main([*words, "--out", name, "--temperature", "100", "--resume"]) == 0
    assert server.sample("equipot_structures_total", outcome="ok") - before <= STEPS - 40
    assert not Path(f"{name}.token").exists()
    assert main([*words, "--out", f"whole-{name}", "--temperature", "100", "--seed", str(SEED)]) == 0
    found, expected = read(name, ":"), read(f"whole-{name}", ":")
    assert len(found) == (STEPS // frame_every + 1 if frame_every else 1)
    for here, whole in zip(found, expected, strict=True):
        assert here.info == whole.info
        assert here.info["equipot_seed"] == SEED
        np.testing.assert_array_equal(here.positions, whole.positions)
    assert Path(f"{name}.csv").read_text() == Path(f"whole-{name}.csv").read_text()


@pytest.mark.parametrize("name", ["out.extxyz", "out.traj"])
@pytest.mark.parametrize(
    ("reason", "is_lost"), [("internal", False), ("outside_domain", False), ("unstable", True)]
)
def test_what_failed_goes_on_unless_it_would_fail_again(
    tmp_path: Path, name: str, reason: str, is_lost: bool
) -> None:
    atoms, path = Atoms("CO", [[0.0, 0.0, 0.0], [0.0, 0.0, 1.2]]), tmp_path / name
    model = ModelReference("tiny", "sha256:1", "PBE", "float64", 1)

    def take(recording: Recording, *steps: int) -> None:
        for step in steps:
            frame = MotionFrame(
                step=step, positions=atoms.positions + step, velocities=0 * atoms.positions,
                cell=atoms.cell[:], energy=1.0 * step, kinetic_energy=0.0, temperature=0.0,
                forces=None, stress=None,
            )  # fmt: skip
            recording.take(0, atoms, frame, model.pinned, SEED)

    def fail(recording: Recording, steps: int, why: FailureReason, field: str, *, there: bool) -> None:
        failure = Failure(0, why, field, "no further", "try again")
        at = (atoms.positions, atoms.cell[:]) if there else (None, None)
        ended = Ended(steps=steps, failure=failure, model=model, seed=SEED, positions=at[0], cell=at[1])
        recording.take(0, atoms, ended, model.pinned, SEED)

    def steps() -> list[int]:
        return [frame.info["equipot_step"] for frame in read(path, ":")]

    with OpenFiles() as files:
        first = Recording([path], files, timestep=1.0, resume=False)
        take(first, 0, 1, 2)
        first.take(0, atoms, Restart(2, b"state"), model.pinned, SEED)
        fail(first, 3, FailureReason(reason), "positions", there=True)
        assert bool(list(first.to_go_on())) is not is_lost
    assert steps() == [0, 1, 2, 4]
    with OpenFiles() as files:
        again = Recording([path], files, timestep=1.0, resume=True)
        way = again.trajectory(0)
        if is_lost:
            assert (way.restart, way.failure != "", 0 in again.failed) == (b"", True, True)
            return
        assert (way.restart, way.failure, way.reached, way.seed) == (b"state", "", 2, SEED)
        fail(again, 0, FailureReason.INVALID_STRUCTURE, "tokens", there=False)
    assert steps() == [0, 1, 2, 4]
    assert "no further" in read(path, -1).info["equipot_failure"]
    with OpenFiles() as files:
        once_more = Recording([path], files, timestep=1.0, resume=True)
        take(once_more, 3, 4)
        once_more.take(0, atoms, Ended(steps=4, failure=None, model=model, seed=SEED), model.pinned, SEED)
    assert steps() == [0, 1, 2, 3, 4]
    assert read(path, -1).get_potential_energy() == 4.0
    assert sorted(tmp_path.iterdir()) == [path]
