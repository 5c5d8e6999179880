"""An exponential moving average of the fp32 weights, divided among the ranks as the weights are."""

from __future__ import annotations

import contextlib

import torch

from equipot.train.engine import Engine, Reader


class Ema:
    """Average ← decay · average + (1 − decay) · weights after each step; early steps count for more.

    The effective decay of step t is min(decay, (1 + t) / (10 + t)), so that the random initial weights are
    soon forgotten (Karras et al., arXiv 2312.02696, discuss why averages should adapt to the length so far).
    With a decay of 0 there is no average and nothing is held: the weights themselves are taken for it.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self.parts: list[torch.Tensor] = []
        """This rank's share: one flat fp32 tensor per parameter, as :meth:`Engine.fragments` gives them."""
        if self.is_kept:
            self.parts = [fragment.values.clone() for fragment in engine.fragments()]

    @property
    def is_kept(self) -> bool:
        """Whether there is an average."""
        return self._decay > 0

    def swapped_in(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the engine's module has the average for its weights."""
        return self._engine.swapped(self.parts) if self.is_kept else contextlib.nullcontext()

    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 1."""
        if not self.is_kept:
            return
        weight = 1.0 - min(self._decay, (1.0 + step) / (10.0 + step))
        weights = [fragment.values for fragment in self._engine.fragments()]
        if weights:
            torch._foreach_lerp_(self.parts, weights, weight)

    def load(self, read: Reader) -> None:
        """Take up an average that was saved by a run divided in whatever way; `read` gives any part of it."""
        if not self.is_kept:
            return
        for mine, place in zip(self.parts, self._engine.places(), strict=True):
            mine.copy_(read("ema", place.name, place.offset, place.length))
