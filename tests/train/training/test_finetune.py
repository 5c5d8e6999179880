"""Fine-tuning: what is taken over of a bundle, what it is worth, what stays as it is, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.io import read, write
from numpy.typing import NDArray

from equipot.model.batch import System, build_graph, collate
from equipot.model.bundle import load_potential, read_card, write_bundle
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.train.checkpoint import committed_paths, read_weights
from equipot.train.errors import TrainError
from equipot.train.export import export_runs
from equipot.train.finetune import nearest_element, with_architecture
from equipot.train.importer import ImportOptions, import_files
from equipot.train.inherit import Inherited
from equipot.train.metrics import read_rows
from equipot.train.recipe import load_recipe
from equipot.train.run_card import RunCard
from equipot.train.worker import Job, StopRequest, work

EXAMPLES = Path(__file__).parents[3] / "examples" / "data" / "ethanol-methanol.extxyz"
RECIPE = """
seed = 5
[data]
stores = ["{store}"]
fractions = [0.7, 0.2, 0.1]
[batch]
structures = 16
workers = 0
[optimizer]
learning_rate = 3e-3
steps = {steps}
warmup_steps = 2
[ema]
decay = 0.9
"""
MODEL = """
[model]
width = 32
layers = 2
radial = 8
cutoff = 4.0
"""


def make_store(home: Path, molecule: str, frames: int, level: str, shift: float = 0.0) -> Path:
    chosen = [atoms for atoms in read(EXAMPLES, ":") if atoms.info["config_type"] == molecule][:frames]
    for atoms in chosen:
        atoms.calc.results["energy"] += shift * len(atoms)
    write(home / f"{molecule}.extxyz", chosen)
    options = ImportOptions(level_of_theory=level, licence="MIT", name=molecule, group_by="frame")
    import_files([home / f"{molecule}.extxyz"], home / "store", options)
    return home / "store"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of ethanol, trained for some epochs and exported."""
    home = tmp_path_factory.mktemp("parent")
    store = make_store(home, "ethanol", 300, "PBE/def2-SVP")
    (home / "recipe.toml").write_text(RECIPE.format(store=store, steps=104) + MODEL)
    work(Job(recipe=load_recipe(home / "recipe.toml"), out=home / "run", resume=False), StopRequest())
    export_runs([home / "run"], home / "bundle", name="ethanol")
    return home / "bundle"


@pytest.fixture(scope="module")
def methanol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few frames of methanol, at another level of theory: 7 eV per atom below."""
    return make_store(tmp_path_factory.mktemp("methanol"), "methanol", 60, "other/level", shift=-7.0)


@pytest.fixture(scope="module")
def recipe_of(methanol: Path, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    home = tmp_path_factory.mktemp("recipes")

    def make(weights: str | None = "all", store: Path = methanol, bundle: Path = parent) -> Path:
        path = home / f"{weights}-{store.parent.name}-{bundle.name}.toml"
        text = RECIPE.format(store=store, steps=10)
        path.write_text(
            text + (MODEL if weights is None else f'[finetune]\nbundle = "{bundle}"\nweights = "{weights}"\n')
        )
        return path

    return make


EVERY_TWO = ["checkpoint.every_steps=2", "checkpoint.keep=9"]


def tune(recipe: Path, out: Path, *changes: str, resume: bool = False) -> Path:
    begun = RunCard.read(out / "recipe.resolved.json").recipe if resume else None
    settings = with_architecture(load_recipe(recipe, changes), begun)
    work(Job(recipe=settings, out=out, resume=resume), StopRequest())
    return out


def validation(run: Path) -> tuple[float, float]:
    last = [row for row in read_rows(run / "metrics.csv") if row.validation_loss is not None][-1]
    assert last.validation_energy_mae_mev_per_atom is not None
    assert last.validation_forces_mae_ev_per_angstrom is not None
    return last.validation_energy_mae_mev_per_atom, last.validation_forces_mae_ev_per_angstrom


def tensors(bundle: Path) -> dict[str, torch.Tensor]:
    potential, _ = load_potential(bundle)
    return dict(potential.state_dict())


def exported(run: Path) -> dict[str, torch.Tensor]:
    shutil.rmtree(run / "bundle", ignore_errors=True)
    export_runs([run], run / "bundle", name="tuned", checkpoint="last")
    return tensors(run / "bundle")


def test_it_is_worth_it(recipe_of: Callable[..., Path], parent: Path, tmp_path: Path) -> None:
    tuned = tune(recipe_of(), tmp_path / "tuned")
    # Not energies: an untrained model's are those of its references, which ten steps hardly improve.
    _, forces = validation(tuned)
    _, scratch_forces = validation(tune(recipe_of(None), tmp_path / "scratch"))
    assert forces < 0.7 * scratch_forces
    exported(tuned)
    card = read_card(tuned / "bundle")
    assert card.config.levels_of_theory == ("other/level",)
    assert card.provenance["parent"] == {
        "name": "ethanol",
        "digest": read_card(parent).digest,
        "weights": "all",
    }


ALONE = [[f"zero.stage={stage}"] for stage in range(4)] + [["zero.stage=2", "precision=bf16"]]


QUICK = (["zero.stage=0"], ["zero.stage=2", "precision=bf16"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, marks=[] if changes in QUICK else pytest.mark.slow, id=" ".join(changes))
        for changes in ALONE
    ],
)
def test_heads_alone_leave_the_rest_as_it_is(
    recipe_of: Callable[..., Path], parent: Path, tmp_path: Path, changes: list[str]
) -> None:
    bundle = Path(shutil.copytree(parent, tmp_path / "bundle"))
    recipe, changes = recipe_of("heads", bundle=bundle), [*changes, "optimizer.steps=4", *EVERY_TWO]
    run = tune(recipe, tmp_path / "run", *changes)
    before, now = tensors(parent), exported(run)
    assert before.keys() == now.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]) != name.startswith("energy_head"), name
    # what is not trained has neither moments nor a place in checkpoints
    moments = [name.removeprefix("potential.") for name in trained(run, "exp_avg")]
    assert moments == [name for name in now if name.startswith("energy_head")]
    # the run goes on when the bundle is gone
    half = Path(shutil.copytree(run, tmp_path / "half"))
    for path in committed_paths(half / "checkpoints")[:-1]:
        shutil.rmtree(path)
    shutil.rmtree(bundle)
    tune(recipe, half, *changes, resume=True)
    assert len(read_rows(half / "metrics.csv")) == len(read_rows(run / "metrics.csv"))
    for kind in ("weights", "ema", "exp_avg_sq"):
        expected = trained(run, kind)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in trained(half, kind).items())


def trained(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return dict(read_weights(committed_paths(run / "checkpoints")[0], kind))


TWO_RANKS = {
    **{f"heads-{stage}": ["finetune.weights=heads", f"zero.stage={stage}"] for stage in range(4)},
    "heads-2-bf16": ["finetune.weights=heads", "zero.stage=2", "precision=bf16"],
    "heads-1-recomputed": ["finetune.weights=heads", "activation_checkpointing=true"],
    **{f"all-{stage}": [f"zero.stage={stage}"] for stage in range(4)},
}


@pytest.fixture(scope="module")
def two_ranks(recipe_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("two-ranks")
    runs = {name: home / name for name in TWO_RANKS}
    jobs = [(str(run), [*TWO_RANKS[name], "optimizer.steps=4"]) for name, run in runs.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    program = str(Path(__file__).with_name("ranks_program.py"))
    command = [*torchrun, program, str(recipe_of()), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_equal_one(
    name: str, two_ranks: dict[str, Path], recipe_of: Callable[..., Path], parent: Path, tmp_path: Path
) -> None:
    weights = name.split("-")[0]
    found = exported(two_ranks[name])
    before = tensors(parent)
    if weights == "heads":
        same = [key for key in before if torch.equal(found[key], before[key])]
        assert same == [key for key in before if not key.startswith("energy_head")]
    if "bf16" in name:
        return
    run = tune(recipe_of(weights), tmp_path / "run", "zero.stage=0", "optimizer.steps=4")
    for mine, theirs in zip(
        read_rows(two_ranks[name] / "metrics.csv"), read_rows(run / "metrics.csv"), strict=True
    ):
        assert mine.loss == (theirs.loss and pytest.approx(theirs.loss, rel=1e-4))
        assert mine.gradient_norm == (theirs.gradient_norm and pytest.approx(theirs.gradient_norm, rel=1e-4))
    for key, tensor in exported(run).items():
        assert torch.allclose(found[key], tensor, atol=1e-4), key


CONFIG = {"width": 8, "layers": 1, "radial": 4, "cutoff": 3.0}


def fabricated(home: Path, **changes: object) -> tuple[Path, Potential]:
    """A bundle of a random model that knows H, C and S, two charges and two levels of theory."""
    torch.manual_seed(1)
    config = ModelConfig(
        **{
            **CONFIG,
            "elements": (1, 6, 16),
            "levels_of_theory": ("A", "B"),
            "charges": (-1, 0),
            "mean_neighbors": 7.0,
            **changes,
        }  # type: ignore[arg-type]
    )
    references = References(
        energy=np.array([[-1.0, -2.0, -3.0], [-10.0, -20.0, -30.0]]), scale=np.array([1.0, 3.0])
    )
    potential = Potential(config, references)
    write_bundle(
        home / "bundle",
        name="fabricated",
        config=config,
        references=references,
        tensors=potential.state_dict().items(),
        provenance={},
        metrics={},
    )
    return home / "bundle", potential.eval()


def child_of(bundle: Path, config: ModelConfig, energy: list[list[float]], scale: list[float]) -> Potential:
    references = References(energy=np.array(energy), scale=np.array(scale))
    child, inherited = Potential(config, references), Inherited(bundle, config, references)
    child.load_state_dict({name: inherited.tensor(name) for name in inherited.names})
    return child.eval()


def predicted(
    potential: Potential, numbers: list[int], level: int, charge: int = 0
) -> tuple[float, NDArray[Any]]:
    """Energy above the references (eV) and forces of a small chain."""
    positions: NDArray[np.float64] = np.arange(3.0 * len(numbers)).reshape(-1, 3) * 1.1 % 2.0
    system = System(
        np.array(numbers),
        positions,
        np.zeros((3, 3)),
        np.zeros(3, bool),
        charge=charge,
        level_of_theory=level,
    )
    cutoff = potential.config.cutoff
    found = potential(collate([build_graph(system, cutoff)], dtype=torch.float32))
    elements = potential.config.elements
    known = sum(potential.references.energy[level, elements.index(z)] for z in numbers)
    assert found.forces is not None
    return float(found.energy) - known, found.forces.numpy()


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_it_begins_as_the_function_of_the_bundle(tmp_path: Path, forces: str) -> None:
    bundle, parent = fabricated(tmp_path, forces=forces)
    # fewer elements and one charge alone, whose embedding is taken into that of the elements; one known level
    # at another scale, and one whose references are nearest to those of A
    config = replace(parent.config, elements=(1, 6), charges=(-1,), levels_of_theory=("B", "C"))
    child = child_of(bundle, config, [[-9.0, -19.0], [-1.5, -2.5]], [2.0, 5.0])
    for mine, theirs in ((0, 1), (1, 0)):
        energy, force = predicted(child, [1, 6, 1], mine, charge=-1)
        expected, expected_force = predicted(parent, [1, 6, 1], theirs, charge=-1)
        assert energy == pytest.approx(expected, rel=1e-4)
        assert force == pytest.approx(expected_force, rel=1e-3, abs=1e-5)


def test_new_elements_and_charges_begin_as_their_likes(tmp_path: Path) -> None:
    bundle, parent = fabricated(tmp_path)
    config = replace(parent.config, elements=(1, 8, 14), charges=(-2, 0, 1), levels_of_theory=("A",))
    child = child_of(bundle, config, [[-1.0, -2.0, -3.0]], [1.0])
    # oxygen as sulfur, silicon as carbon; −2 as −1, +1 as 0
    for charge, like in ((-2, -1), (0, 0), (1, 0)):
        mine, theirs = (
            predicted(child, [8, 1, 14], 0, charge=charge),
            predicted(parent, [16, 1, 6], 0, charge=like),
        )
        assert mine[0] == pytest.approx(theirs[0], rel=1e-4)
    assert [nearest_element(z, (1, 6, 16, 26, 57)) for z in (3, 14, 8, 44, 58, 30)] == [1, 6, 16, 26, 57, 26]


def test_what_cannot_be_is_refused(
    recipe_of: Callable[..., Path], parent: Path, methanol: Path, store: Path, tmp_path: Path
) -> None:
    cases: list[tuple[Path, list[str], str]] = [
        (recipe_of(), ["model.width=64"], r"model\.width = 64 contradicts finetune\.bundle: .* has 32"),
        (recipe_of(), ["model.forces=direct"], r"model\.forces = 'direct' contradicts .* 'conservative'"),
        (recipe_of("heads", store=store), [], r"does not know the element Ni, the element Cu, which"),
        (recipe_of(bundle=methanol), [], r"finetune\.bundle: .*no model\.json"),
        (recipe_of(bundle=tmp_path / "absent"), [], r"finetune\.bundle: .*does not exist"),
        (recipe_of(), ["finetune.wieghts=all"], r"did you mean finetune\.weights\?"),
    ]
    for recipe, changes, message in cases:
        with pytest.raises(TrainError, match=message):
            tune(recipe, tmp_path / "run", *changes)
    damaged = Path(shutil.copytree(parent, tmp_path / "damaged"))
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(TrainError, match="sha256 differs"):
        tune(recipe_of(bundle=damaged), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.resolved.json").exists()


def test_new_elements_are_told_and_learnt(
    recipe_of: Callable[..., Path], store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tune(recipe_of(store=store), tmp_path / "run", "optimizer.steps=2")
    assert "does not know begin as their likes: Ni as O, Cu as O" in " ".join(capfd.readouterr().out.split())
    assert read_rows(run / "metrics.csv")[0].loss is not None
    with pytest.raises(TrainError, match=r"finetune\.weights = 'heads', but the run was begun with 'all'"):
        tune(recipe_of("heads", store=store), run, "model.cutoff=4.0", resume=True)
