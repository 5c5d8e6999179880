"""The verb `equipot md`: trajectories in files, whole whatever stops them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.io import read, write

from equipot.client import MotionFrame, Observation
from equipot.client.observation_file import ObservationFile, summary_of
from equipot.client.open_files import OpenFiles
from equipot.client.recording import Recording
from equipot.client.trajectory_file import TrajectoryFile

Run = Callable[..., Any]


@pytest.fixture
def words(server: Any, cluster: Any, tmp_path: Path) -> list[Any]:
    write(tmp_path / "in.extxyz", cluster(3))
    return ["md", tmp_path / "in.extxyz", "--address", server.address, "--steps", 300, "--frame-every", 20]


def test_writes_the_trajectory(server: Any, cluster: Any, words: list[Any], run_equipot: Run) -> None:
    done = run_equipot(*words, "--integrator", "langevin", "--temperature", 300, "--seed", 5)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 moved for 300 steps" in done.stdout
    assert "it flies" in done.stderr
    frames = read("in-md.extxyz", ":")
    assert [frame.info["equipot_step"] for frame in frames] == list(range(0, 301, 20))
    np.testing.assert_allclose(frames[-1].positions[:, 0] - cluster(3).positions[:, 0], 3.0, atol=1e-6)
    np.testing.assert_allclose(frames[-1].get_velocities() * units.fs, 1.0, rtol=1e-6)
    assert frames[-1].get_potential_energy() == -300.0
    assert frames[-1].info["equipot_model"] == server.pinned
    assert list(server.simulated[-1].seeds) == [5]
    assert not Path("in-md.extxyz.token").exists()


def test_what_was_killed_at_its_very_end_is_ended_by_going_on(
    server: Any, words: list[Any], tmp_path: Path, run_equipot: Run
) -> None:
    assert run_equipot(*words).returncode == 0
    token = Path("in-md.extxyz.token")
    token.write_bytes(b"equipot restart 300\n300")
    assert run_equipot(*words, "--resume").returncode == 0
    assert not token.exists()
    assert len(server.simulated) == 1


def test_observations_outlive_a_disk_that_is_full_when_they_are_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with OpenFiles() as files:
        table = ObservationFile(path, files, timestep=2.0, resume=False)
        for step in range(50):
            table.write(
                Observation(
                    step=step, energy=1.0, kinetic_energy=1.0, temperature=300.0, volume=0.0,
                    pressure=np.nan, largest_force=0.1,
                )
            )  # fmt: skip
    whole = path.read_bytes()
    path.write_bytes(whole + b"50,1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, hard))
    try:
        assert ObservationFile(path, OpenFiles(), timestep=2.0, resume=True).reached == 49
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["out.extxyz", "out.traj"])
def test_goes_on_where_it_was(
    server: Any, words: list[Any], tmp_path: Path, run_equipot: Run, name: str
) -> None:
    out = tmp_path / name
    whole = run_equipot(*words, "--out", out)
    assert whole.returncode == 0, whole.stderr
    expected = read(out, ":")
    out.unlink()
    # The server is lost for good behind the frame of step 240; the last token is that of 200.
    server.interruptions = [240]
    server.fatal = True
    stopped = run_equipot(*words, "--out", out, "--timeout", 2)
    assert stopped.returncode == 2
    assert len(read(out, ":")) == 13
    assert run_equipot(*words, "--out", out).returncode == 2
    if name.endswith("extxyz"):
        with out.open("a") as torn:
            torn.write("3\nLattice=")
    again = run_equipot(*words, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert list(server.simulated[-1].tokens) == [b"200"]
    found = read(out, ":")
    assert [frame.info["equipot_step"] for frame in found] == list(range(0, 301, 20))
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_array_equal(here.positions, there.positions)
    # Nothing is left to do.
    count = len(server.simulated)
    assert run_equipot(*words, "--out", out, "--resume").returncode == 0
    assert len(server.simulated) == count


def test_of_several_frames_each_has_its_file(
    server: Any, cluster: Any, tmp_path: Path, run_equipot: Run
) -> None:
    write(tmp_path / "in.extxyz", [cluster(2), Atoms("He", [[0, 0, 0]]), cluster(4)])
    words = ["--address", server.address, "--steps", 10, "--out", tmp_path / "out.extxyz"]
    done = run_equipot("md", tmp_path / "in.extxyz", *words)
    assert done.returncode == 1
    assert "structure 1: helium flew off" in done.stdout
    assert "2 of 3 moved" in done.stdout
    assert [len(read(tmp_path / f"out-{place}.extxyz")) for place in range(3)] == [2, 1, 4]


def test_words_that_are_none(server: Any, words: list[Any], tmp_path: Path, run_equipot: Run) -> None:
    bad = run_equipot(*words, "--timestep", -1)
    assert bad.returncode == 2
    assert "timestep is -1.0" in bad.stderr
    same = run_equipot(*words, "--out", tmp_path / "in.extxyz")
    assert same.returncode == 2
    assert "input itself" in same.stderr
    assert "Traceback" not in bad.stderr + same.stderr


def test_a_token_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text("")
    (tmp_path / "a.extxyz.token").write_text("something else")
    with pytest.raises(Exception, match="is no restart token"):
        TrajectoryFile(tmp_path / "a.extxyz", OpenFiles(), resume=True)


def test_a_run_that_was_stopped_before_its_first_token_goes_on_by_its_seed(
    server: Any, words: list[Any], tmp_path: Path, run_equipot: Run
) -> None:
    out = tmp_path / "out.extxyz"
    server.interruptions = [60]
    server.fatal = True
    assert run_equipot(*words, "--out", out, "--timeout", 2).returncode == 2
    assert not Path(f"{out}.token").exists()
    table = Path(f"{out}.csv")
    with table.open("a") as torn:
        torn.write("61,30")
    again = run_equipot(*words, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    first, last = server.simulated[0], server.simulated[-1]
    assert list(last.seeds) == list(first.seeds)
    assert [frame.info["equipot_step"] for frame in read(out, ":")] == list(range(0, 301, 20))
    rows = np.genfromtxt(table, delimiter=",", names=True)
    assert list(rows["step"]) == list(range(0, 301, 10))
    np.testing.assert_allclose(rows["time_fs"], rows["step"])
    np.testing.assert_allclose(rows["total_energy_eV"], rows["energy_eV"] + rows["kinetic_energy_eV"])
    assert "temperature 300.0 ± 0.0 K" in again.stdout
    assert "(31 observations)" in again.stdout
    assert f"observations: {table}" in again.stdout


def test_drift_and_fluctuation_are_those_of_a_line(tmp_path: Path) -> None:
    wave = np.resize([0.001, -0.001], 1000)
    with OpenFiles() as files:
        table = ObservationFile(tmp_path / "a.csv", files, timestep=2.0, resume=False)
        for step in range(1000):
            table.write(
                Observation(
                    step=step,
                    energy=-1.0 + 0.03 * 2e-3 * step + wave[step],
                    kinetic_energy=1.0,
                    temperature=300.0 + 10 * np.sign(wave[step]),
                    volume=0.0,
                    pressure=np.nan,
                    largest_force=0.1,
                )
            )
    assert "nan" not in table.path.read_text()
    found = summary_of(table.path)
    assert found is not None
    assert found.drift == pytest.approx(0.03, rel=1e-3)
    assert found.fluctuation == pytest.approx(0.001, rel=1e-3)
    assert (found.temperature, found.temperature_spread) == pytest.approx((300.0, 10.0))
    assert found.words(10).startswith("temperature 300.0 ± 10.0 K, total energy drifts by +3 meV/atom/ps")
    assert "pressure" not in found.words(10)


@pytest.mark.parametrize("suffix", ["extxyz", "traj"])
def test_of_many_trajectories_a_few_are_open(cluster: Any, tmp_path: Path, suffix: str) -> None:
    count, most = 12, 3
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names are not wanted
    with OpenFiles(most) as files:
        recording = Recording(
            [tmp_path / f"{place}.{suffix}" for place in range(count)], files, timestep=1.0, resume=False
        )
        for step in range(4):
            for place in range(count):
                frame = cluster(2 + place)
                moved = MotionFrame(
                    step=step,
                    positions=frame.positions + step,
                    velocities=0 * frame.positions,
                    cell=frame.cell[:],
                    energy=1.0 * place,
                    kinetic_energy=0.0,
                    temperature=0.0,
                    forces=None,
                    stress=None,
                )
                recording.take(place, frame, moved, "model@sha256:1", 7)
                assert len(os.listdir("/proc/self/fd")) <= before + most + 1  # noqa: PTH208
    for place in range(count):
        found = read(tmp_path / f"{place}.{suffix}", ":")
        assert [frame.info["equipot_step"] for frame in found] == [0, 1, 2, 3]
        assert {frame.get_potential_energy() for frame in found} == {1.0 * place}
        again = TrajectoryFile(tmp_path / f"{place}.{suffix}", OpenFiles(), resume=True)
        assert (again.reached, again.seed, again.model) == (3, 7, "model@sha256:1")
