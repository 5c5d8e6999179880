"""The learning rate by step: linear warm-up, then half a cosine (Loshchilov & Hutter, arXiv 1608.03983)."""

from __future__ import annotations

import math

from equipot.train.recipe import OptimizerSection


def learning_rate(step: int, total: int, settings: OptimizerSection) -> float:
    """The rate for the update that is number `step` from 0, out of `total`.

    Args:
        step: updates made before.
        total: length of training.
        settings: peak, warm-up, fraction at the end.
    """
    length = max(1, total - 1 - settings.warmup_steps)
    progress = min(1.0, max(0, step - settings.warmup_steps) / length)
    fraction = settings.final_fraction
    rate = settings.learning_rate * (fraction + (1 - fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
    ramp = (step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0
    return rate * min(1.0, ramp)


def total_steps(settings: OptimizerSection, steps_per_epoch: int) -> int:
    """Length of training in steps: what ends first of epochs and steps."""
    lengths = [] if settings.steps is None else [settings.steps]
    if settings.epochs is not None:
        lengths.append(settings.epochs * steps_per_epoch)
    return min(lengths)
