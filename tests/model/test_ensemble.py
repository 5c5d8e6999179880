"""The mean of members and their spread: what numpy says of the members alone, and physics."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from equipot.model.batch import Graph, System, build_graphs, collate
from equipot.model.ensemble import Ensemble
from equipot.model.inference import FrozenPotential, Way
from equipot.model.potential import Potential

MakeModel = Callable[..., Potential]
WAYS: tuple[Way, ...] = ("compiled", "analytic", "autograd")


@pytest.fixture(scope="module")
def members(make_model: MakeModel) -> list[Potential]:
    return [make_model(seed=seed) for seed in range(3)]


def frozen(members: list[Potential], way: Way | None = None) -> Ensemble:
    try:
        return Ensemble([FrozenPotential(one, way=way) for one in members])
    except ValueError:
        pytest.skip(f"{way} is not possible here: there is no compiler")


def of(graphs: list[Graph], members: Ensemble) -> tuple[NDArray[np.float64], ...]:
    out, spread = members(collate(graphs, dtype=torch.float64), stress=True)
    assert spread is not None
    assert spread.forces is not None
    assert out.forces is not None
    assert out.stress is not None
    return tuple(
        tensor.numpy() for tensor in (out.energy, out.forces, out.stress, spread.energy, spread.forces)
    )


@pytest.mark.parametrize("way", WAYS)
def test_mean_and_spread_are_those_of_the_members_alone(
    members: list[Potential], structures: dict[str, list[Graph]], way: Way
) -> None:
    graphs = structures["mixed"]
    energy, forces, stress, energy_spread, forces_spread = of(graphs, frozen(members, way))
    batch = collate(graphs, dtype=torch.float64)
    alone = [one(batch, stress=True) for one in members]
    energies = np.stack([one.energy.numpy() for one in alone])
    all_forces = np.stack([one.forces.numpy() for one in alone])
    np.testing.assert_allclose(energy, energies.mean(0), rtol=1e-12)
    np.testing.assert_allclose(forces, all_forces.mean(0), atol=1e-9)
    np.testing.assert_allclose(stress, np.mean([one.stress.numpy() for one in alone], axis=0), atol=1e-9)
    assert energies.std(0).min() > 1e-3
    np.testing.assert_allclose(energy_spread, energies.std(0), atol=1e-9)
    by_component = all_forces.std(0)
    np.testing.assert_allclose(forces_spread, np.sqrt((by_component**2).sum(1)), atol=1e-9)


def test_members_that_agree_have_no_spread_at_all(
    members: list[Potential], structures: dict[str, list[Graph]]
) -> None:
    same = frozen([members[0]] * 3)
    *_, energy_spread, forces_spread = of(structures["mixed"], same)
    assert not energy_spread.any()
    assert not forces_spread.any()


def test_of_one_member_the_spread_is_unknown(
    members: list[Potential], structures: dict[str, list[Graph]]
) -> None:
    batch = collate(structures["molecules"], dtype=torch.float64)
    out, spread = frozen(members[:1])(batch)
    assert spread is None
    assert torch.equal(out.energy, FrozenPotential(members[0])(batch).energy)


def test_spread_does_not_change_when_the_structure_is_turned_or_renumbered(
    members: list[Potential], structures: dict[str, list[Graph]]
) -> None:
    rng = np.random.default_rng(4)
    ensemble = frozen(members)
    graphs = structures["mixed"]
    *_, energy_spread, forces_spread = of(graphs, ensemble)
    turned, orders = [], []
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    for graph in graphs:
        system = graph.system
        order = rng.permutation(system.n_atoms)
        orders.append(order)
        turned.append(
            System(
                system.atomic_numbers[order],
                (system.positions @ rotation.T)[order],
                system.cell @ rotation.T,
                system.pbc,
                level_of_theory=system.level_of_theory,
            )
        )
    *_, energy_again, forces_again = of(build_graphs(turned, members[0].config.cutoff), ensemble)
    np.testing.assert_allclose(energy_again, energy_spread, rtol=1e-7)
    starts = np.cumsum([0, *(len(order) for order in orders)])
    renumbered = np.concatenate(
        [forces_spread[start + order] for start, order in zip(starts, orders, strict=False)]
    )
    np.testing.assert_allclose(forces_again, renumbered, rtol=1e-7)


def test_a_batch_gives_what_its_structures_give_alone(
    members: list[Potential], structures: dict[str, list[Graph]]
) -> None:
    ensemble = frozen(members)
    together = of(structures["mixed"], ensemble)
    alone = [of([graph], ensemble) for graph in structures["mixed"]]
    for k, values in enumerate(together):
        np.testing.assert_allclose(np.concatenate([one[k] for one in alone]), values, rtol=1e-9, atol=1e-10)
