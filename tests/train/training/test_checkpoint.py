"""Checkpoints are whole or absent, the newest good one is found, and only what should be is kept."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipot.train.assemble import Parts, assemble
from equipot.train.checkpoint import (
    CheckpointError,
    committed_paths,
    newest_valid,
    read_checkpoint,
    read_weights,
)
from equipot.train.errors import TrainError
from equipot.train.evaluate import Tally, evaluate
from equipot.train.export import export_runs
from equipot.train.loss import Counts
from equipot.train.metrics import read_rows
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe
from equipot.train.run_directory import RunDirectory
from equipot.train.state import TrainerState
from equipot.train.tensor_stream import write_stream
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
@pytest.mark.parametrize("part", ["share-00001-of-00001.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run: Path, damage: str, part: str) -> None:
    newest = run / "checkpoints" / "step-00000006"
    file = newest / part
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
        export_runs([run], run / "bundle", checkpoint="step-00000006", name="x")
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


def save(parts: Parts, state: TrainerState) -> str | None:
    parts.checkpoints.begin(state, parts.engine, parts.ema)
    return parts.checkpoints.settle()


@pytest.mark.parametrize("limit", [1_000, 25_000], ids=["nothing fits", "a part fits"])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_that_does_not_fit_leaves_the_one_before(
    recipe: Callable[..., Recipe], tmp_path: Path, limit: int, world: World, asynchronous: str
) -> None:
    settings = recipe(f"checkpoint.asynchronous={asynchronous}")
    run = RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    parts: Parts = assemble(settings, run, world)
    assert save(parts, TrainerState(step=1)) is None
    with files_limited_to(limit):
        assert "step-00000002 could not be written" in (save(parts, TrainerState(step=2)) or "")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]
    read_checkpoint(run.checkpoints / "step-00000001")
    assert save(parts, TrainerState(step=2)) is None
    assert names(run.path) == ["step-00000002", "step-00000001"]


def test_the_newest_the_best_and_those_for_ever_are_kept(
    recipe: Callable[..., Recipe], tmp_path: Path, world: World
) -> None:
    settings = recipe("checkpoint.keep=2", "checkpoint.keep_every_steps=3")
    run = RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    parts = assemble(settings, run, world)
    for step in range(1, 9):
        assert save(parts, TrainerState(step=step, best_step=min(step, 2))) is None
    assert [int(name[5:]) for name in names(run.path)] == [8, 7, 6, 3, 2]


def test_what_is_saved_is_the_state_when_saving_began(
    recipe: Callable[..., Recipe], tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = recipe("checkpoint.when_busy=skip"), RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    parts = assemble(settings, run, world)
    meanwhile = threading.Event()

    def slowly(*arguments: Any) -> dict[str, object]:  # a disk that is slower than training
        assert meanwhile.wait(60)
        return write_stream(*arguments)

    monkeypatch.setattr("equipot.train.saving.write_stream", slowly)
    for number in range(2):
        meanwhile.clear()
        take_a_step(parts, number)
        begun = [fragment.values.clone() for fragment in parts.engine.fragments()]
        parts.checkpoints.begin(TrainerState(step=number + 1), parts.engine, parts.ema)
        assert not parts.checkpoints.may_begin(TrainerState(step=number + 2))
        assert parts.checkpoints.may_begin(TrainerState(step=number + 2, best_step=number + 2))
        take_a_step(parts, number + 1)
        assert not list(run.checkpoints.glob(f"step-{number + 1:08d}"))
        meanwhile.set()
        assert parts.checkpoints.settle() is None
        saved = read_weights(run.checkpoints / f"step-{number + 1:08d}", "weights")
        for mine, (_, tensor) in zip(begun, saved, strict=True):
            assert torch.equal(mine, tensor.flatten())


def test_shares_that_rank_0_does_not_see_make_no_checkpoint(
    recipe: Callable[..., Recipe], tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, run = recipe(), RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    parts = assemble(settings, run, world)

    def on_another_machine(path: Path, *rest: Any) -> dict[str, object]:
        return write_stream(tmp_path / path.name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("equipot.train.saving.write_stream", on_another_machine)
        assert "that all machines share" in (save(parts, TrainerState(step=1)) or "")
    assert list(run.checkpoints.iterdir()) == []


def take_a_step(parts: Parts, number: int) -> None:
    keys = parts.sampler.micro_batches(number, rank=0, ranks=1, accumulation=1)[0].keys
    batch = parts.dataset.batch(keys)
    parts.engine.module.train()
    counts = Counts(*Counts.of(batch.targets))
    parts.engine.forward_backward(batch.systems, batch.targets, counts, 1, last=True)
    parts.engine.step(1e-2)
    parts.ema.update(number + 1)


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


def test_a_validation_is_given_up_to_stop_and_made_when_resumed(
    train: Callable[..., Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()

    def asked_meanwhile(*arguments: Any, **options: Any) -> Tally:
        stop.requested = True
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("equipot.train.trainer.evaluate", asked_meanwhile)
        run = train(tmp_path / "run", stop=stop)
    assert names(run) == ["step-00000005"]
    assert not [row for row in read_rows(run / "metrics.csv") if row.validation_loss is not None]
    train(run, resume=True)
    for mine, theirs in zip(read_rows(run / "metrics.csv"), read_rows(finished / "metrics.csv"), strict=True):
        assert (mine.step, mine.loss, mine.validation_loss) == (
            theirs.step,
            theirs.loss,
            theirs.validation_loss,
        )


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
