"""What callers of `Potential` rely on beyond physics: gradients, modes, dtypes, odd batches, parameters."""

import copy
from collections.abc import Callable
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipot.model.batch import Graph, System, SystemBatch, build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.errors import ModelError
from equipot.model.geometry import Edges
from equipot.model.potential import Potential, count_parameters
from equipot.model.references import References

MakeModel = Callable[..., Potential]
Structures = dict[str, list[Graph]]
BOTH = pytest.mark.parametrize("forces", ["conservative", "direct"])


def loss_of(model: Potential, batch: SystemBatch) -> Tensor:
    stress = model.config.forces == "conservative"
    out = model(batch, stress=stress)
    loss: Tensor = (out.energy / 50.0).square().sum() + out.forces.square().sum()
    if stress:
        loss = loss + out.stress[batch.pbc.all(-1)].square().sum()
    return loss


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


@BOTH
@pytest.mark.parametrize("messages", ["fast", "lean", "split", "plain"])
def test_gradient_of_the_loss_is_its_finite_difference(
    forces: str, messages: str, make_model: MakeModel, structures: Structures
) -> None:
    model = make_model(width=4, radial=3, forces=forces, messages=messages).train()
    batch = collate(structures["mixed"][:3], dtype=torch.float64)
    backward(loss_of(model, batch))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        rng = np.random.default_rng(0)
        direction = torch.from_numpy(rng.normal(size=tuple(parameter.shape)))
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-4)
            values.append(loss_of(model, batch).item())
            with torch.no_grad():
                parameter.sub_(direction, alpha=sign * 1e-4)
        numeric = (values[0] - values[1]) / 2e-4
        analytic = (parameter.grad * direction).sum().item()
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-6), name


@BOTH
def test_layers_run_through_the_attribute_and_checkpointing_changes_no_gradient(
    forces: str, make_model: MakeModel, structures: Structures
) -> None:
    model = make_model(forces=forces).train()
    wrapped = copy.deepcopy(model)
    calls = []

    def checkpointed(layer: nn.Module, h: Tensor, edges: Edges) -> Tensor:
        calls.append(layer)
        out: Tensor = checkpoint(layer, h, edges, use_reentrant=False)
        return out

    wrapped.backbone.run_layer = checkpointed
    batch = collate(structures["mixed"], dtype=torch.float64)
    for one in (model, wrapped):
        backward(loss_of(one, batch))
    assert len(calls) == model.config.layers
    assert model.state_dict().keys() == wrapped.state_dict().keys()
    for (name, first), second in zip(model.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-12, atol=1e-12, msg=name)


@BOTH
def test_eval_mode_is_detached_and_works_where_gradients_are_off(
    forces: str, make_model: MakeModel, structures: Structures
) -> None:
    model = make_model(forces=forces)
    batch = collate(structures["molecules"], dtype=torch.float64)
    plain = model(batch)
    assert not plain.energy.requires_grad
    assert not plain.forces.requires_grad
    with torch.no_grad():
        under_no_grad = model(batch)
    with torch.inference_mode():
        made_inside = collate(structures["molecules"], dtype=torch.float64).to(dtype=torch.float64)
        under_inference = model(
            replace(made_inside, positions=made_inside.positions.clone(), senders=made_inside.senders.clone())
        )
    for other in (under_no_grad, under_inference):
        assert torch.equal(plain.energy, other.energy)
        assert torch.equal(plain.forces, other.forces)


def test_train_mode_under_no_grad_holds_no_graph(make_model: MakeModel, structures: Structures) -> None:
    model = make_model().train()
    with torch.no_grad():
        out = model(collate(structures["molecules"], dtype=torch.float64))
    assert not out.forces.requires_grad
    assert not out.energy.requires_grad


@BOTH
def test_outputs_are_what_was_asked_for(forces: str, make_model: MakeModel, structures: Structures) -> None:
    model = make_model(forces=forces, dtype=torch.float32)
    batch = collate(structures["mixed"], dtype=torch.float32)
    out = model(batch, forces=False)
    assert out.forces is None
    assert out.stress is None
    assert out.energy.dtype == torch.float64
    assert model(batch).forces.dtype == torch.float32
    if forces == "conservative":
        only_stress = model(batch, forces=False, stress=True)
        assert only_stress.forces is None
        assert only_stress.stress.shape == (batch.n_systems, 3, 3)
        assert torch.equal(only_stress.stress.isfinite().all(-1).all(-1), batch.pbc.all(-1))
    else:
        with pytest.raises(ModelError, match="direct forces"):
            model(batch, stress=True)


@BOTH
@pytest.mark.parametrize("train", [False, True])
def test_a_batch_without_edges_gives_references_like_energies_and_zero_forces(
    forces: str, train: bool, make_model: MakeModel, make_system: Callable[..., System]
) -> None:
    model = make_model(forces=forces).train(train)
    atoms = [build_graph(make_system(ase.build.molecule("H")), 3.5) for _ in range(2)]
    batch = collate(atoms, dtype=torch.float64)
    assert batch.n_edges == 0
    out = model(batch)
    assert not out.forces.any()
    assert out.energy[0] == out.energy[1]
    if train:
        backward(out.energy.sum() + out.forces.square().sum())
        gradients = [parameter.grad for parameter in model.energy_head.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_untrained_predicts_nearly_its_references(make_system: Callable[..., System]) -> None:
    config = ModelConfig(elements=(1, 6, 8), levels_of_theory=("a", "b"), mean_neighbors=8.0)
    references = References(energy=[[-10, -1000, -2000], [-11, -1001, -2001]], scale=[1.5, 0.5])  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Potential(config, references).eval()
    ethanol = ase.build.molecule("CH3CH2OH")
    graphs = [build_graph(make_system(ethanol, level_of_theory=level), 5.0) for level in (0, 1)]
    out = model(collate(graphs, dtype=torch.float32))
    expected = [-10 * 6 - 2 * 1000 - 2000, -11 * 6 - 2 * 1001 - 2001]
    np.testing.assert_allclose(out.energy.numpy(), expected, atol=0.3 * len(ethanol))
    assert out.forces.abs().mean() < 0.3


def test_levels_of_theory_have_their_own_output(
    make_model: MakeModel, make_system: Callable[..., System]
) -> None:
    model = make_model(forces="direct")
    water = ase.build.molecule("H2O")
    pair = [build_graph(make_system(water, level_of_theory=level), 3.5) for level in (0, 1)]
    out = model(collate(pair, dtype=torch.float64))
    references = [float(model.references.energy[level, [2, 0, 0]].sum()) for level in (0, 1)]
    network = [out.energy[k].item() - references[k] for k in (0, 1)]
    assert network[0] != pytest.approx(network[1], rel=1e-3)
    assert not torch.allclose(out.forces[:3], out.forces[3:], rtol=1e-3)


def test_charge_and_spin_change_the_energy_only_where_the_config_varies_them(
    make_model: MakeModel, make_system: Callable[..., System]
) -> None:
    water = ase.build.molecule("H2O")

    def energy(model: Potential, **fields: int) -> float:
        graph = build_graph(make_system(water, **fields), 3.5)
        return float(model(collate([graph], dtype=torch.float64), forces=False).energy)

    varied = make_model(charges=(-1, 0, 2), spin_multiplicities=(1, 3))
    energies = {energy(varied, charge=c, spin_multiplicity=s) for c in (-1, 0, 2) for s in (1, 3)}
    assert len(energies) == 6
    for unknown in (
        {"charge": 1, "spin_multiplicity": 1},
        {"charge": 0, "spin_multiplicity": 2},
        {"charge": 99},
    ):
        with pytest.raises(IndexError):
            energy(varied, **unknown)
    fixed = make_model(charges=(1,), spin_multiplicities=(2,))
    assert not any("charge" in name or "spin" in name for name, _ in fixed.named_parameters())


def test_an_unknown_element_is_never_read_as_another(
    make_model: MakeModel, make_system: Callable[..., System]
) -> None:
    for name in ("N2", "Cl2", "SiH4"):
        graph = build_graph(make_system(ase.build.molecule(name)), 3.5)
        with pytest.raises(IndexError):
            make_model()(collate([graph], dtype=torch.float64))


@BOTH
def test_bf16_keeps_float64_references_and_finite_results(
    forces: str, make_model: MakeModel, structures: Structures
) -> None:
    model = make_model(forces=forces, dtype=torch.float32)
    batch = collate(structures["mixed"], dtype=torch.float32)
    exact = model(batch)
    cast = copy.deepcopy(model).bfloat16()
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
    assert cast.references.energy.dtype == np.float64
    assert (cast.references.energy == model.references.energy).all()
    out = cast(batch)
    assert out.energy.dtype == torch.float64
    assert out.forces.dtype == torch.float32
    assert out.energy.isfinite().all()
    # A reference of −100 eV rounded to bfloat16 would be off by up to 0.25 eV for every atom.
    size = exact.forces.abs().max()
    assert (out.forces - exact.forces).abs().max() < 0.2 * size
    atoms = torch.bincount(batch.system_idx)
    assert ((out.energy - exact.energy).abs() / atoms).max() < 0.1
    backward(loss_of(cast.train(), batch))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cast.parameters())


def test_references_survive_casts_bit_for_bit(make_system: Callable[..., System]) -> None:
    energy = np.array([[-37.123456789012345, -75000.98765432109]])
    config = ModelConfig(width=4, elements=(1, 8), levels_of_theory=("a",))
    model = Potential(config, References(energy=energy, scale=np.ones(1)))
    nn.init.zeros_(model.energy_head.down.weight)
    batch = collate([build_graph(make_system(ase.build.molecule("H2O")), 5.0)], dtype=torch.float32)
    for cast in (model.float(), model.double(), model.bfloat16(), model.float()):
        assert cast.eval()(batch).energy.item() == energy[0, 1] + energy[0, 0] + energy[0, 0]


def test_parameter_count_and_shapes() -> None:
    references = References(energy=np.zeros((1, 2)), scale=np.ones(1))
    for forces, factor in (("conservative", 18.5), ("direct", 20.5)):
        config = ModelConfig(width=512, elements=(1, 8), levels_of_theory=("a",), forces=forces)  # type: ignore[arg-type]
        with torch.device("meta"):
            model = Potential(config, references)
        assert count_parameters(model) == pytest.approx(factor * 512**2, rel=0.02)
        assert all(parameter.numel() > 1 for parameter in model.parameters())
        for head in (model.energy_head, model.force_head):
            assert head is None or "down.bias" not in dict(head.named_parameters())


def test_collate_joins_and_moves(structures: Structures) -> None:
    graphs = structures["mixed"]
    batch = collate(graphs, dtype=torch.float64)
    assert batch.n_systems == len(graphs)
    assert batch.n_atoms == sum(graph.n_atoms for graph in graphs)
    assert batch.n_edges == sum(graph.n_edges for graph in graphs)
    assert (batch.receivers.diff() >= 0).all()
    assert torch.equal(batch.system_idx[batch.senders], batch.system_idx[batch.receivers])
    np.testing.assert_allclose(
        batch.edge_vectors().numpy(), np.concatenate([graph.vectors() for graph in graphs]), atol=1e-12
    )
    single = batch.to(dtype=torch.float32)
    assert single.positions.dtype == single.cell.dtype == single.cell_shifts.dtype == torch.float32
    assert single.senders.dtype == torch.int64
    assert single.pbc.dtype == torch.bool
    with pytest.raises(ValueError, match="no graphs"):
        collate([], dtype=torch.float32)


def test_float32_keeps_its_precision_far_from_the_origin(
    make_model: MakeModel, make_system: Callable[..., System]
) -> None:
    model = make_model(dtype=torch.float32)
    water = make_system(ase.build.molecule("H2O"))
    away = replace(water, positions=water.positions + 20_000.0)
    near, far = (
        model(collate([build_graph(system, 3.5)], dtype=torch.float32)).forces for system in (water, away)
    )
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)


def test_a_batch_may_be_read_only_and_built_from_lists() -> None:
    positions = np.array([[0.0, 0, 0], [0, 0, 0.8]])
    positions.flags.writeable = False
    numbers = np.array([1, 1], dtype=np.int32)
    numbers.flags.writeable = False
    system = System(numbers, positions, np.zeros((3, 3)), [False] * 3)  # type: ignore[arg-type]
    batch = collate([build_graph(system, 5.0)], dtype=torch.float64)
    assert batch.atomic_numbers.dtype == torch.int64
    assert batch.n_edges == 2
