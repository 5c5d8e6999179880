"""However the work is divided - ranks, ZeRO stages, micro-batches, recomputation - training is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.train.training.conftest import MadeOnce

from equipot.train.metrics import Row, read_rows

DIRECT = 'model.forces="direct"'
# name: changes to the recipe. All but bf16 must give what one rank without ZeRO gives.
DIVIDED = {
    "conservative-0": ["zero.stage=0"],
    "conservative-1-stress": ["zero.stage=1", "loss.stress=100"],
    "conservative-1-checkpointed": ["zero.stage=1", "activation_checkpointing=true"],
    "conservative-2-accumulated": ["zero.stage=2", "batch.accumulation=2"],
    "conservative-3": ["zero.stage=3"],
    "conservative-3-checkpointed": ["zero.stage=3", "activation_checkpointing=true"],
    "conservative-3-stress-accumulated": ["zero.stage=3", "loss.stress=100", "batch.accumulation=2"],
    "conservative-0-limited": ["zero.stage=0", "batch.max_edges=200"],
    "conservative-2-limited": ["zero.stage=2", "batch.max_edges=200"],
    "conservative-3-limited": ["zero.stage=3", "batch.max_edges=200"],
    "direct-3-accumulated": ["zero.stage=3", "batch.accumulation=2", DIRECT],
    "direct-3-checkpointed": ["zero.stage=3", "activation_checkpointing=true", DIRECT],
    "bf16-1": ["zero.stage=1", "precision=bf16"],
    "bf16-2": ["zero.stage=2", "precision=bf16"],
    "bf16-3": ["zero.stage=3", "precision=bf16"],
}
EXACT = [name for name in DIVIDED if not name.startswith("bf16")]


@pytest.fixture(scope="module")
def two_ranks(recipe_file: Path, made_once: MadeOnce) -> dict[str, Path]:
    """Runs of two ranks under torchrun, by name; one launch, because launching is what takes time."""

    def fill(home: Path) -> None:
        launch_all(recipe_file, {name: home / name for name in DIVIDED})

    home = made_once("two-ranks", fill)
    return {name: home / name for name in DIVIDED}


def launch_all(recipe_file: Path, runs: dict[str, Path]) -> None:
    jobs = json.dumps([(str(run), DIVIDED[name]) for name, run in runs.items()])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    program = str(Path(__file__).with_name("ranks_program.py"))
    done = subprocess.run(
        [*torchrun, program, str(recipe_file), jobs], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def one_rank(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same training undivided: one rank, ZeRO stage 0, one micro-batch, fp32."""
    home = tmp_path_factory.mktemp("one-rank")

    def run(name: str) -> Path:
        physics = [change for change in DIVIDED[name] if change.startswith(("model", "loss"))]
        out = home / ("-".join(physics).replace('"', "") or "plain")
        return out if out.exists() else train(out, "zero.stage=0", *physics)

    return run


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_equal_one(
    name: str,
    two_ranks: dict[str, Path],
    one_rank: Callable[[str], Path],
    weights: Callable[..., dict[str, torch.Tensor]],
) -> None:
    divided, whole = two_ranks[name], one_rank(name)
    steps = zip(read_rows(divided / "metrics.csv"), read_rows(whole / "metrics.csv"), strict=True)
    for mine, theirs in steps:
        for column in ("loss", "gradient_norm", "validation_loss", "energy_loss", "forces_loss"):
            found, expected = getattr(mine, column), getattr(theirs, column)
            assert found == (expected and pytest.approx(expected, rel=2e-4)), (column, mine, theirs)
    for kind in ("weights", "ema"):
        reference = weights(whole, kind)
        gathered = weights(divided, kind)
        assert gathered.keys() == reference.keys()
        for key, tensor in gathered.items():
            # AdamW turns a gradient of nothing but rounding into a step of the full learning rate, so a few
            # weights may differ by more than rounding; none by more than a fraction of what was learnt.
            difference = (tensor - reference[key]).abs()
            assert difference.mean() < 2e-6, key
            assert difference.max() < 5e-4, key


@pytest.mark.parametrize("name", [name for name in DIVIDED if name.startswith("bf16")])
def test_bf16_follows_fp32(name: str, two_ranks: dict[str, Path], one_rank: Callable[[str], Path]) -> None:
    mine, theirs = read_rows(two_ranks[name] / "metrics.csv"), read_rows(one_rank(name) / "metrics.csv")
    assert _losses(mine) == pytest.approx(_losses(theirs), rel=0.05)
    # ... and is not fp32 by another name
    assert _losses(mine) != pytest.approx(_losses(theirs), rel=1e-6)


def _losses(rows: list[Row]) -> list[float]:
    return [row.loss for row in rows if row.loss is not None]
