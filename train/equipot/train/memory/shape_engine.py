"""What DeepSpeed holds on one rank while it trains, as tensors without numbers. Knows no model.

Written down from DeepSpeed 0.19's stages as `equipot.train.engine` configures them, and compared with what
they really allocate in the tests. With P parameters, N ranks and numbers of b bytes (4, or 2 in bf16):

    stage   always                                     while gradients are made            in the update
    0       4P weights, 8P moments                     4P gradients, 4P flat to reduce
    1, 2    bP weights, 4P/N master, 8P/N moments      bP gradients (2: none), a bucket    2 bP/N and, if
    3       bP/N weights, 4P/N master, 8P/N moments,   gathered weights, a bucket's copy   b = 2, 4P/N
            bP/N gradients, a bucket

and 4P/N for the moving average, if one is kept. An optimizer in the host's memory has 4P/N gradients of its
own, and at stages 1 and 2 a copy of its part of them. Of one in files there are the buffers through which the
largest weight passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from equipot.train.memory.trace import Tracker
from equipot.train.recipe import LARGEST_BUCKET, MOST_GATHERED, Recipe

FILE_BUFFERS = 4
"""DeepSpeed's own number: master weights, two moments and gradients of one group at a time."""


@dataclass(frozen=True, slots=True)
class Division:
    """How a model is divided among ranks."""

    stage: int
    ranks: int
    bytes_per_number: int
    """of weights and gradients; master weights and moments have 4"""
    offloaded: Literal["none", "cpu", "nvme"]
    """where DeepSpeed keeps master weights and moments: with the device, in the host's memory, in files"""
    parameters_offloaded: bool
    """whether it keeps the divided weights in the host's memory (stage 3)"""
    averaged: bool
    """whether a moving average is kept"""
    copied: bool
    """whether checkpoints are written from a copy, whose buffers stay"""

    @staticmethod
    def of(recipe: Recipe, ranks: int) -> Division:
        """What a recipe says."""
        return Division(
            stage=recipe.zero.stage,
            ranks=ranks,
            bytes_per_number=2 if recipe.precision == "bf16" else 4,
            offloaded=recipe.zero.offload_optimizer,
            parameters_offloaded=recipe.zero.offload_parameters != "none",
            averaged=recipe.ema.decay > 0,
            copied=recipe.checkpoint.asynchronous,
        )

    def share(self, elements: int) -> int:
        """One rank's part, where a part is made."""
        return -(-elements // self.ranks)


class ShapeEngine:
    """Holds, under a tracker, what a rank's engine and moving average would; the module is on meta."""

    def __init__(self, module: nn.Module, division: Division, tracker: Tracker) -> None:
        self._division = division
        self._tracker = tracker
        self._parameters = list(module.parameters())
        self._elements = sum(parameter.numel() for parameter in self._parameters)
        self._bucket_size = max(1024, min(self._elements, LARGEST_BUCKET))
        self._bucket: Tensor | None = None
        self._in_bucket = 0
        self._reduced: Tensor | None = None
        """this rank's gradients after communication, stages 1 and 2"""
        self._accumulated: Tensor | None = None
        whole, share = self._elements, division.share(self._elements)
        number = division.bytes_per_number
        own = whole if division.stage == 0 else share
        largest = max(parameter.numel() for parameter in self._parameters)
        self._held = [self._new("weights", share if division.stage == 3 else whole, number)]
        if division.offloaded != "nvme":
            self._held.append(self._new("optimizer", 2 * own, 4))
            if division.stage > 0:
                self._held.append(self._new("master weights", share, 4))
        else:
            group = division.share(largest)
            self._held.append(self._new("offloading", FILE_BUFFERS * group, 4))
        if division.offloaded == "cpu":
            self._held.append(self._new("gradients", share, 4))
            if division.stage < 3:
                self._held.append(self._new("communication", share + 2 * largest, number))
        if division.stage == 3:
            self._held.append(self._new("gradients", share, number))
            self._bucket = self._new("communication", self._bucket_size, 4)
        if division.averaged:
            self._held.append(self._new("moving average", share, 4))
        if division.copied:
            self._held.append(self._new("checkpoint", (3 + division.averaged) * share, 4))
        for parameter in self._parameters:
            tracker.ignore(parameter)
            parameter.register_post_accumulate_grad_hook(self._took_gradient)  # type: ignore[no-untyped-call]

    def forward_backward(self, compute_loss: Callable[[], Tensor], *, last: bool) -> None:
        """One micro-batch."""
        division, tracker = self._division, self._tracker
        gathered: Tensor | None = None
        if division.stage == 3 and division.ranks > 1:
            # What is gathered stays, up to a bound, until the backward pass ends.
            gathered = self._new(
                "gathered weights", min(self._elements, MOST_GATHERED), division.bytes_per_number
            )
        with tracker.making("activations"):
            with tracker.phase("forward"):
                loss = compute_loss()
            with tracker.phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
        del loss, gathered
        with tracker.phase("reduce"):
            if division.stage == 0 and last:
                flat = self._new("communication", self._elements, 4)
                del flat
            elif division.stage == 1 and last:
                for parameter in self._parameters:
                    self._into_bucket(parameter)
            if division.stage >= 2 or (division.stage == 1 and last):
                self._reduce()
                if self._accumulated is None:
                    self._accumulated = self._reduced
                self._reduced = None
                if division.stage < 3:
                    self._bucket = None

    def step(self) -> None:
        """The update of the weights."""
        division = self._division
        with self._tracker.phase("update"):
            share = division.share(self._elements)
            if division.stage > 0 and division.offloaded == "none":
                flat = self._new("gradients", share, division.bytes_per_number)
                wide = self._new("gradients", share, 4) if division.bytes_per_number < 4 else None
                del flat, wide
            self._tracker.add_work(0.0, 7.0 * 4 * (self._elements if division.stage == 0 else share))
            self._reduced = self._accumulated = None
            for parameter in self._parameters:
                parameter.grad = None
            if division.averaged:
                self._tracker.add_work(0.0, 3.0 * 4 * share)

    def _new(self, kind: str, elements: int, number: int) -> Tensor:
        with self._tracker.making(kind):
            return torch.empty(elements * number, dtype=torch.uint8, device="meta")

    def _took_gradient(self, parameter: Tensor) -> None:
        division = self._division
        if parameter.grad is None:
            return
        self._tracker.call_it(parameter.grad, "gradients")
        if division.stage in (1, 2) and self._bucket is None:
            self._bucket = self._new("communication", self._bucket_size, division.bytes_per_number)
        if division.stage >= 2:
            self._into_bucket(parameter)

    def _into_bucket(self, parameter: Tensor) -> None:
        if self._in_bucket + parameter.numel() > self._bucket_size:
            self._reduce()
        self._in_bucket += parameter.numel()
        parameter.grad = None  # in the bucket by now, or itself the bucket where it is larger than that

    def _reduce(self) -> None:
        division, numbers = self._division, self._in_bucket
        wide = self._new("communication", numbers, 4) if division.bytes_per_number < 4 else None
        flat: Tensor | None = None
        if division.stage == 3:
            flat = self._new("communication", numbers, 4)
        elif division.ranks > 1:  # alone, the bucket is one slice, which is flat already
            flat = self._new("communication", numbers, division.bytes_per_number)
        self._tracker.add_work(0.0, 4.0 * numbers * division.bytes_per_number)
        self._in_bucket = 0
        del flat, wide
        if division.stage in (1, 2) and self._reduced is None and division.offloaded == "none":
            share = division.share(self._elements)
            self._reduced = self._new("gradients", share, division.bytes_per_number)
