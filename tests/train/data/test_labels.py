"""Which keys are labels, what they mean, and which wins."""

from typing import Any

import numpy as np
import pytest

from equipot.train.sources.base import FrameError, ReadOptions, Reason
from equipot.train.sources.labels import FrameLabels, find_charge_and_spin, find_labels

CELL = np.diag([2.0, 3.0, 4.0])
PERIODIC = np.ones(3, dtype=bool)
FORCES = np.array([[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])
STRESS = np.array([[1.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 3.0]])


def find(values: dict[str, Any], pbc: np.ndarray = PERIODIC, **options: Any) -> FrameLabels:
    return find_labels(values, 2, CELL, pbc, ReadOptions(**options))


def codes(labels: FrameLabels) -> list[str]:
    return [note.code for note in labels.notes]


@pytest.mark.parametrize(
    "key",
    ["energy", "REF_energy", "ref_energy", "dft_energy", "DFT_energy", "TotEnergy", "Energy", "total_energy",
     "energy_dft", "potential_energy"],
)  # fmt: skip
def test_every_name_of_the_energy(key: str) -> None:
    assert find({key: -3.5, "forces": FORCES}).energy == -3.5


@pytest.mark.parametrize(
    "key",
    ["forces", "force", "REF_forces", "ref_forces", "dft_forces", "DFT_forces", "forces_dft", "DFT_force"],
)
def test_every_name_of_the_forces(key: str) -> None:
    forces = find({"energy": 0.0, key: FORCES}).forces
    np.testing.assert_array_equal(forces, FORCES)


@pytest.mark.parametrize("key", ["stress", "REF_stress", "dft_stress"])
@pytest.mark.parametrize("form", ["matrix", "nine", "voigt"])
def test_stress_in_each_form(key: str, form: str) -> None:
    value = {"matrix": STRESS, "nine": STRESS.ravel(), "voigt": np.array([1.0, 2.0, 3.0, 0.4, 0.5, 0.6])}[
        form
    ]
    stress = find({"energy": 0.0, key: value}).stress
    assert stress is not None
    np.testing.assert_allclose(stress, STRESS)


@pytest.mark.parametrize("key", ["virial", "virials", "REF_virial", "REF_virials", "dft_virial"])
@pytest.mark.parametrize("shape", [(3, 3), (9,)])
def test_a_virial_is_minus_stress_times_volume(key: str, shape: tuple[int, ...]) -> None:
    labels = find({"energy": 0.0, key: (-STRESS * 24.0).reshape(shape)})
    assert labels.stress is not None
    np.testing.assert_allclose(labels.stress, STRESS)
    assert not any("differs" in code for code in codes(labels))


def test_a_virial_that_agrees_with_the_stress_is_no_contradiction() -> None:
    assert not any(
        "differs" in c for c in codes(find({"energy": 0.0, "stress": STRESS, "virial": -STRESS * 24}))
    )
    assert any("differs" in c for c in codes(find({"energy": 0.0, "stress": STRESS, "virial": STRESS * 24})))


def test_a_virial_has_the_sign_of_a_real_compressed_crystal() -> None:
    from ase.build import bulk
    from ase.calculators.emt import EMT

    atoms = bulk("Cu", a=3.4)
    atoms.calc = EMT()
    stress = atoms.get_stress(voigt=False)
    assert np.trace(stress) < 0  # compressed: the crystal pushes outwards, negative in ASE's sign
    virial = -stress * atoms.get_volume()
    values = {"energy": atoms.get_potential_energy(), "virial": virial}
    found = find_labels(values, 1, atoms.cell.array, atoms.pbc, ReadOptions()).stress
    assert found is not None
    np.testing.assert_allclose(found, stress, atol=1e-12)


def test_stress_without_periodicity_is_left_out() -> None:
    labels = find({"energy": 0.0, "forces": FORCES, "stress": np.zeros(6)}, pbc=np.array([True, True, False]))
    assert labels.stress is None
    assert codes(labels) == ["stress: left out where not periodic in all three directions"]


def test_reference_keys_win_over_plain_ones_and_a_note_says_so() -> None:
    labels = find({"energy": -1.0, "REF_energy": -2.0, "forces": FORCES, "REF_forces": 2 * FORCES})
    assert labels.energy == -2.0
    np.testing.assert_array_equal(labels.forces, 2 * FORCES)
    assert codes(labels) == [
        "energy: REF_energy taken, energy differs (--energy-key chooses)",
        "forces: REF_forces taken, forces differs (--forces-key chooses)",
    ]


def test_equal_values_under_two_keys_are_no_contradiction() -> None:
    assert find({"energy": -2.0, "REF_energy": -2.0, "forces": FORCES, "free_energy": -2.1}).notes == ()


def test_the_named_key_is_the_only_one() -> None:
    values = {"energy": -1.0, "REF_energy": -2.0, "my_e": -3.0, "forces": FORCES, "my_f": 3 * FORCES}
    labels = find(values, energy_key="my_e", forces_key="my_f")
    assert labels.energy == -3.0
    np.testing.assert_array_equal(labels.forces, 3 * FORCES)
    with pytest.raises(FrameError, match=r"no other; keys there: energy, forces"):
        find({"energy": -1.0, "forces": FORCES}, energy_key="other")


def test_free_energy_is_the_last_resort() -> None:
    labels = find({"free_energy": -7.0, "forces": FORCES})
    assert labels.energy == -7.0
    assert codes(labels) == ["energy: free_energy taken, no other energy is there"]


def test_energies_per_atom_become_totals() -> None:
    assert find({"energy_per_atom": -3.0, "forces": FORCES}).energy == -6.0
    assert find({"energy": -3.0, "forces": FORCES}, energy_per_atom=True).energy == -6.0
    assert find({"energy_per_atom": -3.0, "forces": FORCES}, energy_per_atom=True).energy == -6.0


@pytest.mark.parametrize(
    ("values", "reason", "words"),
    [
        ({"forces": FORCES}, Reason.NO_LABEL, "keys there: forces"),
        ({"energy": None, "forces": FORCES}, Reason.NO_LABEL, "keys there"),
        ({"energy": np.nan, "forces": FORCES}, Reason.NON_FINITE_LABEL, "energy holds nan"),
        ({"energy": "none"}, Reason.WRONG_SHAPE, "energy does not hold numbers"),
        ({"energy": [1.0, 2.0]}, Reason.WRONG_SHAPE, "expected one number"),
        ({"energy": 0.0, "forces": FORCES.T}, Reason.WRONG_SHAPE, r"shape \(3, 2\), expected \(2, 3\)"),
        ({"energy": 0.0, "forces": FORCES.ravel()}, Reason.WRONG_SHAPE, r"expected \(2, 3\)"),
        (
            {"energy": 0.0, "forces": FORCES * np.inf},
            Reason.NON_FINITE_LABEL,
            r"forces holds inf at \(0, 0\)",
        ),
        ({"energy": 0.0, "stress": np.ones(5)}, Reason.WRONG_SHAPE, r"stress has shape \(5,\)"),
        ({"energy": 0.0, "stress": STRESS * np.nan}, Reason.NON_FINITE_LABEL, "stress holds nan"),
        ({"energy": 0.0, "energy_unit": "Hartree"}, Reason.UNIT, "energy_unit=Hartree; convert"),
        ({"energy": 0.0, "forces": FORCES, "forces_unit": "Ha/bohr"}, Reason.UNIT, "forces_unit=Ha/bohr"),
    ],
)
def test_labels_that_cannot_be_used(values: dict[str, Any], reason: Reason, words: str) -> None:
    with pytest.raises(FrameError, match=words) as caught:
        find(values)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, (0, 0)),
        ({"charge": -1, "spin": 2}, (-1, 2)),
        ({"charge": 1.0, "spin_multiplicity": 3}, (1, 3)),
        ({"total_charge": 2, "multiplicity": 1}, (2, 1)),
        ({"spin": 1, "spin_multiplicity": 2}, (0, 2)),
    ],
)
def test_charge_and_spin(info: dict[str, Any], expected: tuple[int, int]) -> None:
    assert find_charge_and_spin(info) == expected


@pytest.mark.parametrize(
    "info", [{"charge": 0.5}, {"spin": -1}, {"spin": "high"}, {"charge": np.nan}, {"charge": [0, 1]}]
)
def test_impossible_charge_or_spin(info: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        find_charge_and_spin(info)
