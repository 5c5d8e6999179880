"""Checkpoints are whole or absent, the newest good one is found, and only what should be is kept."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.train.assemble import Parts, assemble
from equipot.train.checkpoint import CheckpointError, committed_paths, newest_valid, read_checkpoint
from equipot.train.errors import TrainError
from equipot.train.export import export_run
from equipot.train.metrics import read_rows
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe
from equipot.train.run_directory import RunDirectory
from equipot.train.state import TrainerState
from equipot.train.worker import StopRequest
from equipot.train.world import World


@pytest.fixture(scope="module")
def finished(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a checkpoint after each two."""
    return train(tmp_path_factory.mktemp("finished") / "run", "checkpoint.every_steps=2", "checkpoint.keep=3")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def names(run: Path) -> list[str]:
    return [path.name for path in committed_paths(run / "checkpoints")]


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    assert names(finished) == ["step-00000006", "step-00000005", "step-00000004"]
    checkpoint = read_checkpoint(finished / "checkpoints" / "step-00000006")
    assert checkpoint.state.step == 6
    assert (checkpoint.state.epoch, checkpoint.state.epoch_offset) == (1, 1)
    rows = read_rows(finished / "metrics.csv")
    assert [row.step for row in rows if row.loss is not None] == [1, 2, 3, 4, 5, 6]
    assert [row.step for row in rows if row.validation_loss is not None] == [5, 6]
    assert (finished / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events*"))
    card = json.loads((finished / "recipe.resolved.json").read_text())
    assert card["model"]["elements"] == [28, 29]
    assert card["recipe"]["optimizer"]["steps"] == 6


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("part", ["weights-00001-of-00001.safetensors", "deepspeed", "trainer.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run: Path, damage: str, part: str) -> None:
    newest = run / "checkpoints" / "step-00000006"
    file = next(path for path in [newest / part, *sorted((newest / part).rglob("*"))] if path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content if damage == "altered" else content[:-1])
    found, problems = newest_valid(run / "checkpoints")
    assert found is not None
    assert found.name == "step-00000005"
    assert len(problems) == 1
    assert str(file) in problems[0]
    with pytest.raises(CheckpointError):
        export_run(run, run / "bundle", checkpoint="step-00000006", name="x")
    assert not (run / "bundle").exists()


def test_a_damaged_end_is_trained_again(
    run: Path,
    finished: Path,
    train: Callable[..., Path],
    weights: Callable[..., dict[str, torch.Tensor]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (run / "checkpoints" / "step-00000006" / "trainer.json").unlink()
    train(run, "checkpoint.every_steps=2", "checkpoint.keep=3", resume=True)
    said = capfd.readouterr().out
    assert "passed over" in said
    assert "resumed from" in said
    assert read_checkpoint(run / "checkpoints" / "step-00000006").state.step == 6
    for kind in ("weights", "ema"):
        expected = weights(finished, kind)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(run, kind).items())


def test_what_an_interrupted_save_left_is_ignored_and_removed(run: Path, train: Callable[..., Path]) -> None:
    newest = run / "checkpoints" / "step-00000006"
    half = newest.rename(newest.with_name(".partial-step-00000006"))
    (half / "COMMITTED.json").unlink()
    assert names(run) == ["step-00000005", "step-00000004"]
    train(run, "checkpoint.every_steps=2", "checkpoint.keep=3", resume=True)
    assert not half.exists()
    assert names(run) == ["step-00000006", "step-00000005", "step-00000004"]


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [3_000, 25_000], ids=["nothing fits", "a part fits"])
def test_a_save_that_does_not_fit_leaves_the_one_before(
    recipe: Callable[..., Recipe], tmp_path: Path, limit: int, world: World
) -> None:
    settings, run = recipe(), RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    parts: Parts = assemble(settings, run, world)
    parts.checkpoints.save(TrainerState(step=1), parts.engine, parts.ema)
    with files_limited_to(limit), pytest.raises(CheckpointError, match="step-00000002 could not be written"):
        parts.checkpoints.save(TrainerState(step=2), parts.engine, parts.ema)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]
    read_checkpoint(run.checkpoints / "step-00000001")
    parts.checkpoints.save(TrainerState(step=2), parts.engine, parts.ema)
    assert names(run.path) == ["step-00000002", "step-00000001"]


def test_the_best_is_kept_beside_the_newest(
    recipe: Callable[..., Recipe], tmp_path: Path, world: World
) -> None:
    settings, run = recipe("checkpoint.keep=2"), RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    parts = assemble(settings, run, world)
    for step in range(1, 6):
        parts.checkpoints.save(TrainerState(step=step, best_step=min(step, 2)), parts.engine, parts.ema)
    assert names(run.path) == ["step-00000005", "step-00000004", "step-00000002"]


def test_a_run_is_not_overwritten_nor_continued_as_another(run: Path, train: Callable[..., Path]) -> None:
    with pytest.raises(TrainError, match="already holds a run"):
        train(run)
    with pytest.raises(TrainError, match=r"model\.width = 8, but the run was begun with 16"):
        train(run, "model.width=8", resume=True)


def test_a_run_can_be_lengthened(
    run: Path, train: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    train(run, "optimizer.steps=8", resume=True)
    assert "optimizer.steps: 6 → 8" in capfd.readouterr().out
    assert names(run)[0] == "step-00000008"
    steps = [row.step for row in read_rows(run / "metrics.csv") if row.loss is not None]
    assert steps == list(range(1, 9))


DIRECT = 'model.forces="direct"'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["zero.stage=1"], ["zero.stage=0"]),
        (["zero.stage=0"], ["zero.stage=2"]),
        (["zero.stage=0", DIRECT], ["zero.stage=3", DIRECT]),
        (["zero.stage=3", DIRECT], ["zero.stage=1", "precision=bf16", DIRECT]),
    ],
)
def test_weights_are_taken_over_by_another_division(
    before: list[str],
    after: list[str],
    tmp_path: Path,
    train: Callable[..., Path],
    weights: Callable[..., dict[str, torch.Tensor]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = train(tmp_path / "run", *before)
    old = {kind: weights(run, kind) for kind in ("weights", "ema")}
    train(run, *after, resume=True)
    assert "the optimizer's moments begin anew" in capfd.readouterr().out
    checkpoint = read_checkpoint(run / "checkpoints" / "step-00000006")
    assert checkpoint.state.moments_since == 6
    assert f"zero.stage={checkpoint.parallelism.zero_stage}" in after
    for kind, tensors in old.items():
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in weights(run, kind).items())
    train(run, *after, "optimizer.steps=8", resume=True)
    assert names(run)[0] == "step-00000008"


def test_a_request_to_stop_saves_before_the_next_step(
    train: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = StopRequest()
    stop.requested = True
    run = train(tmp_path / "run", stop=stop)
    assert names(run) == ["step-00000000"]
    assert "stopped as asked at step 0 of 6 and saved" in capfd.readouterr().out
    train(run, resume=True)
    assert names(run)[0] == "step-00000006"


def test_a_run_without_a_checkpoint_is_begun_anew(train: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"batch\.structures = 43 is more than the 42"):
        train(tmp_path / "run", "batch.structures=43")
    assert names(train(tmp_path / "run"))[0] == "step-00000006"


def test_early_stop(train: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # A rate that overshoots: the first validations are the best there will be.
    out = train(
        tmp_path / "run",
        "optimizer.steps=200",
        "optimizer.learning_rate=0.9",
        "optimizer.warmup_steps=0",
        "validation.patience=2",
    )
    assert "no improvement in 2 validations" in capfd.readouterr().out
    found, _ = newest_valid(out / "checkpoints")
    assert found is not None
    assert found.state.step == found.state.best_step + 10 < 200
    assert names(out)[-1] == f"step-{found.state.best_step:08d}"
    train(
        out,
        "optimizer.steps=200",
        "optimizer.learning_rate=0.9",
        "optimizer.warmup_steps=0",
        "validation.patience=2",
        resume=True,
    )
    again, _ = newest_valid(out / "checkpoints")
    assert again is not None
    assert again.state.step == found.state.step


def test_a_spoiled_structure_is_named(
    store: Path, train: Callable[..., Path], tmp_path: Path, weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    spoiled = Path(shutil.copytree(store, tmp_path / "store"))
    changes = [f'data.stores=["{spoiled}"]', "loss.kind=mse"]
    run = train(tmp_path / "run", *changes, "optimizer.steps=2")
    trained_on = np.load(run / "mix" / "train.npy")
    forces = np.load(next(spoiled.rglob("forces.npy")), mmap_mode="r+")
    offsets = np.load(next(spoiled.rglob("atom_offsets.npy")))
    index = int(trained_on[17])
    forces[offsets[index]] = 1e30  # its square is no longer a float32
    forces.flush()
    before = weights(run)
    with pytest.raises(TrainError, match=r"loss of step \d+ is not a finite number") as caught:
        train(run, *changes, "optimizer.steps=10", resume=True)
    assert f"{spoiled}[{index}] (emt.extxyz, frame {index})." in str(caught.value)
    assert "--resume" in str(caught.value)
    assert read_checkpoint(run / "checkpoints" / names(run)[0]).state.step >= 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run, step=2).items())
