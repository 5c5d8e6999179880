"""A model is made, trained and exported without being whole anywhere, whatever its size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from equipot.model.bundle import load_potential
from equipot.train.assemble import assemble, make_potential
from equipot.train.checkpoint import read_weights
from equipot.train.engine import Engine
from equipot.train.export import export_runs
from equipot.train.loss import LossModule
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.scratch import nvme_problem
from equipot.train.world import World


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_initial_weights_are_those_of_the_seed_at_every_stage(
    recipe: Callable[..., Recipe], world: World, tmp_path: Path, precision: str
) -> None:
    lowest = 1 if precision == "bf16" else 0
    found = []
    for stage in (lowest, 3):
        settings = recipe(f"zero.stage={stage}", f"precision={precision}")
        run = RunDirectory(tmp_path / f"{stage}")
        prepare(settings, run, resume=False)
        parts = assemble(settings, run, world)
        found.append({one.name: one.values.clone() for one in parts.engine.fragments()})
    one, other = found
    assert one.keys() == other.keys()
    for name, values in one.items():
        # at stage 3 DeepSpeed makes the fp32 weights from the rounded ones, at the others it does, too
        assert torch.equal(values, other[name]), name
    assert sum(values.norm() for name, values in one.items() if name.endswith("messages.down.weight")) > 1


def test_at_stage_3_no_two_modules_are_ever_whole(
    recipe: Callable[..., Recipe], world: World, tmp_path: Path
) -> None:
    settings, run = recipe("zero.stage=3", "model.width=64"), RunDirectory(tmp_path / "run")
    prepare(settings, run, resume=False)
    module = LossModule(make_potential(settings, RunCard.read(run.card)), settings.loss, two_passes=True)
    whole = max(parameter.numel() for parameter in module.parameters())
    drawn = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, values in module.draw_parameters(torch.Generator().manual_seed(1)):
            yield name, values
            drawn.append(name)
            held = sum(parameter.numel() for parameter in module.parameters() if not parameter.is_meta)
            assert held <= whole, name

    engine = Engine(module, settings, world, fresh=watched())
    assert sorted(drawn) == sorted(place.name for place in engine.places())


def test_without_an_average_nothing_is_held_for_it(
    train: Callable[..., Path], tmp_path: Path, weights: Callable[..., dict[str, torch.Tensor]]
) -> None:
    run = train(tmp_path / "run", "ema.decay=0", "checkpoint.every_steps=3", "optimizer.steps=3")
    (share,) = (run / "checkpoints" / "step-00000003").glob("share-*")
    with safe_open(share, framework="pt") as file:
        assert {key.partition("/")[0] for key in file.keys()} == {"weights", "exp_avg", "exp_avg_sq", "rng"}  # noqa: SIM118
    last = weights(run)
    for name, tensor in weights(run, "ema").items():
        assert torch.equal(tensor, last[name])
    export_runs([run], tmp_path / "bundle", name="tiny")
    bundle, card = load_potential(tmp_path / "bundle")
    for name, tensor in bundle.state_dict().items():
        assert torch.equal(tensor, last[f"potential.{name}"])
    assert card.provenance["weights"] == "last"
    # an average may begin later, from the weights as they are then, and end again
    train(run, "ema.decay=0.5", "checkpoint.every_steps=1", "optimizer.steps=5", resume=True)
    averaged, newest = weights(run, "ema"), weights(run)
    assert any(not torch.equal(tensor, newest[name]) for name, tensor in averaged.items())
    train(run, "ema.decay=0", "optimizer.steps=6", resume=True)
    assert torch.equal(*(next(iter(weights(run, kind).values())) for kind in ("ema", "weights")))


def test_an_export_without_a_test_has_the_same_weights(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    export_runs([run], tmp_path / "bundle", name="tiny", test=False)
    potential, written = load_potential(tmp_path / "bundle")
    assert written.metrics == {}
    (path,) = (run / "checkpoints").glob(written.provenance["checkpoint"])
    expected = dict(read_weights(path, "ema"))
    for name, tensor in potential.state_dict().items():
        assert torch.equal(tensor, expected[f"potential.{name}"])


@pytest.mark.slow
@pytest.mark.timeout(3600)  # DeepSpeed builds an extension first
def test_a_hundred_million_parameters_from_training_to_serving(tmp_path: Path) -> None:
    problem = nvme_problem()
    if problem is not None:
        pytest.skip(f"offloading to NVMe is {problem[0]}")
    program = Path(__file__).parents[3] / "benchmarks" / "giant.py"
    words = ["--width", "2560", "--scratch", str(tmp_path), "--out", str(tmp_path / "report.json")]
    done = subprocess.run([sys.executable, str(program), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]  # it compares what is served with what was trained
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"] > 100_000_000
    assert set(report["phases"]) == {"train", "resume", "export", "serve", "serve by 2 ranks"}
    # a billion parameters in 12 GiB, of which processes and libraries are 1
    bound = 1 + 11 * report["parameters"] / 1e9
    # What a server keeps for its largest batches does not become less with the model.
    of_servers = 3.0 + 4 * report["parameters"] / 2**30
    for name, phase in report["phases"].items():
        assert phase["peak_pss_gib"] < (of_servers if name.startswith("serve") else bound), name
