"""Inference without autograd: the numbers of the potential itself, by every way, for every kind of model."""

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.model.conftest import CUTOFF, MakeModel

from equipot.model import inference, kernels
from equipot.model.batch import Graph, System, build_graph, collate
from equipot.model.errors import ModelError
from equipot.model.inference import FrozenPotential, Way
from equipot.model.potential import Potential, Prediction

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=kernels.kernel_status())
WAYS = [pytest.param("compiled", marks=needs_kernels), "analytic"]

VARIANTS: dict[str, dict[str, object]] = {
    "usual": {},
    "bare": {"normalisation": "none", "residual": False},
    "no residual": {"residual": False},
    "no norm": {"normalisation": "none"},
    "one layer": {"layers": 1},
    # No multiple of a vector register, and wider than the products' inner blocks.
    "odd": {"width": 291, "radial": 5, "layers": 2},
    "narrow": {"width": 3, "layers": 3, "radial": 40},
    "charges and spins": {"charges": (-1, 0, 2), "spin_multiplicities": (1, 3)},
    "one level": {"levels_of_theory": ("PBE",)},
}


def assert_same(got: Prediction, expected: Prediction, rtol: float) -> None:
    for name in ("energy", "forces", "stress"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is None:
            continue
        assert a.dtype == b.dtype
        size = float(b.nan_to_num().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=rtol * max(size, 1.0), equal_nan=True)


def with_fields(graphs: Sequence[Graph], model: Potential, rng: np.random.Generator) -> list[Graph]:
    """The graphs with charges, spins and levels that the model knows."""
    config, out = model.config, []
    for graph in graphs:
        s = graph.system
        system = System(
            s.atomic_numbers,
            s.positions,
            s.cell,
            s.pbc,
            charge=int(rng.choice(config.charges)),
            spin_multiplicity=int(rng.choice(config.spin_multiplicities)),
            level_of_theory=int(rng.integers(len(config.levels_of_theory))),
        )
        out.append(Graph(system, graph.senders, graph.receivers, graph.cell_shifts))
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_energies_forces_and_stress_are_those_of_autograd(
    way: Way, variant: str, make_model: MakeModel, structures: dict[str, list[Graph]]
) -> None:
    model = make_model(**VARIANTS[variant])
    graphs = with_fields(structures["mixed"] + structures["crystals"], model, np.random.default_rng(5))
    frozen = FrozenPotential(model, way=way)
    for some in (graphs, graphs[:1]):
        batch = collate(some, dtype=torch.float64)
        for stress in (False, True):
            assert_same(frozen(batch, stress=stress), model(batch, stress=stress), 1e-10)
        assert_same(frozen(batch, forces=False, stress=True), model(batch, forces=False, stress=True), 1e-10)
        assert_same(frozen(batch, forces=False), model(batch, forces=False), 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_float32_differs_by_rounding(
    way: Way, make_model: MakeModel, structures: dict[str, list[Graph]]
) -> None:
    model = make_model(dtype=torch.float32, width=64)
    batch = collate(structures["mixed"], dtype=torch.float32)
    assert_same(FrozenPotential(model, way=way)(batch, stress=True), model(batch, stress=True), 2e-5)


@needs_kernels
@pytest.mark.parametrize("variant", ["usual", "charges and spins", "odd"])
def test_direct_forces(variant: str, make_model: MakeModel, structures: dict[str, list[Graph]]) -> None:
    model = make_model(forces="direct", **VARIANTS[variant])
    graphs = with_fields(structures["mixed"], model, np.random.default_rng(5))
    batch = collate(graphs, dtype=torch.float64)
    frozen = FrozenPotential(model, way="compiled")
    assert_same(frozen(batch), model(batch), 1e-10)
    assert_same(frozen(batch, forces=False), model(batch, forces=False), 1e-10)
    with pytest.raises(ModelError, match="stress"):
        frozen(batch, stress=True)


@needs_kernels
def test_weights_are_let_go_once_they_are_packed(
    make_model: MakeModel, structures: dict[str, list[Graph]]
) -> None:
    batch = collate(structures["molecules"], dtype=torch.float64)
    model = make_model()
    weight = weakref.ref(model.get_parameter("backbone.layers.0.own.weight"))
    expected = model(batch)
    frozen = FrozenPotential(model, way="compiled")
    del model
    gc.collect()
    assert weight() is None
    assert_same(frozen(batch), expected, 1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_atoms_without_neighbours(way: Way, forces: str, make_model: MakeModel) -> None:
    model = make_model(forces=forces)
    far = System(
        np.array([1, 6, 8]), 10.0 * np.arange(9.0).reshape(3, 3), np.zeros((3, 3)), np.zeros(3, bool)
    )
    near = System(
        np.array([6, 8]), np.array([[0.0, 0, 0], [1.1, 0.3, 0]]), np.zeros((3, 3)), np.zeros(3, bool)
    )
    one, two = (build_graph(system, CUTOFF) for system in (far, near))
    assert one.n_edges == 0
    frozen = FrozenPotential(model, way=way)
    for graphs in ([one], [one, two, one], [two, one]):
        batch = collate(graphs, dtype=torch.float64)
        assert_same(frozen(batch), model(batch), 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_kept_is_computed_again(
    way: Way, make_model: MakeModel, structures: dict[str, list[Graph]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(layers=3)
    frozen, batch = FrozenPotential(model, way=way), collate(structures["mixed"], dtype=torch.float64)
    kept = frozen(batch, stress=True)
    monkeypatch.setattr(inference, "KEEP_BYTES", 0)
    assert_same(frozen(batch, stress=True), kept, 1e-14)


@needs_kernels
@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("width", [16, 50, 130])
def test_the_same_bits_in_any_batch_and_with_any_number_of_threads(
    forces: str, width: int, make_model: MakeModel
) -> None:
    rng = np.random.default_rng(width)
    model = make_model(forces=forces, width=width, dtype=torch.float32, levels_of_theory=("PBE",))
    frozen = FrozenPotential(model)
    assert frozen.batch_invariant
    graphs = []
    for _ in range(14):
        n_atoms, periodic = int(rng.integers(1, 60)), bool(rng.integers(2))
        grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3)[:n_atoms]
        positions = 1.7 * grid + rng.uniform(-0.2, 0.2, (n_atoms, 3))
        cell = (6.8 if periodic else 0.0) * np.eye(3)
        system = System(rng.choice([1, 6, 8], n_atoms), positions, cell, np.full(3, periodic))
        graphs.append(build_graph(system, CUTOFF))

    def predict(some: Sequence[Graph], threads: int) -> list[tuple[bytes, ...]]:
        batch = collate(some, dtype=torch.float32)
        out = frozen(batch, stress=forces == "conservative", threads=threads)
        assert out.forces is not None
        parts = torch.split(out.forces, [graph.n_atoms for graph in some])
        stress = [torch.zeros(0)] * len(some) if out.stress is None else list(out.stress)
        return [
            tuple(t.numpy().tobytes() for t in row) for row in zip(out.energy, parts, stress, strict=True)
        ]

    alone = [predict([graph], 1)[0] for graph in graphs]
    for _ in range(12):
        chosen = rng.permutation(len(graphs))[: rng.integers(1, len(graphs) + 1)]
        together = predict([graphs[i] for i in chosen], int(rng.integers(1, 4)))
        assert together == [alone[i] for i in chosen]


def test_models_and_machines_that_the_quick_ways_do_not_take(
    make_model: MakeModel, structures: dict[str, list[Graph]]
) -> None:
    replaced = make_model()
    replaced.energy_head.up = torch.nn.Sequential(replaced.energy_head.up)  # type: ignore[assignment]
    assert FrozenPotential(replaced).way == "autograd"
    half = FrozenPotential(make_model(dtype=torch.bfloat16))
    assert half.way == "autograd"
    assert not half.batch_invariant
    batch = collate(structures["molecules"], dtype=torch.float32)
    assert torch.isfinite(half(batch).forces).all()  # type: ignore[arg-type]
    for fields in ({"residual": "initial"}, {"architecture": "moments"}):
        other = make_model(dtype=torch.float32, **fields)
        frozen = FrozenPotential(make_model(dtype=torch.float32, **fields))
        assert frozen.way == "autograd"
        assert_same(frozen(batch, stress=True), other(batch, stress=True), 1e-6)
        narrow = FrozenPotential(make_model(dtype=torch.bfloat16, **fields))(batch)
        assert torch.isfinite(narrow.forces).all()  # type: ignore[arg-type]
        assert narrow.energy.dtype == torch.float64
    with kernels.pure_torch():
        assert FrozenPotential(make_model()).way == "analytic"
        with pytest.raises(ValueError, match="compiled"):
            FrozenPotential(make_model(), way="compiled")


@pytest.mark.parametrize("way", [*WAYS, "autograd"])
def test_nothing_is_recorded_for_autograd_and_unknown_elements_are_refused(
    way: Way, make_model: MakeModel, structures: dict[str, list[Graph]]
) -> None:
    frozen = FrozenPotential(make_model(), way=way)
    batch = collate(structures["molecules"], dtype=torch.float64)
    out = frozen(batch)
    assert out.forces is not None
    assert not out.energy.requires_grad
    assert not out.forces.requires_grad
    batch.atomic_numbers[0] = 79
    with pytest.raises(IndexError):
        frozen(batch)


@pytest.mark.parametrize("way", ["analytic", "autograd"])
def test_the_ways_in_torch_give_the_bits_of_the_structure_alone_when_told(
    way: Way, make_model: MakeModel, structures: dict[str, list[Graph]]
) -> None:
    frozen = FrozenPotential(make_model(dtype=torch.float32, width=50), way=way)
    graphs = structures["mixed"]

    def predict(some: Sequence[Graph]) -> Prediction:
        return frozen(collate(some, dtype=torch.float32), stress=True, deterministic=True)

    together, atom = predict(graphs[::-1]), 0
    for place, graph in enumerate(graphs[::-1]):
        alone = predict([graph])
        assert together.forces is not None
        assert alone.forces is not None
        assert torch.equal(together.energy[place], alone.energy[0])
        assert torch.equal(together.forces[atom : atom + graph.n_atoms], alone.forces)
        atom += graph.n_atoms


@needs_kernels
def test_several_threads_may_call_at_once(make_model: MakeModel, structures: dict[str, list[Graph]]) -> None:
    frozen = FrozenPotential(make_model(layers=3, width=100))
    batches = [collate(structures[name], dtype=torch.float64) for name in structures]
    expected = [frozen(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        several = list(pool.map(frozen, batches * 8))
    for got, one in zip(several, expected * 8, strict=True):
        assert torch.equal(got.energy, one.energy)
        assert got.forces is not None
        assert one.forces is not None
        assert torch.equal(got.forces, one.forces)
