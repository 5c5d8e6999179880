"""Follows a training step of a recipe without computing it: bytes alive and work done, moment by moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from equipot.model import kernels
from equipot.model.messages import LEAST
from equipot.train.assemble import make_potential
from equipot.train.loss import Counts, LossModule
from equipot.train.memory.shape_engine import Division, ShapeEngine
from equipot.train.memory.shape_sweeps import ShapeSweeps
from equipot.train.memory.trace import Timeline, Tracker
from equipot.train.memory.workload import Load
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard


def shape_module(recipe: Recipe, card: RunCard) -> LossModule:
    """The recipe's network and loss on the meta device, in its dtype."""
    module = LossModule(make_potential(recipe, card), recipe.loss, two_passes=recipe.zero.stage == 3).to(
        "meta"
    )
    return module.to(torch.bfloat16) if recipe.precision == "bf16" else module


def follow_step(recipe: Recipe, card: RunCard, ranks: int, load: Load, *, compiled: bool) -> Timeline:
    """One rank's step, after a checkpoint.

    Args:
        recipe: what is trained, and how.
        card: of the run that the recipe would make of its data.
        ranks: among which it is divided.
        load: every micro-batch.
        compiled: whether messages are computed by the compiled kernels.
    """
    tracker = Tracker("meta")
    module = shape_module(recipe, card).train()
    division = Division.of(recipe, ranks)
    systems, targets = load.shapes()

    def loss() -> Tensor:
        total: Tensor = module(systems, targets, Counts(1.0, 1.0, 1.0), ranks)[0]
        return total

    with _sweeps(tracker, compiled=compiled), tracker:
        tracker.ignore_all((*vars_of(systems), *vars_of(targets), *module.buffers()))
        with tracker.making("weights"):
            engine = ShapeEngine(module, division, tracker)
        n = recipe.batch.accumulation
        for number in range(min(n, 2)):
            engine.forward_backward(loss, last=number == min(n, 2) - 1)
        engine.step()
    return tracker.timeline()


def vars_of(batch: object) -> Iterator[Tensor]:
    """The tensors of a batch's slots."""
    for name in type(batch).__slots__:  # type: ignore[attr-defined]
        yield getattr(batch, name)


@contextmanager
def _sweeps(tracker: Tracker, *, compiled: bool) -> Iterator[None]:
    # Which structures go by blocks is decided by what computes them there, not by the meta device.
    before = LEAST.torch
    LEAST.torch = LEAST.compiled if compiled else before
    try:
        with kernels.on_meta(ShapeSweeps(tracker)):
            yield
    finally:
        LEAST.torch = before
