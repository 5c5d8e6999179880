"""Bad structures are refused with the field, the value and the remedy; good ones pass."""

from collections.abc import Callable
from dataclasses import replace as typed_replace
from typing import Any

import ase.build
import numpy as np
import pytest

from equipot.model.batch import System, build_graph
from equipot.model.config import ModelConfig
from equipot.model.errors import ModelError, StructureError
from equipot.model.validate import check_graph, check_supported, check_system

MakeSystem = Callable[..., System]

# Wrong values are the point here, and System itself converts the nearly right ones.
replace: Callable[..., Any] = typed_replace
make: Callable[..., System] = System


@pytest.fixture
def water(make_system: MakeSystem) -> System:
    return make_system(ase.build.molecule("H2O"))


@pytest.fixture
def copper(make_system: MakeSystem) -> System:
    return make_system(ase.build.bulk("Cu", cubic=True))


def refusal(system: System) -> StructureError:
    with pytest.raises(StructureError) as caught:
        check_system(system)
    error = caught.value
    assert error.reason == "invalid_structure"
    assert error.remedy
    assert error.exit_code == 2
    assert isinstance(error, ModelError | ValueError)
    assert str(error) == f"{error.field}: {error.message}; {error.remedy}"
    return error


def test_real_structures_pass(water: System, copper: System, make_system: MakeSystem) -> None:
    slab = make_system(ase.build.fcc111("Al", size=(2, 2, 3), vacuum=8.0))
    large = make_system(ase.build.bulk("Cu", cubic=True).repeat(8))
    diamond = make_system(ase.build.bulk("C"))
    for system in (water, copper, slab, large, diamond):
        check_system(system)
        check_graph(build_graph(system, 4.0))


def test_no_atoms() -> None:
    empty = make(np.zeros(0), np.zeros((0, 3)), np.zeros((3, 3)), np.zeros(3))
    assert refusal(empty).field == "atomic_numbers"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positions", np.zeros((2, 3))),
        ("positions", np.zeros(9)),
        ("atomic_numbers", np.ones((3, 1))),
        ("cell", np.zeros(3)),
        ("pbc", np.zeros(1)),
    ],
)
def test_wrong_shapes(water: System, field: str, value: np.ndarray) -> None:
    error = refusal(replace(water, **{field: value}))
    assert error.field == field
    assert str(value.shape) in error.message


def test_what_is_no_number_is_refused_on_construction() -> None:
    with pytest.raises(StructureError, match="positions: cannot be read as an array of float64"):
        make([1], [["a", "b", "c"]], np.zeros((3, 3)), [False] * 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e9])
@pytest.mark.parametrize("field", ["positions", "cell"])
def test_numbers_not_finite_or_absurd(copper: System, field: str, value: float) -> None:
    array = getattr(copper, field).copy()
    array[1, 2] = value
    error = refusal(replace(copper, **{field: array}))
    assert error.field == field
    assert ("atom 1" if field == "positions" else "lattice vector 1") in error.message


@pytest.mark.parametrize(
    "cell",
    [
        np.zeros((3, 3)),
        np.diag([4.0, 4.0, 0.0]),
        np.array([[4.0, 0, 0], [0, 4.0, 0], [4.0, 4.0, 0]]),
        np.array([[4.0, 0, 0], [0, 4.0, 0], [4.0, 4.0, 1e-9]]),
    ],
)
def test_singular_cell_while_periodic(copper: System, cell: np.ndarray) -> None:
    assert refusal(replace(copper, cell=cell)).field == "cell"


def test_singular_cell_is_fine_where_nothing_repeats(copper: System) -> None:
    check_system(replace(copper, cell=np.zeros((3, 3)), pbc=np.zeros(3)))
    check_system(replace(copper, cell=np.diag([4.0, 0, 0]), pbc=np.array([True, False, False])))


def test_flat_cell(copper: System) -> None:
    error = refusal(replace(copper, cell=np.diag([9.0, 9.0, 0.05])))
    assert "0.05 Å apart" in error.message


def test_unit_mistakes_that_would_make_a_flood_of_edges(copper: System) -> None:
    in_nanometres = replace(copper, cell=copper.cell / 10, positions=copper.positions / 10)
    assert "per Å³" in refusal(in_nanometres).message
    heap = make(
        np.ones(5000), np.random.default_rng(0).uniform(0, 2, (5000, 3)), np.zeros((3, 3)), np.zeros(3)
    )
    assert "within one cube" in refusal(heap).message
    # Folded back into its cell, a line of atoms is a heap too.
    line = np.zeros((5000, 3))
    line[:, 0] = 3.0 * np.arange(5000)
    wire = make(np.ones(5000), line, np.diag([3.0, 0, 0]), np.array([True, False, False]))
    assert "within one cube" in refusal(wire).message


def test_two_atoms_on_one_spot(water: System, copper: System) -> None:
    on_top = water.positions.copy()
    on_top[2] = on_top[0] + [0, 0, 0.01]
    with pytest.raises(StructureError, match=r"atoms 0 and 2 are 0\.01 Å apart, the least is 0\.1 Å"):
        check_graph(build_graph(replace(water, positions=on_top), 4.0))
    across = copper.positions.copy()
    across[1] = across[0] + copper.cell[0] * 2
    with pytest.raises(StructureError, match="atoms 0 and 1 are 0 Å apart"):
        check_graph(build_graph(replace(copper, positions=across), 4.0))


def test_an_atom_on_its_own_image() -> None:
    flat = make([1], np.zeros((1, 3)), np.diag([0.099, 0, 0]), [True, False, False])
    with pytest.raises(StructureError, match="atom 0 and its own image"):
        check_graph(build_graph(flat, 0.3))


def test_no_edges_is_no_fault(make_system: MakeSystem) -> None:
    check_graph(build_graph(make_system(ase.build.molecule("H")), 4.0))


CONFIG = ModelConfig(elements=(1, 8), levels_of_theory=("PBE",), charges=(-1, 0))


def test_supported_structures_pass_unchanged(water: System) -> None:
    assert check_supported(water, CONFIG) is water


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"atomic_numbers": np.array([8, 1, 79])}, "atomic_numbers", "atom 2 is Au"),
        ({"atomic_numbers": np.array([8, -3, 1])}, "atomic_numbers", "atom 1 is Z=-3"),
        ({"charge": 1}, "charge", "is 1 "),
        ({"spin_multiplicity": 3}, "spin_multiplicity", "is 3 "),
        ({"level_of_theory": 1}, "level_of_theory", "is 1 "),
        ({"level_of_theory": -1}, "level_of_theory", "is -1 "),
    ],
)
def test_what_the_model_does_not_know(
    water: System, fields: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(StructureError) as caught:
        check_supported(replace(water, **fields), CONFIG)
    assert caught.value.reason == "unsupported"
    assert caught.value.field == field
    assert words in caught.value.message


def test_a_spin_not_stated_becomes_the_models_only_one(water: System) -> None:
    singlets = replace(CONFIG, spin_multiplicities=(1,))
    assert check_supported(water, singlets).spin_multiplicity == 1
    with pytest.raises(StructureError, match="spin_multiplicity"):
        check_supported(water, replace(CONFIG, spin_multiplicities=(1, 3)))
