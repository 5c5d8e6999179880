"""Two small models of the demo's real data, trained apart in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from equipot.train.importer import ImportOptions, import_files
from equipot.train.recipe import load_recipe
from equipot.train.worker import Job, StopRequest, work

DATA = Path(__file__).parents[3] / "examples" / "data" / "ethanol-methanol.extxyz"
RECIPE = """
seed = 1
[data]
stores = ["{store}"]
fractions = [0.4, 0.3, 0.3]
[model]
width = 12
layers = 2
radial = 6
cutoff = 3.0
[batch]
structures = 16
workers = 0
[optimizer]
steps = 60
warmup_steps = 10
learning_rate = 1e-2
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of two runs that differ in their seed alone, and of one on another split."""
    home = tmp_path_factory.mktemp("spread")
    options = ImportOptions(level_of_theory="PBE", licence="MIT", name="alcohols", group_by="block:10")
    import_files([DATA], home / "store", options)
    recipe = home / "recipe.toml"
    recipe.write_text(RECIPE.format(store=home / "store"))
    found = []
    for number, changes in enumerate((["seed=1"], ["seed=2"], ["data.seed=5", "optimizer.steps=1"])):
        work(
            Job(recipe=load_recipe(recipe, changes), out=home / f"run-{number}", resume=False), StopRequest()
        )
        found.append(home / f"run-{number}")
    return found
