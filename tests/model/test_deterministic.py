"""The same structure gets the same bits alone, in any batch and at any position of it."""

import numpy as np
import pytest
import torch

from equipot.model.batch import Graph, System, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential, Prediction
from equipot.model.references import References


def make_graphs(count: int, rng: np.random.Generator) -> list[Graph]:
    graphs = []
    for _ in range(count):
        n_atoms, periodic = int(rng.integers(1, 24)), bool(rng.integers(2))
        grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)[:n_atoms]
        positions = 1.7 * grid + rng.uniform(-0.2, 0.2, (n_atoms, 3)) + rng.uniform(-50, 50, 3)
        cell = (5.1 if periodic else 0.0) * np.eye(3)
        system = System(rng.choice([1, 6, 8], n_atoms), positions, cell, np.full(3, periodic))
        graphs.append(build_graph(system, 5.0))
    return graphs


def make_model(forces: str) -> Potential:
    # A width that is no multiple of a vector register: the tails of loops are where bits differ.
    config = ModelConfig(
        width=50,
        layers=2,
        forces=forces,  # type: ignore[arg-type]
        elements=(1, 6, 8),
        levels_of_theory=("a",),
        mean_neighbors=20.0,
    )
    torch.manual_seed(1)
    return Potential(config, References(energy=np.ones((1, 3)), scale=np.ones(1))).eval()


def predict(model: Potential, graphs: list[Graph]) -> Prediction:
    batch = collate(graphs, dtype=torch.float32)
    return model(batch, stress=model.force_head is None, deterministic=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_random_batches_give_the_bits_of_the_structure_alone(forces: str) -> None:
    rng = np.random.default_rng(11)
    graphs, model = make_graphs(12, rng), make_model(forces)
    alone = [predict(model, [graph]) for graph in graphs]
    for _ in range(6):
        chosen = rng.permutation(len(graphs))[: rng.integers(1, len(graphs) + 1)]
        together = predict(model, [graphs[i] for i in chosen])
        atom = 0
        for place, i in enumerate(chosen):
            assert torch.equal(together.energy[place], alone[i].energy[0])
            assert together.forces is not None
            assert alone[i].forces is not None
            assert torch.equal(together.forces[atom : atom + graphs[i].n_atoms], alone[i].forces)
            if forces == "conservative":
                assert together.stress is not None
                assert alone[i].stress is not None
                assert torch.equal(together.stress[place].nan_to_num(), alone[i].stress[0].nan_to_num())
            atom += graphs[i].n_atoms


def test_the_mode_gives_what_a_common_batch_gives() -> None:
    graphs, model = make_graphs(8, np.random.default_rng(2)), make_model("conservative").double()
    batch = collate(graphs, dtype=torch.float64)
    common, apart = model(batch), model(batch, deterministic=True)
    torch.testing.assert_close(apart.energy, common.energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apart.forces, common.forces, rtol=1e-10, atol=1e-10)
