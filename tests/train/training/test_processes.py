"""Runs as users start them: ranks as processes that are killed, stopped, starved of disk, and continued."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch
from tests.train.training.conftest import MadeOnce

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
def undisturbed(recipe_file: Path, equipot: Start, made_once: MadeOnce) -> Path:
    def fill(home: Path) -> None:
        said = finish(equipot("train", recipe_file, "--out", home / "run", *LONG))
        assert f"next: equipot export {home / 'run'}" in said.replace("\n", " ")

    return made_once("undisturbed", fill) / "run"


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a launcher has started, in their order."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "equipot.train.worker" in " ".join(child.cmdline())]


def storm(
    start: Callable[..., subprocess.Popen[str]], run: Path, kills: int, seed: int
) -> tuple[int, list[str]]:
    """Kill a rank, the launcher, or all of them at random moments, so often, until a run ends.

    Returns:
        How many kills found something to kill, and what the launchers said.
    """
    random = np.random.default_rng(seed)
    said: list[str] = []
    process = start()
    done = 0
    for number in range(kills):
        newest = max((int(path.name[5:]) for path in committed_paths(run / "checkpoints")), default=-1)
        if random.random() < 0.75:  # while it trains, at any moment of a step or of a save
            wait_for_checkpoint(run, process, newest + 1)
        time.sleep(random.uniform(0, 0.3))
        ranks = wait_for_ranks(process)
        if process.poll() is not None:
            break
        whom = ("rank", "all", "launcher")[number % 3]
        done += 1
        if whom == "rank":
            random.choice(np.array(ranks, dtype=object)).kill()
            assert psutil.wait_procs(ranks, timeout=30)[1] == []
            continue
        process.kill()
        for rank in ranks if whom == "all" else []:
            rank.kill()
        said.append(process.communicate(timeout=60)[0])
        assert gone(ranks)
        process = start()
    said.append(finish(process))
    return done, said


def wait_for_ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Both ranks, as soon as they are there; fewer if the launcher has ended."""
    ranks: list[psutil.Process] = []
    while len(ranks) < 2 and process.poll() is None:
        time.sleep(0.01)
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = ranks_of(process)
    return ranks


CLOCKED = {f"{what}_per_second" for what in ("structures", "atoms", "edges")} | {
    "model_flops_utilisation",
    "peak_memory_gib",
}


def curve(run: Path) -> list[tuple[float | None, ...]]:
    """All of a run's numbers that do not depend on the clock."""
    rows = read_rows(run / "metrics.csv")
    return [tuple(value for name, value in asdict(row).items() if name not in CLOCKED) for row in rows]


def test_a_storm_of_kills_changes_nothing(
    recipe_file: Path, equipot: Start, undisturbed: Path, tmp_path: Path, weights: Weights
) -> None:
    run = tmp_path / "run"
    again = ["--restarts", 3, "--resume"]
    done, said = storm(lambda: equipot("train", recipe_file, "--out", run, *LONG, *again), run, 3, seed=1)
    assert done == 3
    assert "was killed by SIGKILL" in said[0]
    assert "restart 1 of 3, from the last checkpoint" in said[0]
    assert curve(run) == curve(undisturbed)
    for kind in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert same(weights(run, kind), weights(undisturbed, kind))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_storm_of_kills_changes_nothing(
    recipe_file: Path, equipot: Start, tmp_path: Path, weights: Weights
) -> None:
    options = ["--ranks", 2, "--set", "optimizer.steps=1500", "--set", "checkpoint.every_steps=3"]
    run, calm = tmp_path / "run", tmp_path / "calm"
    finish(equipot("train", recipe_file, "--out", calm, *options))
    again = ["--restarts", 99, "--resume"]
    done, _ = storm(lambda: equipot("train", recipe_file, "--out", run, *options, *again), run, 20, seed=2)
    assert done == 20
    assert curve(run) == curve(calm)
    for kind in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert same(weights(run, kind), weights(calm, kind))


@pytest.mark.slow
def test_a_storm_changes_nothing_of_what_is_done_about_spikes(
    recipe_file: Path, equipot: Start, tmp_path: Path, weights: Weights
) -> None:
    options = ["--ranks", 2, "--set", "optimizer.steps=300", "--set", "checkpoint.every_steps=7"]
    # ordinary differences between batches, taken for spikes
    watch = {"window": 10, "spike_factor": 1.4, "spike": "rollback", "most": 999}
    options += [word for key, value in watch.items() for word in ("--set", f"watch.{key}={value}")]
    run, calm = tmp_path / "run", tmp_path / "calm"
    finish(equipot("train", recipe_file, "--out", calm, *options))
    again = ["--restarts", 99, "--resume"]
    storm(lambda: equipot("train", recipe_file, "--out", run, *options, *again), run, 9, seed=3)
    assert len((calm / "incidents.jsonl").read_text().splitlines()) > 5
    assert (run / "incidents.jsonl").read_text() == (calm / "incidents.jsonl").read_text()
    assert curve(run) == curve(calm)
    for kind in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        assert same(weights(run, kind), weights(calm, kind))


def test_restarts_are_bounded(recipe_file: Path, equipot: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = equipot("train", recipe_file, "--out", run, *LONG, "--restarts", 1)
    for _ in range(2):
        ranks = wait_for_ranks(process)
        ranks[1].kill()
        assert gone(ranks)
    said = " ".join(finish(process, code=1).split())
    assert said.count("warning: rank 1 was killed by SIGKILL") == 1
    assert "error: rank 1 was killed by SIGKILL" in said
    assert "--resume continues the run" in said


def test_signals_save_and_are_no_error(
    recipe_file: Path, equipot: Start, undisturbed: Path, tmp_path: Path, weights: Weights
) -> None:
    run = tmp_path / "run"
    before = 0
    for number in (signal.SIGUSR1, signal.SIGINT):  # Slurm's, and Ctrl-C; ranks are sent SIGTERM
        process = equipot("train", recipe_file, "--out", run, *LONG, "--resume")
        wait_for_checkpoint(run, process, before + 4)
        process.send_signal(number)
        process.send_signal(number)  # as schedulers do
        said = " ".join(finish(process).split())
        before = read_checkpoint(committed_paths(run / "checkpoints")[0]).state.step
        assert f"stopped as asked at step {before} of {STEPS} and saved" in said
        assert f"equipot train RECIPE --out {run} --ranks 2 --resume" in said
    finish(equipot("train", recipe_file, "--out", run, *LONG, "--resume"))
    assert same(weights(run), weights(undisturbed))


def test_ranks_that_do_not_end_in_time_are_killed(recipe_file: Path, equipot: Start, tmp_path: Path) -> None:
    process = equipot("train", recipe_file, "--out", tmp_path / "run", *LONG, "--grace", 0)
    wait_for_checkpoint(tmp_path / "run", process, 4)
    ranks = ranks_of(process)
    ranks[0].suspend()
    process.send_signal(signal.SIGTERM)
    said = " ".join(finish(process, code=1).split())
    assert "had not ended 0 s after they were asked to" in said
    assert gone(ranks)


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
