"""The controls of the scaling study: what they keep and what they break, what they cost, where they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms

from equipot.model.batch import Graph, System, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.errors import ModelError
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.model.testing import (
    Check,
    check_batch_equals_single,
    check_cutoff,
    check_forces_are_gradient,
    check_isolated_atoms,
    check_lattice_vector_move,
    check_permutation,
    check_rotation,
    check_supercell,
    check_translation,
)
from equipot.train.errors import TrainError
from equipot.train.export import export_runs
from equipot.train.recipe import Recipe, RecipeError, check_combination
from equipot.train.scaling.controls.names import ARCHITECTURES
from equipot.train.scaling.controls.registry import register
from equipot.train.scaling.smoothing import similarity_by_layer

SYMMETRIES: list[Check] = [check_rotation, check_translation, check_permutation, check_supercell]
SYMMETRIES += [check_lattice_vector_move, check_batch_equals_single, check_isolated_atoms]


@pytest.fixture(scope="module")
def graphs() -> list[Graph]:
    cell = [(2.6, 0, 0), (2.2, 2.1, 0), (-1.9, 0.8, 2.4)]
    skewed = Atoms("CO", [(0.1, 0.2, 0.3), (1.2, 0.9, 1.0)], cell=cell, pbc=True)
    found = []
    for seed, atoms in enumerate([ase.build.molecule("CH3CH2OH"), skewed, ase.build.molecule("H2O")]):
        atoms.rattle(0.05, seed=seed)
        found.append(build_graph(System(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc), 3.5))
    return found


def make(**fields: object) -> Potential:
    register()
    config = ModelConfig.from_json(
        {"width": 16, "layers": 2, "radial": 6, "cutoff": 3.5, "elements": (1, 6, 8), "mean_neighbors": 9.0}
        | {"levels_of_theory": ("PBE",)}
        | fields
    )
    torch.manual_seed(0)
    model = Potential(config, References(energy=np.zeros((1, 3)), scale=np.ones(1))).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head.down" in name:
                parameter.mul_(10.0)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_keep_all_symmetries(architecture: str, graphs: list[Graph]) -> None:
    checks = [*SYMMETRIES, check_forces_are_gradient]
    if architecture != "gat":  # its softmax knows no envelope
        checks.append(check_cutoff)
    for check in checks:
        check(make(architecture=architecture), graphs)
    for check in SYMMETRIES:
        check(make(architecture=architecture, forces="direct"), graphs)


@pytest.mark.parametrize(
    "fields", [{"inputs": "raw", "forces": "direct"}, {"forces": "invariant"}], ids=["raw", "invariant"]
)
def test_what_the_paper_did_breaks_rotations(fields: dict[str, str], graphs: list[Graph]) -> None:
    model = make(**fields)
    check_permutation(model, graphs)
    check_batch_equals_single(model, graphs)
    with pytest.raises(AssertionError, match="rotation"):
        check_rotation(model, graphs)


@pytest.mark.parametrize(
    "changes",
    [
        ['model.architecture="transformer"'],
        ['model.architecture="gcn"', "zero.stage=2"],
        ['model.architecture="gat"', "activation_checkpointing=true"],
        ['model.inputs="raw"', 'model.forces="invariant"', "model.residual=false"],
    ],
    ids=lambda changes: changes[0],
)
def test_controls_train_and_are_not_exported(
    train: Callable[..., Path], tmp_path: Path, changes: list[str]
) -> None:
    run = train(tmp_path / "run", "optimizer.steps=2", *changes)
    with pytest.raises(TrainError, match="control of the scaling study"):
        export_runs([run], tmp_path / "bundle", name="control")
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_go_together_is_refused(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r'"gcn" cannot be combined with zero\.stage = 3'):
        check_combination(recipe('model.architecture="gcn"', "zero.stage=3"), 1)
    with pytest.raises(RecipeError, match='"raw" needs forces'):
        recipe('model.inputs="raw"')
    with pytest.raises(RecipeError, match="orders of evaluation of the egnn"):
        recipe('model.architecture="moments"', 'model.messages="lean"')
    with pytest.raises(ModelError, match="derivatives by edges"):
        make(inputs="raw")


@pytest.mark.parametrize("architecture", ["egnn", "moments", "transformer"])
def test_similarity_is_the_mean_cosine_of_pairs(architecture: str, graphs: list[Graph]) -> None:
    model = make(architecture=architecture)
    batches = [collate(graphs[:2], dtype=torch.float64), collate(graphs[2:], dtype=torch.float64)]
    found = similarity_by_layer(model, batches)
    assert len(found) == model.config.layers + 1
    expected = []
    for graph in graphs:
        known = model.embedding.elements(torch.tensor(graph.system.atomic_numbers))
        h = model.embedding.element(known).detach()
        cosine = torch.nn.functional.cosine_similarity(h[:, None], h[None], dim=-1)
        n = len(h)
        expected.append(float((cosine.sum() - n) / (n * (n - 1))))
    assert found[0] == pytest.approx(np.mean(expected))
    assert found == pytest.approx(similarity_by_layer(model, [collate(graphs, dtype=torch.float64)]))
    assert all(-1.0 <= value <= 1.0 for value in found)


def test_deep_stacks_without_residuals_make_atoms_alike(graphs: list[Graph]) -> None:
    batch = collate(graphs, dtype=torch.float64)
    fields = {"architecture": "gcn", "layers": 8, "normalisation": "none"}
    bare = similarity_by_layer(make(residual=False, **fields), [batch])
    rescued = similarity_by_layer(make(residual="initial", **fields), [batch])
    assert bare[-1] > 0.99
    assert rescued[-1] < bare[-1] - 0.02
