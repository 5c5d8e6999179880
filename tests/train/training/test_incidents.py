"""Steps that go wrong are noticed, answered by policy, counted, written down, and change nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipot.train.assemble import Parts, assemble
from equipot.train.checkpoint import committed_paths, read_checkpoint, read_weights
from equipot.train.errors import TrainError
from equipot.train.incidents import trouble_with_loss
from equipot.train.loss import Counts
from equipot.train.metrics import read_rows
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe, WatchSection
from equipot.train.run_directory import RunDirectory
from equipot.train.state import TrainerState
from equipot.train.world import World

DIVISIONS = {
    "0": ["zero.stage=0"],
    "0-accumulated": ["zero.stage=0", "batch.accumulation=2"],
    "1": ["zero.stage=1"],
    "2-accumulated": ["zero.stage=2", "batch.accumulation=2"],
    "2-cpu": ["zero.stage=2", "zero.offload_optimizer=cpu"],
    "2-bf16": ["zero.stage=2", "precision=bf16"],
    "3": ["zero.stage=3"],
    "3-accumulated-cpu": ["zero.stage=3", "batch.accumulation=2", "zero.offload_optimizer=cpu"],
    "3-bf16": ["zero.stage=3", "precision=bf16"],
}


def test_what_is_a_spike() -> None:
    settings = WatchSection(window=10, spike_factor=4, spike="skip", not_finite="rollback")
    state = TrainerState()
    for loss in (50.0, 1.0, 3.0, 2.0):
        assert trouble_with_loss(1000.0, state, settings) is None  # too little is known yet
        state = state.with_loss(loss, settings.window)
    state = state.with_loss(2.0, settings.window)
    assert trouble_with_loss(8.0, state, settings) is None
    spike = trouble_with_loss(8.1, state, settings)
    assert spike is not None
    assert (spike.why, spike.usual, spike.decision) == ("spike", 2.0, "skip")
    assert "8.1, 4.0 times the usual" in spike.in_words()
    nothing = trouble_with_loss(float("nan"), TrainerState(), settings)
    assert nothing is not None
    assert nothing.decision == "rollback"
    for loss in range(20):
        state = state.with_loss(float(loss), settings.window)
    assert state.losses == tuple(range(10, 20))
    assert TrainerState.from_json(json.loads(json.dumps(asdict(state)))) == state


QUICK = ("0-accumulated", "2-cpu", "2-bf16", "3")


@pytest.mark.parametrize(
    "division",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DIVISIONS],
)
@pytest.mark.parametrize("how", ["discarded", "spoiled"])
def test_a_step_left_out_leaves_no_trace(
    recipe: Callable[..., Recipe], tmp_path: Path, world: World, division: str, how: str
) -> None:
    settings = recipe("loss.kind=mse", *DIVISIONS[division])
    run = RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    without, with_one = (assemble(settings, run, world) for _ in range(2))
    for number in (0, 1, 2):
        compute(without, settings, number)
        without.engine.step(1e-2)
        without.ema.update(number + 1)
    for number in (0, 7, 1, 8, 2):
        compute(with_one, settings, number, spoiled=how == "spoiled" and number > 2)
        if number > 2 and how == "discarded":
            before = whole(with_one)
            with_one.engine.discard()
            assert same(before, whole(with_one))
        elif number > 2:
            assert not np.isfinite(with_one.engine.step(1e-2))
        else:
            with_one.engine.step(1e-2)
            with_one.ema.update(number + 1)
    assert with_one.engine.updates == without.engine.updates == 3
    assert same(whole(with_one), whole(without))


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def compute(parts: Parts, settings: Recipe, number: int, *, spoiled: bool = False) -> None:
    chosen = parts.sampler.micro_batches(number, rank=0, ranks=1, accumulation=settings.batch.accumulation)
    batches = [parts.dataset.batch(part.keys) for part in chosen]
    counts = Counts(*np.sum([Counts.of(batch.targets) for batch in batches], axis=0))
    parts.engine.module.train()
    for batch in batches:
        if spoiled:
            batch.systems.positions[0] = float("nan")
        parts.engine.forward_backward(batch.systems, batch.targets, counts, 1, last=batch is batches[-1])


def whole(parts: Parts) -> list[torch.Tensor]:
    """Copies of all state: weights, average, moments."""
    weights = [fragment.values.clone() for fragment in parts.engine.fragments()]
    moments = [tensor.clone() for each in parts.engine.states() for tensor in each.values()]
    return weights + [part.clone() for part in parts.ema.parts] + moments


@pytest.fixture(scope="module")
def begun(
    store: Path, train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run of four steps on a copy of the store, and the change that names it."""
    home = tmp_path_factory.mktemp("begun")
    spoiled = Path(shutil.copytree(store, home / "store"))
    change = f'data.stores=["{spoiled}"]'
    return train(home / "run", change, "optimizer.steps=4", "loss.kind=mse"), change


def spoil(begun: tuple[Path, str], to: Path, *, force: float = 1e30) -> tuple[Path, list[str], int]:
    """A copy of the run, changes for it, and which structure it meets from now on, when it is resumed."""
    run, _ = begun
    store = Path(shutil.copytree(run.parent / "store", to / "store"))
    copied = Path(shutil.copytree(run, to / "run"))
    forces = np.load(next(store.rglob("forces.npy")), mmap_mode="r+")
    offsets = np.load(next(store.rglob("atom_offsets.npy")))
    index = int(np.load(run / "mix" / "train.npy")[17])
    forces[offsets[index]] = force  # from 1e20 on its square is no float32
    forces.flush()
    return copied, [f'data.stores=["{store}"]', "loss.kind=mse", "optimizer.steps=20", "ema.decay=0.9"], index


def incidents(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]


def test_skipped_steps(
    begun: tuple[Path, str], train: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, changes, index = spoil(begun, tmp_path)
    train(run, *changes, "watch.not_finite=skip", resume=True)
    met = incidents(run)
    assert 2 <= len(met) <= 4  # once an epoch of five steps
    for incident in met:
        (culprit,) = incident["structures"]
        assert (culprit["structure"], culprit["file"], culprit["frame"]) == (index, "emt.extxyz", index)
        assert (incident["why"], incident["outcome"], incident["loss"]) == ("not finite", "skipped", None)
    said = " ".join(capfd.readouterr().out.split())
    first = met[0]["step"]
    assert f"warning: step {first}: the loss is not a finite number, from structures " in said
    assert f"[{index}] (emt.extxyz, frame {index}); skipped." in said
    rows = {row.step: row for row in read_rows(run / "metrics.csv") if row.structures_per_second}
    assert list(rows) == list(range(1, 21))
    assert [step for step, row in rows.items() if row.gradient_norm is None] == [i["step"] for i in met]
    state = read_checkpoint(committed_paths(run / "checkpoints")[0].resolve()).state
    assert (state.step, state.skipped, state.rolled_back) == (20, len(met), 0)


def test_rolled_back_steps(
    begun: tuple[Path, str],
    train: Callable[..., Path],
    weights: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, changes, _ = spoil(begun, tmp_path)
    changes += ["checkpoint.every_epochs=99", "checkpoint.keep=99", "validation.every_epochs=99"]
    with pytest.raises(TrainError, match="is not a finite number"):
        train(run, *changes, resume=True)
    (stopped,) = incidents(run)
    step = stopped["step"]  # saved right after it:
    train(run, *changes, "watch.not_finite=rollback", f"checkpoint.every_steps={step}", resume=True)
    first = incidents(run)[0]
    outcome = "rolled back to step-00000004, to go on behind this batch"
    assert (first["step"], first["outcome"]) == (step, outcome)
    assert f"{outcome}. All are in" in " ".join(capfd.readouterr().out.split())
    for kind in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        before, after = weights(run, kind, step=4), weights(run, kind, step=step)
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    state = read_checkpoint(run / "checkpoints" / f"step-{step:08d}").state
    assert (state.step, state.rolled_back, state.skipped) == (step, 1, 0)


def test_so_many_and_no_more(begun: tuple[Path, str], train: Callable[..., Path], tmp_path: Path) -> None:
    run, changes, index = spoil(begun, tmp_path)
    with pytest.raises(TrainError, match=r"watch\.most = 1 steps went wrong before; Look at their") as caught:
        train(run, *changes, "watch.not_finite=skip", "watch.most=1", resume=True)
    assert f"[{index}] (emt.extxyz, frame {index})." in str(caught.value)
    skipped, stopped = incidents(run)
    assert (skipped["outcome"], stopped["outcome"]) == ("skipped", "the run was stopped")


@pytest.mark.parametrize("policy", ["report", "stop", "skip", "rollback"])
def test_spikes(
    begun: tuple[Path, str],
    train: Callable[..., Path],
    weights: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    policy: str,
) -> None:
    run, changes, index = spoil(begun, tmp_path, force=300.0)
    changes += ["watch.window=6", f"watch.spike={policy}", "checkpoint.every_epochs=99", "ema.decay=0"]
    if policy == "stop":
        with pytest.raises(TrainError, match=r"the loss of step \d+ is [\d.e+]+, [\d.]+ times the usual"):
            train(run, *changes, resume=True)
    else:
        train(run, *changes, resume=True)
    first = incidents(run)[0]
    assert (first["why"], first["decision"]) == ("spike", policy)
    assert first["structures"][0]["structure"] == index  # the worst of all of the batch
    assert first["structures"][0]["loss"] > 0.9 * first["loss"]
    assert len(first["structures"]) == 8
    rows = {row.step: row for row in read_rows(run / "metrics.csv") if row.structures_per_second}
    if policy == "stop":
        assert max(rows) == first["step"] - 1
        return
    assert (rows[first["step"]].gradient_norm is None) == (policy != "report")
    assert rows[first["step"]].loss == pytest.approx(first["loss"])


def test_a_run_that_is_continued_decides_as_it_would_have(
    begun: tuple[Path, str], train: Callable[..., Path], tmp_path: Path
) -> None:
    run, changes, _ = spoil(begun, tmp_path)
    changes += ["watch.not_finite=rollback", "checkpoint.every_steps=3", "checkpoint.keep=99"]
    train(run, *changes, resume=True)
    expected = everything(run)
    assert expected["incidents"]
    for path in committed_paths(run / "checkpoints")[1::2]:
        cut = Path(shutil.copytree(run, tmp_path / path.name))
        for later in committed_paths(cut / "checkpoints"):
            if later.name > path.name:
                shutil.rmtree(later)
        train(cut, *changes, resume=True)
        assert everything(cut) == expected


def everything(run: Path) -> dict[str, Any]:
    newest = committed_paths(run / "checkpoints")[0]
    rows = [
        (row.step, row.loss, row.gradient_norm, row.validation_loss) for row in read_rows(run / "metrics.csv")
    ]
    state = asdict(read_checkpoint(newest).state) | {"seconds": None}
    tensors = {
        (kind, name): tensor.numpy().tobytes()
        for kind in ("weights", "ema", "exp_avg_sq")
        for name, tensor in read_weights(newest, kind)
    }
    return {"rows": rows, "state": state, "tensors": tensors, "incidents": incidents(run)}
