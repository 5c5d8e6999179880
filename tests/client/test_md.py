"""The verb `equipot md`: trajectories in files, whole whatever stops them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.io import read, write

from equipot.client.open_files import OpenFiles
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
