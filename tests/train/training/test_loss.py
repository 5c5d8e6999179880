"""The loss by hand, absent labels, and that parts add up to the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipot.model.batch import Graph, System, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.train.dataset import Targets
from equipot.train.loss import Counts, LossModule, residuals, weighted
from equipot.train.recipe import LossSection

CONFIG = ModelConfig(width=8, layers=2, radial=4, cutoff=4.0, elements=(28, 29), levels_of_theory=("EMT",))


@pytest.fixture
def graphs() -> list[Graph]:
    random = np.random.default_rng(3)
    built = []
    for size, periodic in ((3, False), (4, True), (5, False)):
        system = System(
            atomic_numbers=random.choice([28, 29], size),
            positions=random.uniform(0, 4, (size, 3)),
            cell=5.0 * np.eye(3) * periodic,
            pbc=np.full(3, periodic),
        )
        built.append(build_graph(system, CONFIG.cutoff))
    return built


@pytest.fixture
def potential() -> Potential:
    torch.manual_seed(0)
    return Potential(CONFIG, References(energy=np.array([[-1.0, -2.0]]), scale=np.array([1.5]))).double()


def labels(graphs: list[Graph]) -> Targets:
    random = torch.Generator().manual_seed(1)
    n_atoms = sum(graph.n_atoms for graph in graphs)
    stress = torch.randn(len(graphs), 3, 3, generator=random, dtype=torch.float64)
    stress[[i for i, graph in enumerate(graphs) if not graph.system.pbc.all()]] = torch.nan
    return Targets(
        energy=torch.randn(len(graphs), generator=random, dtype=torch.float64),
        forces=torch.randn(n_atoms, 3, generator=random, dtype=torch.float64),
        stress=stress,
    )


def compute(
    potential: Potential, graphs: list[Graph], targets: Targets, loss: LossSection, counts: Counts
) -> tuple[torch.Tensor, torch.Tensor]:
    module = LossModule(potential, loss).train()
    systems = collate(graphs, dtype=torch.float64)
    output: tuple[torch.Tensor, torch.Tensor] = module(systems, targets, counts, 1)
    return output


@pytest.mark.parametrize("kind", ["huber", "mse", "mae"])
def test_the_loss_is_the_weighted_sum_of_means(potential: Potential, graphs: list[Graph], kind: str) -> None:
    targets = labels(graphs)
    loss = LossSection.model_validate(
        {"kind": kind, "huber_delta": 0.3, "energy": 2, "forces": 3, "stress": 5}
    )
    counts = Counts(*Counts.of(targets))
    assert counts == Counts(energy=3, forces=36, stress=9)
    systems = collate(graphs, dtype=torch.float64)
    said = potential(systems, forces=True, stress=True)
    assert said.forces is not None
    assert said.stress is not None

    def penalty(residual: torch.Tensor) -> torch.Tensor:
        size = residual.abs()
        if kind == "mse":
            return size**2
        return size if kind == "mae" else torch.where(size < 0.3, size**2 / 2, 0.3 * (size - 0.15))

    expected = (
        2 * penalty((said.energy - targets.energy) / torch.tensor([3, 4, 5])).mean()
        + 3 * penalty(said.forces - targets.forces).mean()
        + 5 * penalty(said.stress[1] - targets.stress[1]).mean()
    )
    found, terms = compute(potential, graphs, targets, loss, counts)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert float(weighted(terms.sum(1), loss, counts)) == pytest.approx(expected.item(), rel=1e-12)


def test_parts_add_up_to_the_whole(potential: Potential, graphs: list[Graph]) -> None:
    targets = labels(graphs)
    loss = LossSection(stress=1.0)
    counts = Counts(*Counts.of(targets))
    whole, _ = compute(potential, graphs, targets, loss, counts)
    whole.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in potential.parameters()]
    potential.zero_grad()
    first = Targets(targets.energy[:1], targets.forces[:3], targets.stress[:1])
    rest = Targets(targets.energy[1:], targets.forces[3:], targets.stress[1:])
    for part, some in ((graphs[:1], first), (graphs[1:], rest)):
        compute(potential, part, some, loss, counts)[0].backward()  # type: ignore[no-untyped-call]
    for parameter, expected in zip(potential.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


def test_absent_labels_change_nothing(potential: Potential, graphs: list[Graph]) -> None:
    targets = labels(graphs)
    targets.energy[0] = torch.nan
    targets.forces[3:7] = torch.nan
    counts = Counts(*Counts.of(targets))
    assert counts == Counts(energy=2, forces=24, stress=9)
    found, _ = compute(potential, graphs, targets, LossSection(stress=1.0), counts)
    found.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(found)
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)
    systems = collate(graphs, dtype=torch.float64)
    compared = residuals(potential(systems, stress=True), targets, systems)
    assert compared.energy[0] == 0
    assert not compared.forces[3:7].any()
    assert compared.has_stress.sum() == 9


def test_a_head_that_weighs_nothing_still_has_gradients(graphs: list[Graph]) -> None:
    config = ModelConfig(**{**CONFIG.to_json(), "forces": "direct"})
    direct = Potential(config, References(energy=np.zeros((1, 2)), scale=np.ones(1))).double()
    targets = labels(graphs)
    counts = Counts(*Counts.of(targets))
    found, _ = compute(direct, graphs, targets, LossSection(forces=0), counts)
    found.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in direct.parameters())
