"""Runs on a mix: what is drawn, the same results on resuming, errors by source, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms

from equipot.train.assemble import assemble
from equipot.train.checkpoint import committed_paths
from equipot.train.errors import TrainError
from equipot.train.export import export_runs
from equipot.train.importer import ImportOptions, import_files
from equipot.train.mix import Mix
from equipot.train.mix_build import build_mix
from equipot.train.mix_request import parse_request
from equipot.train.places import in_blocks
from equipot.train.prepare import prepare
from equipot.train.recipe import RecipeError, load_recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.worker import Job, StopRequest, work
from equipot.train.world import World

Start = Callable[..., "subprocess.Popen[str]"]
Weights = Callable[..., dict[str, torch.Tensor]]

RECIPE = """
seed = 3
[data]
mix = "{mix}"
subset = {subset}
[model]
width = 16
layers = 2
radial = 8
cutoff = 4.0
[batch]
structures = 8
[optimizer]
steps = 6
warmup_steps = 2
[checkpoint]
every_steps = 3
keep = 3
"""


@pytest.fixture(scope="module")
def mix(frames: list[Atoms], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of different levels of theory; one is seen twice, the other every second time."""
    home = tmp_path_factory.mktemp("mixed")
    sources: dict[str, dict[str, object]] = {}
    for name, part, weight in (("clusters", frames[:36], 2.0), ("more", frames[36:], 0.5)):
        ase.io.write(home / f"{name}.extxyz", part)
        options = ImportOptions(level_of_theory=f"EMT {name}", licence="CC0-1.0", name=name, group_by="frame")
        import_files([home / f"{name}.extxyz"], home / name, options)
        sources[name] = {"store": home / name, "weight": weight}
    return build_mix(
        parse_request({"fractions": (0.7, 0.15, 0.15), "sources": sources}, "test"), home / "mix"
    ).path


@pytest.fixture(scope="module")
def write_recipe(mix: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A recipe on the mix: `write_recipe(subset=0.5)`."""

    def write(place: Path = mix, subset: float | str = 1.0) -> Path:
        path = tmp_path_factory.mktemp("recipe") / "mix.toml"
        path.write_text(RECIPE.format(mix=place, subset=json.dumps(subset)))
        return path

    return write


@pytest.fixture(scope="module")
def trained(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    work(Job(recipe=load_recipe(write_recipe()), out=run, resume=False), StopRequest())
    return run


def drop_last(run: Path) -> None:
    newest = committed_paths(run / "checkpoints")[0]
    assert newest.name == "step-00000006"
    shutil.rmtree(newest)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_run_on_a_mix_resumes_to_the_same_weights(
    trained: Path, write_recipe: Callable[..., Path], tmp_path: Path, weights: Weights
) -> None:
    again = Path(shutil.copytree(trained, tmp_path / "run"))
    drop_last(again)
    work(Job(recipe=load_recipe(write_recipe()), out=again, resume=True), StopRequest())
    for kind in ("weights", "ema"):
        assert same(weights(again, kind), weights(trained, kind))
    assert not (trained / "mix").exists()  # the run refers to the mix, it has none of its own


def test_two_ranks_on_a_mix_resume_to_the_same_weights(
    write_recipe: Callable[..., Path], equipot: Start, tmp_path: Path, weights: Weights
) -> None:
    run, recipe = tmp_path / "run", write_recipe(subset=0.8)
    for resume in ((), ("--resume",)):
        process = equipot("train", recipe, "--ranks", 2, "--out", run, *resume)
        said, _ = process.communicate(timeout=250)
        assert process.returncode == 0, said
        if not resume:
            whole = weights(run)
            drop_last(run)
    assert same(weights(run), whole)


def test_an_epoch_draws_by_weight_and_by_subset(
    mix: Path, write_recipe: Callable[..., Path], world: World, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    recipe = load_recipe(write_recipe(subset=0.5))
    prepare(recipe, run, resume=False)
    parts = assemble(recipe, run, world)
    opened = Mix.open(mix)
    once, drawn = opened.training(0.5)
    batches = [parts.sampler.global_batch(step) for step in range(parts.sampler.steps_per_epoch)]
    rows = np.concatenate(batches)
    assert len(rows) == len(set(rows.tolist())) == len(drawn) // 8 * 8
    seen = drawn[rows]
    allowed = {tuple(pair) for block in in_blocks(once) for pair in block.tolist()}
    assert {tuple(pair) for pair in seen.tolist()} <= allowed
    pairs, counts = np.unique(seen, axis=0, return_counts=True)
    assert counts[pairs[:, 0] == 0].max() == 2
    assert counts[pairs[:, 0] == 1].max() == 1
    card = RunCard.read(run.card)
    assert card.mix.draws == len(drawn)
    assert card.mix.sizes["train"] == len(once)


def test_models_of_a_scaling_curve_differ_in_their_subset_alone(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    cards = []
    for subset in (0.1, 0.5, 1.0):
        run = RunDirectory(tmp_path / f"run{subset}")
        prepare(load_recipe(write_recipe(subset=subset)), run, resume=False)
        cards.append(RunCard.read(run.card))
    for card in cards[:2]:
        assert card.config == cards[2].config
        np.testing.assert_array_equal(card.references.energy, cards[2].references.energy)
        for name in ("validation", "test"):
            assert card.mix.sizes[name] == cards[2].mix.sizes[name] > 0
    assert cards[0].mix.sizes["train"] < cards[1].mix.sizes["train"] < cards[2].mix.sizes["train"]


def test_export_tells_errors_by_source(trained: Path, mix: Path, tmp_path: Path) -> None:
    export_runs([trained], tmp_path / "bundle", checkpoint="last", name="mixed")
    card = json.loads((tmp_path / "bundle" / "model.json").read_text())
    by_source = card["metrics"]["test"]["by_source"]
    counts = {source.name: source.counts["test"].structures for source in Mix.open(mix).card.sources}
    assert {name: errors["structures"] for name, errors in by_source.items()} == counts
    total = sum(counts.values())
    assert card["metrics"]["test"]["structures"] == total
    mean = sum(e["energy_mae_mev_per_atom"] * e["structures"] for e in by_source.values()) / total
    assert card["metrics"]["test"]["energy_mae_mev_per_atom"] == pytest.approx(mean)
    assert card["provenance"]["mix"]["digest"] == Mix.open(mix).card.digest
    assert str(mix) not in json.dumps(card["provenance"]["mix"])


def test_frames_of_a_run_are_those_of_its_mix(
    trained: Path, mix: Path, equipot: Start, tmp_path: Path
) -> None:
    written = []
    for place in (trained, mix):
        out = tmp_path / f"{place.name}.extxyz"
        process = equipot("data", "frames", place, "--split", "validation", "--out", out)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert len(ase.io.read(tmp_path / "run.extxyz", ":")) == len(Mix.open(mix).part("validation"))


def test_a_moved_mix_is_found_and_another_is_refused(
    trained: Path, mix: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = RunDirectory(Path(shutil.copytree(trained, tmp_path / "run")))
    home = Path(shutil.copytree(mix.parent, tmp_path / "elsewhere"))
    prepare(load_recipe(write_recipe(home / "mix")), run, resume=True)
    card = RunCard.read(run.card)
    assert card.mix.path == str(home / "mix")
    assert {Path(store.path).parent for store in card.stores} == {home}
    sources = {"clusters": {"store": home / "clusters"}, "more": {"store": home / "more"}}
    other = build_mix(parse_request({"seed": 8, "sources": sources}, "test"), home / "other")
    with pytest.raises(TrainError, match="is not the mix that the run was begun with"):
        prepare(load_recipe(write_recipe(other.path)), run, resume=True)
    with pytest.raises(TrainError, match=r"--resume with data\.subset = 0\.5"):
        prepare(load_recipe(write_recipe(subset=0.5)), run, resume=True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('mix = "m"\nstores = ["s"]', ["either data.stores", "or data.mix"]),
        ("", ["either data.stores"]),
        ('mix = "m"\nfractions = [0.8, 0.1, 0.1]', ["fractions is the mix's own"]),
        ('mix = "m"\nseed = 1', ["seed is the mix's own"]),
        ('mix = "m"\nsubset = 0', ["data.subset: 0", "a fraction above 0"]),
        ('mix = "m"\nsubset = 1.5', ["data.subset: 1.5"]),
        ('mix = "m"\nsubset = nan', ["data.subset: nan"]),
        ('mix = "m"\nsubset = "12 parsecs"', ["data.subset", "'12 parsecs' is no number of bytes"]),
        ('mix = "m"\nsubset = true', ["data.subset: True"]),
        ('mix = "m"\nsubsets = 0.1', ["unknown key data.subsets", "did you mean data.subset?"]),
        ('stores = ["s"]\nstore_root = "x"', ["store_root is for a mix"]),
    ],
)
def test_mistakes_in_the_data_section(tmp_path: Path, data: str, words: list[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"[data]\n{data}\n[optimizer]\nsteps = 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
