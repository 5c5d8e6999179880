"""What is followed on shapes is what real tensors take: saved for backward, and under DeepSpeed's stages."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from equipot.model.potential import Potential
from equipot.train.assemble import assemble
from equipot.train.dataset import Batch, Dataset
from equipot.train.loss import Counts, LossModule
from equipot.train.memory.follow import follow_step
from equipot.train.memory.machine import has_compiled_kernels
from equipot.train.memory.trace import Tracker
from equipot.train.memory.workload import Load
from equipot.train.prepare import open_mix, prepare
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.state import TrainerState
from equipot.train.world import World

FORMS = ("plain", "split", "lean", "balanced", "fast")
COUNTS = Counts(1.0, 1.0, 1.0)


def opened(recipe: Recipe, home: Path) -> tuple[RunDirectory, RunCard, Batch]:
    """The run of a recipe, its card, and a batch of its data."""
    run = RunDirectory(home / "run")
    prepare(recipe, run, resume=False)
    card, mix = RunCard.read(run.card), open_mix(recipe, run)
    keys = np.array([[0, number] for number in range(recipe.batch.structures)])
    return run, card, Dataset(mix.stores, card.config).batch(keys)


def saved_bytes(compute: Callable[[], torch.Tensor], known: list[torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes that are alive for the backward pass alone when the forward pass has ended."""
    tracker = Tracker("cpu")
    with tracker:
        tracker.ignore_all(known)
        loss = compute()
        gc.collect()
    return int(tracker.timeline().total[-1]), loss


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize(
    "network",
    [*(f"model.messages={form}" for form in FORMS), "model.architecture=moments", "model.architecture=gcn"],
)
def test_activations_at_the_end_of_the_forward_pass_are_those_autograd_saves(
    recipe: Callable[..., Recipe], tmp_path: Path, network: str, forces: str
) -> None:
    settings = recipe(network, f"model.forces={forces}", "model.width=64", "zero.stage=0", "model.cutoff=6")
    _, card, batch = opened(settings, tmp_path)
    module = LossModule(Potential(card.config, card.references), settings.loss).train()
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [getattr(part, name) for part in (batch.systems, batch.targets) for name in part.__slots__]
    saved, loss = saved_bytes(lambda: module(batch.systems, batch.targets, COUNTS, 1)[0], tensors)
    timeline = follow_step(settings, card, 1, Load.of(batch), compiled=has_compiled_kernels())
    last = np.flatnonzero(timeline.phase == "forward")[-1]
    assert loss.requires_grad
    assert timeline.live["activations"][last] == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        ["zero.stage=0"],
        ["zero.stage=0", "batch.accumulation=2"],
        ["zero.stage=1"],
        ["zero.stage=1", "precision=bf16"],
        ["zero.stage=2", "batch.accumulation=2"],
        ["zero.stage=2", "zero.offload_optimizer=cpu"],
        ["zero.stage=3"],
        ["zero.stage=3", "precision=bf16"],
        ["zero.stage=3", "ema.decay=0"],
        ["zero.stage=3", "zero.offload_optimizer=cpu"],
        ["zero.stage=3", "zero.offload_parameters=cpu"],
        ["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_parameters=cpu", "precision=bf16"],
    ],
    ids="-".join,
)
def test_what_deepspeed_holds_in_a_step_is_what_is_followed(
    recipe: Callable[..., Recipe], world: World, tmp_path: Path, changes: list[str]
) -> None:
    settings = recipe("model.width=192", "batch.structures=2", "model.messages=fast", *changes)
    run, card, batch = opened(settings, tmp_path)
    tracker = Tracker("cpu")
    with tracker:
        parts = assemble(settings, run, world)
        n = settings.batch.accumulation
        for step in range(2):  # the optimizer's moments are there from the second on
            with tracker.phase(f"gradients {step}"):
                parts.engine.module.train()
                for number in range(n):
                    parts.engine.forward_backward(
                        batch.systems, batch.targets, COUNTS, 1, last=number == n - 1
                    )
            with tracker.phase(f"update {step}"):
                parts.engine.step(1e-3)
                parts.ema.update(step + 1)
            if not step:
                with tracker.making("checkpoint"):
                    parts.checkpoints.begin(TrainerState(step=1), parts.engine, parts.ema)
                assert parts.checkpoints.settle() is None
    real = tracker.timeline()
    ours = follow_step(settings, card, 1, Load.of(batch), compiled=has_compiled_kernels())
    followed = max(sum(ours.peak(phase).values()) for phase in ("forward", "backward", "reduce"))
    assert followed == pytest.approx(sum(real.peak("gradients 1").values()), rel=0.05)
    assert sum(ours.peak("update").values()) == pytest.approx(sum(real.peak("update 1").values()), rel=0.05)
