"""The averaged weights, swapping them in, and that the exported potential is the trained one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.model.bundle import load_potential
from equipot.model.potential import Potential
from equipot.train.assemble import Parts, assemble
from equipot.train.checkpoint import read_weights
from equipot.train.console import Display
from equipot.train.dataset import Batch
from equipot.train.export import export_runs
from equipot.train.loss import Counts, predict
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe
from equipot.train.run_directory import RunDirectory
from equipot.train.trainer import Trainer
from equipot.train.worker import StopRequest
from equipot.train.world import World

STAGES = [
    ["zero.stage=0"],
    ["zero.stage=1"],
    ["zero.stage=2"],
    ["zero.stage=3"],
    ["zero.stage=3", 'model.forces="direct"'],
    ["zero.offload_optimizer=cpu", "zero.stage=2"],
    ["zero.offload_parameters=cpu", "zero.offload_optimizer=cpu", "zero.stage=3"],
]


@pytest.fixture(params=STAGES, ids="-".join)
def parts(
    request: pytest.FixtureRequest, recipe: Callable[..., Recipe], world: World, tmp_path: Path
) -> Parts:
    settings = recipe("ema.decay=0.8", *request.param)
    run = RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    return assemble(settings, run, world)


def step(parts: Parts, number: int) -> Batch:
    keys = parts.sampler.micro_batches(number, rank=0, ranks=1, accumulation=1)[0].keys
    batch = parts.dataset.batch(keys)
    parts.engine.module.train()
    parts.engine.forward_backward(
        batch.systems, batch.targets, Counts(*Counts.of(batch.targets)), 1, last=True
    )
    parts.engine.step(1e-2)
    parts.ema.update(number + 1)
    return batch


def flat(parts: Parts) -> torch.Tensor:
    return torch.cat([fragment.values.clone() for fragment in parts.engine.fragments()])


def test_the_average_is_the_average(parts: Parts) -> None:
    expected = flat(parts).double()
    for number in range(6):
        before = flat(parts)
        step(parts, number)
        assert not torch.equal(flat(parts), before)
        decay = min(0.8, (1 + number + 1) / (10 + number + 1))
        expected = decay * expected + (1 - decay) * flat(parts).double()
    found = torch.cat(parts.ema.parts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert (found - flat(parts)).abs().max() > 1e-3


def energies(potential: Potential, batch: Batch) -> torch.Tensor:
    potential.eval()
    return predict(potential, batch.systems, forces=False, stress=False).energy


def test_swapped_weights_compute_and_leave_no_trace(parts: Parts) -> None:
    for number in range(4):
        batch = step(parts, number)
    masters, live = flat(parts), energies(parts.potential, batch)
    averaged = Potential(parts.potential.config, parts.potential.references)
    names = [fragment.name.removeprefix("potential.") for fragment in parts.engine.fragments()]
    shapes = [fragment.shape for fragment in parts.engine.fragments()]
    averaged.load_state_dict(
        {name: part.view(shape) for name, shape, part in zip(names, shapes, parts.ema.parts, strict=True)}
    )
    with parts.engine.swapped(parts.ema.parts):
        inside = energies(parts.potential, batch)
    assert torch.equal(inside, energies(averaged, batch))
    assert not torch.equal(inside, live)
    assert torch.equal(energies(parts.potential, batch), live)
    assert torch.equal(flat(parts), masters)
    step(parts, 4)
    assert not torch.equal(flat(parts), masters)


@pytest.mark.parametrize(
    ("changes", "raw"),
    [*((changes, False) for changes in STAGES), (["zero.stage=1"], True), (["precision=bf16"], False)],
    ids=lambda value: "-".join(value) if isinstance(value, list) else f"raw={value}",
)
def test_the_exported_potential_is_the_trained_one(
    recipe: Callable[..., Recipe], world: World, tmp_path: Path, changes: list[str], raw: bool
) -> None:
    settings, run = recipe("ema.decay=0.8", *changes), RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    with Display(silent=True) as display:
        trainer = Trainer(settings, run, world, display, StopRequest())
        trainer.run()
    export_runs([run.path], tmp_path / "bundle", checkpoint="last", name="tiny", raw=raw)
    bundle, card = load_potential(tmp_path / "bundle")
    parts = trainer.parts
    # In the form of the training, which is another one at stage 3: only then are the last bits the same.
    exported = Potential(parts.potential.config, card.references).eval()
    exported.load_state_dict(bundle.state_dict())
    batch = parts.dataset.batch(parts.validation[0].places[np.arange(len(parts.validation[0].places))])
    weights = [fragment.values.clone() for fragment in parts.engine.fragments()] if raw else parts.ema.parts
    with parts.engine.swapped(weights):
        trained = energies(parts.potential, batch)
    if settings.precision == "fp32":
        assert torch.equal(energies(exported, batch), trained)
    else:  # the bundle has the fp32 masters, training computed with them rounded
        torch.testing.assert_close(energies(exported, batch), trained, rtol=2e-2, atol=2e-2)
    for name, tensor in read_weights(max(run.checkpoints.iterdir()), "weights" if raw else "ema"):
        assert torch.equal(tensor, exported.state_dict()[name.removeprefix("potential.")])
    assert card.provenance["steps"] == 6
    assert card.metrics["test"]["structures"] == 6
