"""Ray Train starts ranks on a real Ray cluster of this machine, and replaces those that die."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from equipot.train.checkpoint import committed_paths, read_checkpoint
from equipot.train.metrics import read_rows

pytest.importorskip("ray.train", reason='needs the extra: pip install "equipot[ray]"')
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Start = Callable[..., "subprocess.Popen[str]"]
OPTIONS = ["--launcher", "ray", "--ranks", 2, "--set", "checkpoint.every_steps=4"]


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=600)
    finally:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # they end by themselves, too
                if "ray" in " ".join(child.cmdline()).lower():
                    child.kill()
    assert process.returncode == code, said
    return said


def saved(run: Path) -> int:
    return max((int(path.name[5:]) for path in committed_paths(run / "checkpoints")), default=-1)


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 400
    while saved(run) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def test_a_killed_worker_is_replaced_and_nothing_changes(
    recipe_file: Path, equipot: Start, tmp_path: Path, weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    steps = ["--set", "optimizer.steps=400", "--set", "validation.every_epochs=40"]
    calm = tmp_path / "calm"
    ranks = equipot(
        "train", recipe_file, "--out", calm, "--ranks", 2, "--set", "checkpoint.every_steps=4", *steps
    )
    run = tmp_path / "run"
    process = equipot("train", recipe_file, "--out", run, *OPTIONS, *steps, "--restarts", 2)
    wait_for_checkpoint(run, process, 12)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    said = finish(process)
    assert "resumed from" in said
    assert ranks.wait(300) == 0
    last = read_checkpoint(committed_paths(run / "checkpoints")[0])
    assert (last.state.step, last.parallelism.ranks) == (400, 2)
    mine, theirs = ([asdict(row)["loss"] for row in read_rows(each / "metrics.csv")] for each in (run, calm))
    assert mine == theirs
    expected = weights(calm)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run).items())


def test_sigterm_saves_and_ends_well_and_mistakes_are_one_line(
    recipe_file: Path, equipot: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = equipot("train", recipe_file, "--out", run, *OPTIONS, "--set", "optimizer.steps=100000")
    wait_for_checkpoint(run, process, 4)
    process.send_signal(signal.SIGTERM)
    assert "stopped as asked at step" in finish(process)
    at = saved(run)
    assert at >= 4
    wrong = ["--set", "batch.structures=43", "--restarts", 3]
    process = equipot("train", recipe_file, "--out", tmp_path / "other", *OPTIONS, *wrong)
    said = finish(process, code=2)
    assert "error: batch.structures = 43 is more than the 42" in said
