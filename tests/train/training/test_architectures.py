"""Other architectures than the default train in every way of ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_moments_train_alike_at_every_stage(
    train: Callable[..., Path],
    weights: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
    forces: str,
) -> None:
    ends = []
    for stage, again in ((0, "false"), (2, "true"), (3, "false"), (3, "true")):
        changes = [f"zero.stage={stage}", f"activation_checkpointing={again}", f'model.forces="{forces}"']
        out = tmp_path / f"{stage}-{again}"
        ends.append(weights(train(out, 'model.architecture="moments"', "optimizer.steps=3", *changes)))
    for other in ends[1:]:
        assert other.keys() == ends[0].keys()
        for name, tensor in ends[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
