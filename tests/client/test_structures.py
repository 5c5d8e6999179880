"""What the client takes for a structure, and how it refuses what is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from equipot.client import InvalidRequest, InvalidStructure, Structure
from equipot.client.structures import as_structure, charge_and_spin, count_atoms, each_structure, pack

WATER: dict[str, Any] = {
    "atomic_numbers": [8, 1, 1],
    "positions": [[0, 0, 0.1], [0, 0.8, -0.5], [0, -0.8, -0.5]],
}


def test_atoms_dict_and_structure_mean_the_same() -> None:
    atoms = Atoms("OH2", WATER["positions"], cell=[[5, 0, 0], [1, 5, 0], [0, 0, 6]], pbc=[True, True, False])
    atoms.info.update(charge=-1, spin=2)
    cell = [[5, 0, 0], [1, 5, 0], [0, 0, 6]]
    fields: dict[str, Any] = {**WATER, "cell": cell, "pbc": [1, 1, 0], "charge": -1, "spin_multiplicity": 2}
    from_atoms, from_dict, plain = as_structure(atoms), as_structure(fields), Structure(**fields)
    for name in ("atomic_numbers", "positions", "cell", "pbc", "charge", "spin_multiplicity"):
        one, other, third = (np.asarray(getattr(s, name)) for s in (from_atoms, from_dict, plain))
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(other, third)
        assert one.dtype == other.dtype


def test_arrays_flatten_and_come_back() -> None:
    frames = [molecule(name) for name in ("H2O", "CH4", "H")]
    arrays = pack([as_structure(frame) for frame in frames])
    back = [as_structure(item) for item in each_structure(arrays)]
    for frame, structure in zip(frames, back, strict=True):
        np.testing.assert_array_equal(structure.positions, frame.positions)
        np.testing.assert_array_equal(structure.atomic_numbers, frame.numbers)


def test_a_structure_keeps_its_numbers_when_the_callers_array_changes() -> None:
    positions = np.array(WATER["positions"], dtype=float)
    structure = Structure(WATER["atomic_numbers"], positions)
    positions[0, 0] = 99.0
    assert structure.positions[0, 0] == 0.0


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"positions": [[0, 0, 0], [0, 0, np.nan], [0, 0, 1]]}, "positions", "not finite for atom 1"),
        ({"positions": [[0, 0], [0, 0], [0, 0]]}, "positions", r"shape \(3, 2\); give shape \(3, 3\)"),
        ({"positions": [[0, 0, 0], [0, 0]]}, "positions", "rows of equal length"),
        ({"positions": np.array([["a"] * 3] * 3)}, "positions", "give numbers"),
        ({"atomic_numbers": [8, 1, 0]}, "atomic_numbers", "is 0 for atom 2"),
        ({"atomic_numbers": [8, 1.5, 1]}, "atomic_numbers", "1.5 for atom 1"),
        ({"atomic_numbers": [8, 119, 1]}, "atomic_numbers", "119 for atom 1"),
        ({"atomic_numbers": [], "positions": np.zeros((0, 3))}, "atomic_numbers", "there are no atoms"),
        ({"atomic_numbers": [[8, 1, 1]]}, "atomic_numbers", r"shape \(1, 3\)"),
        ({"cell": np.full((3, 3), np.inf)}, "cell", "not finite for row 0"),
        ({"cell": [5, 5, 5]}, "cell", r"shape \(3,\)"),
        ({"pbc": [True, True]}, "pbc", "one bool or three"),
        ({"pbc": 2}, "pbc", "one bool or three"),
        ({"charge": 0.5}, "charge", "give an integer"),
        ({"charge": "+1"}, "charge", "give an integer"),
        ({"charge": 2**31}, "charge", "integer from"),
        ({"spin_multiplicity": -1}, "spin_multiplicity", "integer from 0"),
        ({"colour": 3}, "colour", "is no field of a structure"),
    ],
)
def test_what_is_no_structure_is_refused_by_field_with_a_remedy(
    change: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidStructure, match=says) as caught:
        as_structure({**WATER, **change})
    assert caught.value.field == field
    assert caught.value.remedy


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidStructure, match="positions: is missing"):
        as_structure({"atomic_numbers": [1]})


@pytest.mark.parametrize("wrong", ["H2O", b"H2O", 7, None])
def test_what_holds_no_structures_is_refused_as_a_whole(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="structures is"):
        each_structure(wrong)


def test_charge_and_spin_are_read_under_both_names() -> None:
    assert charge_and_spin({}) == (0, 0)
    assert charge_and_spin({"charge": np.int64(-2), "spin": 3.0}) == (-2, 3)
    assert charge_and_spin({"spin_multiplicity": 2, "spin": 2}) == (0, 2)
    with pytest.raises(InvalidStructure, match="both mean 2S"):
        charge_and_spin({"spin_multiplicity": 2, "spin": 1})


def test_atoms_of_a_refused_structure_are_counted_where_they_can_be() -> None:
    assert count_atoms({"atomic_numbers": [1, 1], "positions": 3}) == 2
    assert count_atoms({"positions": 3}) == 0
    assert count_atoms(molecule("CH4")) == 5
