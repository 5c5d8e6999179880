"""A rank of a run that holds next to nothing, to see what a rank takes anyhow: `python -m` this."""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from equipot.train.engine import Engine, start_world
from equipot.train.memory.machine import of_this_process
from equipot.train.recipe import Recipe
from equipot.train.trainer import Trainer


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """A loss that differentiates as a network's does."""
        return (self.map(x).square().sum(),)


def main() -> None:
    """Take a step and print what this process has by then."""
    assert Trainer is not None  # whose imports are what training imports
    recipe = Recipe.model_validate({"data": {"stores": ["none"]}, "optimizer": {"steps": 1}})
    engine = Engine(_Tiny(), recipe, start_world())
    for _ in range(2):
        engine.forward_backward(torch.ones(256, 64), last=True)
        engine.step(1e-3)
    found = of_this_process()
    sys.stdout.write(json.dumps({"own": found.own, "files": found.files}) + "\n")


if __name__ == "__main__":
    main()
