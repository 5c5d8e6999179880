"""Real studies by the real command: three tiny points from end to end, and what is done when it goes on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipot.train.flops import step_flops
from equipot.train.mix import Mix
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.sampler import Sampler

from .conftest import TINY, command, run

THREE = TINY + "[experiments.size]\naxes.width = [2, 4, 6]\nholdout = [{ width = 4 }]\n"
FOUR = THREE.replace("[2, 4, 6]", "[2, 4, 6, 8]") + (
    '[experiments.forces]\naxes = {width = 4, forces = ["conservative"]}\n'
)
LONG = TINY + "[experiments.size]\naxes.width = [4, 6]\nlength = { steps = 600 }\n"


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("points/*/result.json"))
    }


def trained(out: Path) -> list[int]:
    """How often each point's training came to its end."""
    return [path.read_text().count("trained ") for path in sorted(out.glob("points/*/train.log"))]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a study that was run, and what was said."""
    home = tmp_path_factory.mktemp("study")
    (home / "three.toml").write_text(THREE)
    return home / "out", run(home / "three.toml", home / "out")


def test_every_point_has_a_result_with_what_it_took(study: tuple[Path, str]) -> None:
    out, said = study
    found = results(out)
    assert [found[name]["point"]["width"] for name in found] == [2, 4, 6]
    assert "3 of 3 points are finished" in said
    assert (out / "study.toml").read_text() == THREE
    for name, result in found.items():
        folder = out / "points" / name
        assert result["point"] == json.loads((folder / "point.json").read_text())
        assert result["point"]["holdout"] == (result["point"]["width"] == 4)
        assert (result["stopped"], result["steps"], result["structures"]) == ("finished", 4, 16)
        assert result["test"]["force_mae"] > 0
        assert len(result["similarity"]) == 2
        assert all(-1 <= value <= 1 for value in result["similarity"])
        assert result["seconds"] > 0
        assert not (folder / "run" / "checkpoints").exists()
        assert not list(folder.glob("claim*"))


def test_flops_are_those_of_the_structures_that_were_seen(study: tuple[Path, str]) -> None:
    out, _ = study
    mix = Mix.open(out / "mix")
    for name, result in results(out).items():
        card = RunCard.read(out / "points" / name / "run" / "recipe.resolved.json")
        recipe: Recipe = card.recipe
        _, draws = mix.training(1.0)
        sampler = Sampler(draws, np.ones(len(draws)), structures=4, seed=recipe.seed)
        atoms = edges = 0
        for step in range(4):
            for store, index in draws[sampler.global_batch(step)]:
                positions = mix.stores[store].read(np.array([index])).positions
                apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
                atoms += len(positions)
                edges += int(((apart < 3.0) & (apart > 0)).sum())
        assert (result["atoms"], result["edges"]) == (atoms, edges)
        assert result["flops"] == step_flops(recipe, card.config).of(atoms, edges)
        with (out / "points" / name / "curve.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [2, 4]
        assert float(rows[-1]["flops"]) == pytest.approx(result["flops"], rel=1e-8)
        assert float(rows[0]["validation_loss"]) > 0


def test_what_is_finished_is_not_done_again_and_points_can_be_added(
    study: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = study
    before = {name: (out / "points" / name / "train.log").read_text() for name in results(out)}
    file = tmp_path / "four.toml"
    file.write_text(FOUR)
    said = run(file, out)
    after = results(out)
    assert "4 points" in said
    assert len(after) == 4
    for name, text in before.items():
        assert (out / "points" / name / "train.log").read_text() == text
    shared = next(result for result in after.values() if result["point"]["width"] == 4)
    assert shared["point"]["group"] == ["size", "forces"]
    refused = run(file, out, "--set", "length.steps=5", code=2)
    assert "another length" in refused


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(LONG)
    process = subprocess.Popen(command(file, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(out.glob("points/*/run/checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(file, out)
    assert trained(out) == [1, 1]
    assert any("resumed from" in path.read_text() for path in out.glob("points/*/train.log"))
    whole = tmp_path / "whole"
    run(file, whole)
    for name, result in results(whole).items():
        assert results(out)[name]["test"] == result["test"]
        for file_name in ("curve.csv",):
            assert (out / "points" / name / file_name).read_text() == (
                whole / "points" / name / file_name
            ).read_text()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(LONG)
    process = subprocess.Popen(command(file, out), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(out.glob("points/*/run/checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (claimed,) = out.glob("points/*/claim-*.json")
    os.kill(json.loads(claimed.read_text())["pid"], signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert trained(out) == [1, 1]
    assert any("resumed from" in path.read_text() for path in out.glob("points/*/train.log"))


@pytest.mark.slow
def test_a_study_that_is_asked_to_stop_saves_and_goes_on(tmp_path: Path) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(LONG.replace("600", "3000"))
    process = subprocess.Popen(command(file, out), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(out.glob("points/*/run/metrics.csv")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in said
    assert list(out.glob("points/*/run/checkpoints/step-*"))
    assert not results(out)


@pytest.mark.slow
def test_runners_that_share_a_folder_do_no_point_twice(tmp_path: Path) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(TINY + "[experiments.size]\naxes.width = [2, 3, 4, 5, 6, 7, 8]\n")
    both = [subprocess.Popen(command(file, out), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert "7 of 7 points are finished" in said
    assert trained(out) == [1] * 7


@pytest.mark.slow
def test_points_that_fail_are_recorded_and_the_others_are_run(tmp_path: Path) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(
        TINY
        + "[experiments.size]\naxes.width = [4]\n"
        + '[experiments.small]\naxes = {width = 4, "batch.max_edges" = 3}\n'
    )
    said = run(file, out, code=1)
    assert "batch.max_edges = 3" in said
    assert [result["stopped"] for result in results(out).values()] == ["finished"]
    failed = [json.loads(path.read_text()) for path in out.glob("points/*/failure.json")]
    assert len(failed) == 1
    assert "batch.max_edges = 3" in failed[0]["reason"]


@pytest.mark.slow
def test_a_point_may_be_trained_by_several_ranks(tmp_path: Path) -> None:
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(TINY + "[experiments.size]\naxes.width = [4]\nranks = 2\n")
    run(file, out)
    (result,) = results(out).values()
    assert (result["stopped"], result["steps"], result["point"]["ranks"]) == ("finished", 4, 2)
    (log,) = out.glob("points/*/run/log/rank-1.log")
    assert log.exists()
