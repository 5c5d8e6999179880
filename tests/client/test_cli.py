"""`equipot predict` and `equipot models` as their users run them."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

Run = Callable[..., Any]


def unwrapped(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def trajectory(cluster: Callable[..., Atoms], tmp_path: Path) -> Path:
    path = tmp_path / "clusters.extxyz"
    write(path, [cluster(2 + i % 5, seed=i) for i in range(50)])
    return path


def test_every_frame_is_predicted_in_order(
    server: Any, trajectory: Path, tmp_path: Path, run_equipot: Run, make_local: Callable[[], Any]
) -> None:
    out = tmp_path / "results.extxyz"
    done = run_equipot("predict", trajectory, "--address", server.address, "--out", out)
    assert done.returncode == 0, done.stderr
    frames = read(out, ":")
    assert len(frames) == 50
    for before, after in zip(read(trajectory, ":"), frames, strict=True):
        local = before.copy()
        local.calc = make_local()
        np.testing.assert_array_equal(after.positions, before.positions)
        assert after.get_potential_energy() == pytest.approx(local.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(after.get_forces(), local.get_forces(), atol=1e-7)
        assert after.info["equipot_model"] == server.pinned
        assert after.info["equipot_level_of_theory"] == "LJ"
    assert f"results: {out}" in done.stdout
    assert "50 of 50 frames predicted" in done.stdout
    assert server.pinned in unwrapped(done.stdout)
    assert "MAE" not in done.stdout
    shown = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    assert shown == [*map(str, range(10)), "…", *map(str, range(40, 50))]
    assert not list(tmp_path.glob("*.partial"))
    assert {seen.model for seen in server.seen} == {server.pinned}


def test_frames_that_fail_keep_their_place_and_say_why(
    server: Any, cluster: Callable[..., Atoms], tmp_path: Path, run_equipot: Run
) -> None:
    frames = [cluster(3, seed=i) for i in range(60)]
    for i in range(1, 60, 2):
        frames[i].numbers[0] = 2
        frames[i].info["name"] = f"heliated {i}"
    frames[4] = Atoms()
    path, out = tmp_path / "mixed.extxyz", tmp_path / "out.extxyz"
    write(path, frames)
    done = run_equipot("predict", path, "--address", server.address, "--out", out)
    assert done.returncode == 1
    back = read(out, ":")
    assert [frame.calc is None for frame in back] == [bool(i % 2) or i == 4 for i in range(60)]
    assert back[3].info["name"] == "heliated 3"
    assert back[3].info["equipot_failure"] == (
        "structure 3: atomic_numbers: helium (2) is unknown; leave it out"
    )
    assert "there are no atoms" in back[4].info["equipot_failure"]
    assert "29 of 60 frames predicted" in done.stdout
    assert done.stdout.count("helium (2)") == 19
    assert "… and 11 more: see equipot_failure in" in done.stdout


def test_labels_of_the_file_are_compared_with_and_kept(
    server: Any,
    cluster: Callable[..., Atoms],
    tmp_path: Path,
    run_equipot: Run,
    make_local: Callable[[], Any],
) -> None:
    frames = [cluster(4, seed=i) for i in range(6)]
    for i, frame in enumerate(frames):
        local = frame.copy()
        local.calc = make_local()
        labels = {"energy": local.get_potential_energy() + 0.1, "forces": local.get_forces() + 0.2}
        if i < 3:
            frame.calc = SinglePointCalculator(frame, **labels)
        elif i < 5:
            frame.info["REF_energy"], frame.arrays["REF_forces"] = labels["energy"], labels["forces"]
    path, out = tmp_path / "labelled.extxyz", tmp_path / "out.extxyz"
    write(path, frames)
    for source in (path, out):
        done = run_equipot("predict", source, "--address", server.address, "--out", tmp_path / "again.extxyz")
        assert done.returncode == 0, done.stderr
        assert "energy MAE against the file's own: 25.00 meV/atom" in done.stdout
        assert "force MAE against the file's own: 0.2000 eV/Å" in done.stdout
        (tmp_path / "again.extxyz").replace(out)
        first = read(out, "0")
        assert first.info["reference_energy"] == pytest.approx(first.get_potential_energy() + 0.1)
        np.testing.assert_allclose(first.arrays["reference_forces"], first.get_forces() + 0.2, atol=1e-7)


@pytest.mark.parametrize(
    ("option", "expected"), [((), True), (("--stress",), True), (("--no-stress",), False)]
)
def test_crystals_get_their_stress(
    server: Any,
    crystal: Atoms,
    cluster: Callable[..., Atoms],
    tmp_path: Path,
    run_equipot: Run,
    make_local: Callable[[], Any],
    option: list[str],
    expected: bool,
) -> None:
    path = tmp_path / "both.traj"
    write(path, [crystal, cluster(3)])
    done = run_equipot("predict", path, "--address", server.address, *option)
    assert done.returncode == 0, done.stderr
    solid, gas = read(tmp_path / "both-predicted.extxyz", ":")
    assert ("stress" in solid.calc.results) is expected
    assert "stress" not in gas.calc.results
    if expected:
        crystal.calc = make_local()
        np.testing.assert_allclose(solid.get_stress(), crystal.get_stress(), atol=1e-7)


def test_molecules_are_not_asked_for_stress(
    server: Any, trajectory: Path, tmp_path: Path, run_equipot: Run
) -> None:
    assert run_equipot("predict", trajectory, "--address", server.address).returncode == 0
    assert {tuple(seen.properties) for seen in server.seen} == {(1, 2)}


def test_stress_of_a_model_without_it_is_refused(server: Any, trajectory: Path, run_equipot: Run) -> None:
    server.has_stress = False
    done = run_equipot("predict", trajectory, "--address", server.address, "--stress")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the model lennard-jones has no stress: leave --stress out\n"


BROKEN = {
    "nothing.extxyz": (None, "cannot read"),
    "empty.extxyz": (b"", "Empty file"),
    "text.extxyz": (b"Dear reader,\nthis is a letter.\n", "cannot read"),
    "noise.xyz": (bytes(range(256)) * 4, "cannot read"),
    "noise.unknown": (bytes(range(256)) * 4, "cannot read"),
    "picture.traj": (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_structures_is_refused_in_one_line(
    server: Any, tmp_path: Path, run_equipot: Run, name: str
) -> None:
    content, says = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run_equipot("predict", name, "--address", server.address)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert says in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_a_file_that_breaks_in_the_middle_keeps_what_was_done(
    server: Any, trajectory: Path, tmp_path: Path, run_equipot: Run
) -> None:
    lines = trajectory.read_text().splitlines()
    lines[-1] = lines[-1].replace("Ar", "Ar    not-a-number")
    trajectory.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.extxyz"
    done = run_equipot("predict", trajectory, "--address", server.address, "--out", out)
    assert done.returncode == 2
    assert not out.exists()
    assert len(read(tmp_path / "out.extxyz.partial", ":", format="extxyz")) == 49
    kept, error = done.stderr.splitlines()
    assert kept == f"the 49 frames done before are in {out}.partial"
    assert error.startswith(f"error: cannot read {trajectory} after frame 48: ")


def test_ctrl_c_keeps_what_was_done(server: Any, cluster: Callable[..., Atoms], tmp_path: Path) -> None:
    server.delay = 1.0
    path, out = tmp_path / "long.extxyz", tmp_path / "out.extxyz"
    write(path, [cluster(200, seed=i) for i in range(300)])
    words = ["predict", str(path), "--address", server.address, "--out", str(out)]
    running = subprocess.Popen(
        [sys.executable, "-m", "equipot.cli", *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while len(server.seen) < 7:
        time.sleep(0.05)
        assert running.poll() is None
    os.kill(running.pid, signal.SIGINT)
    errors = running.communicate(timeout=20)[1]
    assert running.returncode == 130
    assert "Traceback" not in errors
    kept = read(tmp_path / "out.extxyz.partial", ":", format="extxyz")
    assert 0 < len(kept) < 300
    assert f"the {len(kept)} frames done before are in" in errors
    assert all(np.isfinite(frame.get_potential_energy()) for frame in kept)
    assert not out.exists()


def test_no_server_is_one_line(
    trajectory: Path, unused_address: str, run_equipot: Run, tmp_path: Path
) -> None:
    for words in (("predict", trajectory), ("models",)):
        began = time.monotonic()
        done = run_equipot(*words, "--address", unused_address)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: cannot reach {unused_address}: is 'equipot serve' running?")
        assert done.stderr.count("\n") == 1
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "other"), "no model 'other'"),
        (("--address", "localhost"), "is not HOST:PORT"),
        (("--out", "no/such/folder/out.extxyz"), "cannot write no/such/folder/out.extxyz.partial: No such"),
        (("--out", "clusters.extxyz"), "is the input itself"),
    ],
)
def test_a_wrong_option_is_one_line(
    server: Any, trajectory: Path, tmp_path: Path, run_equipot: Run, options: tuple[str, str], says: str
) -> None:
    before = trajectory.read_bytes()
    done = run_equipot("predict", trajectory, "--address", server.address, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert trajectory.read_bytes() == before


def test_an_earlier_result_survives_a_run_that_fails(
    server: Any, trajectory: Path, tmp_path: Path, run_equipot: Run
) -> None:
    out = tmp_path / "out.extxyz"
    out.write_text("the good result of yesterday")
    server.tamper = lambda response: response.ClearField("energy")
    done = run_equipot("predict", trajectory, "--address", server.address, "--out", out)
    assert done.returncode == 2
    assert "does not fit the request" in done.stderr
    assert out.read_text() == "the good result of yesterday"
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_whole_frames(
    server: Any, trajectory: Path, tmp_path: Path, run_equipot: Run
) -> None:
    out = tmp_path / "out.extxyz"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        done = run_equipot("predict", trajectory, "--address", server.address, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (done.returncode, done.stdout) == (2, "")
    kept, error = done.stderr.splitlines()
    n_kept = len(read(tmp_path / "out.extxyz.partial", ":", format="extxyz"))
    assert 0 < n_kept < 50
    assert kept == f"the {n_kept} frames done before are in {out}.partial"
    assert error == f"error: cannot write {out}.partial: File too large"
    assert not out.exists()


def test_models_are_listed(server: Any, run_equipot: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = run_equipot("models", "--address", server.address)
    assert done.returncode == 0, done.stderr
    for word in ("lennard-jones (default)", "LJ", "H C Ar", "conservative, stress", server.digest[:19]):
        assert word in done.stdout


def test_explain_says_what_it_would_cost_and_writes_nothing(
    server: Any, trajectory: Path, tmp_path: Path, run_equipot: Run
) -> None:
    out = tmp_path / "results.extxyz"
    done = run_equipot("predict", trajectory, "--address", server.address, "--out", out, "--explain")
    assert done.returncode == 0, done.stderr
    n_atoms = sum(len(frame) for frame in read(trajectory, ":"))
    shown = dict(
        re.split(r" {2,}|(?<=batches) ", line.strip(), maxsplit=1) for line in done.stdout.splitlines()
    )
    assert shown["structures"] == "50 of 50 would be computed"
    assert shown["edges"] == f"{2 * n_atoms}"
    assert shown["engine"] == "500.0 ms"
    assert not out.exists()
    assert not any(tmp_path.glob("*predicted*"))
