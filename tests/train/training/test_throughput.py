"""Operations are those that torch counts, and a run's figures are what they are called."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from equipot.model.batch import System, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.train.dataset import Targets
from equipot.train.flops import training_flops
from equipot.train.importer import ImportOptions, import_files
from equipot.train.inherit import is_head
from equipot.train.loss import Counts, LossModule
from equipot.train.metrics import read_rows
from equipot.train.peak import matrix_product_rate
from equipot.train.recipe import LossSection
from equipot.train.scaling.controls.registry import register

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as torch's FlopCounterMode, which also follows modules and asks of leaves what torch refuses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        # Vectors of edges are made with a product by each system's cell: of geometry, not of the network.
        geometry = packet is torch.ops.aten.bmm and args[1].shape[1:] == (3, 3)
        if packet in _PRODUCTS and not geometry:
            counted = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.operations += counted
        return result


@pytest.mark.parametrize("architecture", ["egnn", "moments", "transformer", "gcn", "gat"])
@pytest.mark.parametrize("forces", ["conservative", "direct", "unused", "invariant", "raw"])
@pytest.mark.parametrize(
    ("width", "layers", "radial", "heads_only"), [(16, 1, 5, False), (24, 3, 8, False), (24, 2, 8, True)]
)
def test_operations_are_those_that_torch_counts(
    architecture: str, width: int, layers: int, radial: int, forces: str, heads_only: bool
) -> None:
    register()
    words = {"unused": "conservative", "raw": "direct"}
    config = ModelConfig(
        architecture=architecture,
        width=width,
        layers=layers,
        radial=radial,
        cutoff=30.0,  # every atom has as many edges as any other, so no slot is empty
        elements=(1, 6),
        levels_of_theory=("A", "B", "C"),
        forces=words.get(forces, forces),  # type: ignore[arg-type]
        inputs="raw" if forces == "raw" else "invariant",
        messages="split",
    )
    potential = Potential(config, References(energy=np.zeros((3, 2)), scale=np.ones(3)))
    for name, parameter in potential.named_parameters():
        parameter.requires_grad_(is_head(name) or not heads_only)
    loss = LossSection(forces=0.0) if forces == "unused" else LossSection()
    module = LossModule(potential, loss).train()
    random = np.random.default_rng(1)
    for n in (5, 11):
        positions = random.normal(scale=2.0, size=(n, 3))
        system = System(random.choice([1, 6], n), positions, np.zeros((3, 3)), np.zeros(3, dtype=bool))
        batch = collate([build_graph(system, config.cutoff)], dtype=torch.float32)
        targets = Targets(torch.zeros(1).double(), torch.zeros(n, 3), torch.full((1, 3, 3), torch.nan))
        with Products() as products:
            module(batch, targets, Counts(1.0, 3.0 * n, 0.0), 1)[0].backward()
        mine = training_flops(config, by_gradient=forces == "conservative", heads_only=heads_only)
        assert batch.n_edges > 0
        assert mine.of(n, batch.n_edges) == products.operations


def test_a_peak_is_measured_without_random_numbers() -> None:
    before = torch.get_rng_state()
    rate = matrix_product_rate(torch.float32, torch.device("cpu"), torch.get_num_threads())
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.get_rng_state(), before)


def test_figures_of_a_run(train: Callable[..., Path], tmp_path: Path) -> None:
    rows = [row for row in read_rows(train(tmp_path / "run") / "metrics.csv") if row.loss is not None]
    assert len(rows) == 6
    for row in rows:
        assert row.structures_per_second
        assert row.atoms_per_second
        assert row.edges_per_second
        seconds = 8 / row.structures_per_second
        # 3 to 8 atoms a structure, and whole numbers of atoms and edges
        assert 3 * 8 <= row.atoms_per_second * seconds <= 8 * 8
        for figure in (row.atoms_per_second, row.edges_per_second):
            assert figure * seconds == pytest.approx(round(figure * seconds), abs=1e-3)
        assert row.model_flops_utilisation is not None
        assert 0 < row.model_flops_utilisation < 1
        assert row.peak_memory_gib is not None
        assert 0.05 < row.peak_memory_gib < 24
    assert [row.peak_memory_gib for row in rows] == sorted(row.peak_memory_gib or 0 for row in rows)


def test_errors_by_source(train: Callable[..., Path], frames: list[Atoms], tmp_path: Path) -> None:
    stores = []
    for name, part in (("one", frames[::2]), ("two", frames[1::2])):
        write(tmp_path / f"{name}.extxyz", part)
        options = ImportOptions(level_of_theory=name.upper(), licence="MIT", name=name, group_by="frame")
        import_files([tmp_path / f"{name}.extxyz"], tmp_path / name, options)
        stores.append(str(tmp_path / name))
    run = train(tmp_path / "run", f"data.stores={json.dumps(stores)}", "optimizer.steps=2")
    with (run / "validation-by-source.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["source"], row["level_of_theory"]) for row in rows] == [
        ("2", "one", "ONE"),
        ("2", "two", "TWO"),
    ]
    together = read_rows(run / "metrics.csv")[-1].validation_energy_mae_mev_per_atom
    counts = [int(row["structures"]) for row in rows]
    errors = [float(row["energy_mae_mev_per_atom"]) for row in rows]
    assert sum(counts) == 12
    assert errors[0] != errors[1]
    assert np.average(errors, weights=counts) == pytest.approx(together)
