"""Runs as users start them: ranks as processes that are killed, stopped, starved of disk, and continued."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch

from equipot.train.checkpoint import committed_paths, newest_valid, read_checkpoint
from equipot.train.metrics import read_rows

STEPS = 40
LONG = ["--ranks", "2", "--set", f"optimizer.steps={STEPS}", "--set", "checkpoint.every_steps=4"]

Start = Callable[..., "subprocess.Popen[str]"]
Weights = Callable[..., dict[str, torch.Tensor]]


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=200)
    assert process.returncode == code, said
    return said


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(path.name[5:]) >= step for path in committed_paths(run / "checkpoints")):
            return
        time.sleep(0.005)
    pytest.fail(f"no checkpoint: {process.communicate(timeout=60)[0]}")


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, equipot: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    said = finish(equipot("train", recipe_file, "--out", run, *LONG))
    assert f"next: equipot export {run}" in said.replace("\n", " ")
    return run


@pytest.fixture(scope="module")
def killed(
    recipe_file: Path, equipot: Start, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[psutil.Process]]:
    """A run whose launcher got SIGKILL in the middle of an epoch, and what were its ranks."""
    run = tmp_path_factory.mktemp("killed") / "run"
    process = equipot("train", recipe_file, "--out", run, *LONG)
    wait_for_checkpoint(run, process, 8)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    return run, ranks


def test_no_rank_outlives_a_killed_launcher(killed: tuple[Path, list[psutil.Process]]) -> None:
    _, ranks = killed
    assert len(ranks) >= 2
    assert gone(ranks)


def test_a_killed_run_ends_with_the_same_weights(
    killed: tuple[Path, list[psutil.Process]],
    undisturbed: Path,
    recipe_file: Path,
    equipot: Start,
    weights: Weights,
) -> None:
    run, ranks = killed
    assert gone(ranks)
    found, _ = newest_valid(run / "checkpoints")
    assert found is not None
    assert 8 <= found.state.step < STEPS
    said = finish(equipot("train", recipe_file, "--out", run, *LONG, "--resume"))
    assert f"step {found.state.step} of {STEPS}" in said
    for kind in ("weights", "ema"):
        assert same(weights(run, kind), weights(undisturbed, kind))
    assert [row.step for row in read_rows(run / "metrics.csv") if row.loss] == list(range(1, STEPS + 1))


def test_a_rank_that_is_killed_ends_the_run_and_says_so(
    recipe_file: Path, equipot: Start, undisturbed: Path, tmp_path: Path, weights: Weights
) -> None:
    run = tmp_path / "run"
    process = equipot("train", recipe_file, "--out", run, *LONG)
    wait_for_checkpoint(run, process, 4)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "equipot.train.worker" in " ".join(child.cmdline())
    ]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    said = finish(process, code=1)
    assert "was killed by SIGKILL" in said
    assert "--resume" in said
    assert gone(ranks)

    # ... and SIGTERM to the launcher of the resumed run saves, says how to go on, and is no error.
    before = committed_paths(run / "checkpoints")[0].name
    process = equipot("train", recipe_file, "--out", run, *LONG, "--resume")
    wait_for_checkpoint(run, process, int(before[5:]) + 4)
    process.send_signal(signal.SIGTERM)
    said = " ".join(finish(process).split())
    assert "stopped as asked" in said
    assert f"equipot train RECIPE --out {run} --ranks 2 --resume" in said
    stopped_at = read_checkpoint(committed_paths(run / "checkpoints")[0]).state.step
    assert f"step {stopped_at} of {STEPS} and saved" in said
    finish(equipot("train", recipe_file, "--out", run, *LONG, "--resume"))
    assert same(weights(run), weights(undisturbed))


def test_a_full_disk_is_survived_and_told(
    undisturbed: Path, recipe_file: Path, equipot: Start, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    longer = [*LONG, "--resume", "--set", f"optimizer.steps={STEPS + 8}"]
    # A limit of file sizes (KiB) fails like a full disk, but for these processes alone.
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash"]
    said = " ".join(
        finish(equipot("train", recipe_file, "--out", run, *longer, prefix=limited), code=2).split()
    )
    assert f"step-{STEPS + 4:08d} could not be written" in said
    assert "Training goes on; earlier checkpoints are untouched" in said
    assert f"error: checkpoint step-{STEPS + 8:08d} could not be written" in said
    assert "make room and continue" in said
    assert not list((run / "checkpoints").glob(".*"))
    assert [row.step for row in read_rows(run / "metrics.csv") if row.loss][:STEPS] == list(
        range(1, STEPS + 1)
    )
    found, problems = newest_valid(run / "checkpoints")
    assert found is not None
    assert (found.state.step, problems) == (STEPS, [])


def test_mistakes_are_one_line_and_exit_2(recipe_file: Path, equipot: Start, tmp_path: Path) -> None:
    mistakes = {
        "unknown key model.widht": ["--set", "model.widht=3"],
        "zero.stage = 1": ["--set", "zero.stage=0", "--set", "precision=bf16", "--ranks", "2"],
        "zero.nvme_path is missing": ["--set", "zero.stage=3", "--set", "zero.offload_optimizer=nvme"],
        "is no directory": ["--set", 'data.stores=["absent"]'],
    }
    processes = {
        word: equipot("train", recipe_file, "--out", tmp_path / "run", *options)
        for word, options in mistakes.items()
    }
    for word, process in processes.items():
        said = finish(process, code=2)
        assert word in said
        assert said.startswith("error: ")
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_an_error_that_all_ranks_share_reaches_the_user_once(
    store: Path, recipe_file: Path, equipot: Start, tmp_path: Path
) -> None:
    spoiled = Path(shutil.copytree(store, tmp_path / "spoiled"))
    forces = np.load(next(spoiled.rglob("forces.npy")), mmap_mode="r+")
    forces[:] = 1e30  # the references' scale, and with it every prediction's square, is no longer a float32
    forces.flush()
    options = ["--ranks", "2", "--set", f'data.stores=["{spoiled}"]', "--set", "loss.kind=mse"]
    said = " ".join(
        finish(equipot("train", recipe_file, "--out", tmp_path / "run", *options), code=2).split()
    )
    assert said.count("the loss of step 1 is not a finite number") == 1
    assert f"{spoiled}[" in said
    assert "Traceback" not in said
