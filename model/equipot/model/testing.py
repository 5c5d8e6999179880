"""Physics that any potential must obey, as checks to call from tests; AssertionError carries the numbers.

A new architecture is registered, then run through `CHECKS` (and `CONSERVATIVE_CHECKS` if its forces are a
gradient) on graphs of molecules, crystals and both in one batch, with parameters in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.model.batch import Graph, System, build_graph, collate
from equipot.model.potential import Potential

Floats = NDArray[np.float64]
Check = Callable[[Potential, Sequence[Graph]], None]

ATOL = {torch.float32: 1e-4, torch.float64: 1e-9}
"""eV, eV/Å and eV/Å³: what exact symmetries may miss by rounding."""
GRADIENT_ATOL = 1e-6
"""What central differences with steps of `_STEP` may miss at float64, of 1 eV/Å, 1 eV/Å³ or the largest."""
_STEP = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Prediction for one structure."""

    energy: float
    forces: Floats
    stress: Floats | None


def predict(model: Potential, graphs: Sequence[Graph]) -> list[Result]:
    """Predictions of one batch, one result per graph; stress where the model has one."""
    conservative = model.config.forces == "conservative"
    out = model(collate(graphs, dtype=_dtype(model)), stress=conservative)
    forces = np.split(out.forces.double().numpy(), np.cumsum([graph.n_atoms for graph in graphs])[:-1])
    stresses = out.stress.double().numpy() if conservative else [None] * len(graphs)
    for field, values in (("energy", out.energy), ("forces", out.forces)):
        assert torch.isfinite(values).all(), f"{field} holds values that are not finite: {values.tolist()}"
    return [Result(*row) for row in zip(out.energy.tolist(), forces, stresses, strict=True)]


def check_rotation(model: Potential, graphs: Sequence[Graph]) -> None:
    """Energy is kept, forces and stress turn with the structure, under a rotation and an inversion."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    rotation *= np.linalg.det(rotation)
    for turn in (rotation, -np.eye(3)):
        turned = _rebuilt(model, graphs, partial(_deformed, by=turn.T))
        expected = [
            Result(r.energy, r.forces @ turn.T, None if r.stress is None else turn @ r.stress @ turn.T)
            for r in predict(model, graphs)
        ]
        _same(model, "rotation or inversion", predict(model, turned), expected)


def check_translation(model: Potential, graphs: Sequence[Graph]) -> None:
    """Nothing changes when all atoms move together."""
    moved = _rebuilt(model, graphs, lambda s: replace(s, positions=s.positions + np.array([3.1, -7.7, 0.4])))
    _same(model, "translation", predict(model, moved), predict(model, graphs))


def check_permutation(model: Potential, graphs: Sequence[Graph]) -> None:
    """Forces follow their atoms when these are listed in another order."""
    rng = np.random.default_rng(1)
    orders = [rng.permutation(graph.n_atoms) for graph in graphs]
    permuted = [
        _rebuild(model, _take(graph.system, order)) for graph, order in zip(graphs, orders, strict=True)
    ]
    expected = [
        replace(result, forces=result.forces[order])
        for result, order in zip(predict(model, graphs), orders, strict=True)
    ]
    _same(model, "permutation", predict(model, permuted), expected)


def check_supercell(model: Potential, graphs: Sequence[Graph]) -> None:
    """A cell doubled along each periodic direction has twice the energy, the same forces and stress."""
    for axis in range(3):
        periodic = [graph for graph in graphs if graph.system.pbc[axis]]
        if not periodic:
            continue
        doubled = _rebuilt(model, periodic, partial(_doubled, axis=axis))
        expected = [
            Result(2 * r.energy, np.concatenate([r.forces, r.forces]), r.stress)
            for r in predict(model, periodic)
        ]
        _same(model, f"doubling along axis {axis}", predict(model, doubled), expected)


def check_lattice_vector_move(model: Potential, graphs: Sequence[Graph]) -> None:
    """Nothing changes when one atom is replaced by a periodic image of itself."""
    for axis in range(3):
        periodic = [graph for graph in graphs if graph.system.pbc[axis]]
        if not periodic:
            continue
        moved = _rebuilt(model, periodic, partial(_lattice_moved, axis=axis))
        _same(model, f"lattice vector {axis}", predict(model, moved), predict(model, periodic))


def check_batch_equals_single(model: Potential, graphs: Sequence[Graph]) -> None:
    """Who shares a structure's batch does not matter, nor in which order."""
    alone = [predict(model, [graph])[0] for graph in graphs]
    _same(model, "batch against single", predict(model, graphs), alone)
    _same(model, "batch in reverse", predict(model, graphs[::-1])[::-1], alone)


def check_large_separation(model: Potential, graphs: Sequence[Graph]) -> None:
    """Two isolated structures far apart are a sum: energies add, forces stay."""
    isolated = [graph.system for graph in graphs if not graph.system.pbc.any()]
    for one, other in pairwise(isolated):
        if (one.charge, one.spin_multiplicity, one.level_of_theory) != (
            other.charge,
            other.spin_multiplicity,
            other.level_of_theory,
        ):
            continue
        away = replace(other, positions=other.positions + np.array([1000.0, 0.0, 0.0]))
        joined = replace(
            one,
            atomic_numbers=np.concatenate([one.atomic_numbers, away.atomic_numbers]),
            positions=np.concatenate([one.positions, away.positions]),
        )
        first, second = predict(model, [_rebuild(model, one), _rebuild(model, other)])
        expected = Result(
            first.energy + second.energy, np.concatenate([first.forces, second.forces]), first.stress
        )
        _same(model, "large separation", predict(model, [_rebuild(model, joined)]), [expected])


def check_cutoff(model: Potential, graphs: Sequence[Graph]) -> None:
    """An edge as long as the cutoff exerts exactly nothing, and a shorter one vanishes smoothly.

    Of the graphs only the kinds of atoms are used, in pairs.
    """
    cutoff = model.config.cutoff
    number = int(graphs[0].system.atomic_numbers[0])

    def pair(distance: float) -> Result:
        positions = np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])
        system = replace(
            graphs[0].system,
            atomic_numbers=np.array([number, number]),
            positions=positions,
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, dtype=bool),
        )
        # The edges are given, not looked for: a neighbour list would leave these out.
        edges = np.array([1, 0]), np.array([0, 1]), np.zeros((2, 3), dtype=np.int64)
        return predict(model, [Graph(system, *edges)])[0]

    at, beyond, inside = pair(cutoff), pair(1.5 * cutoff), pair(0.6 * cutoff)
    for where, result in (("at", at), ("beyond", beyond)):
        assert not result.forces.any(), f"{where} the cutoff the force is {result.forces.tolist()}, not 0"
    assert inside.forces.any(), "inside the cutoff two atoms exert no force: nothing was tested"
    assert beyond.energy == at.energy, f"energy {beyond.energy} beyond the cutoff, {at.energy} at it"
    # With two continuous derivatives of the energy, halving the distance to the cutoff quarters the force,
    # once it is so small that no higher power counts, however steep the basis is there.
    near, nearer = (abs(pair(cutoff * (1 - gap)).forces).max() for gap in (0.002, 0.001))
    assert nearer < 0.3 * near + 1e-12, (
        f"the force does not fade: {near} at 0.2 %, {nearer} at 0.1 % of the cutoff"
    )


def check_isolated_atoms(model: Potential, graphs: Sequence[Graph]) -> None:
    """Atoms without neighbours have zero forces, alone, in a batch of their like and beside the graphs."""
    single = replace(
        _take(graphs[0].system, np.array([0])), cell=np.zeros((3, 3)), pbc=np.zeros(3, dtype=bool)
    )
    atom = _rebuild(model, single)
    for batch in ([atom], [atom, atom], [atom, *graphs, atom]):
        for result in (predict(model, batch)[0], predict(model, batch)[-1]):
            if result.forces.shape == (1, 3):
                assert not result.forces.any(), f"an atom alone feels {result.forces.tolist()}"
    _same(model, "an atom beside others", predict(model, [atom, *graphs])[1:], predict(model, graphs))


def check_forces_are_gradient(model: Potential, graphs: Sequence[Graph]) -> None:
    """Forces are minus the energy's central differences, for every coordinate."""
    for graph, result in zip(graphs, predict(model, graphs), strict=True):
        shifts = [
            (atom, sign * _STEP * np.eye(3)[axis])
            for atom in range(graph.n_atoms)
            for axis in range(3)
            for sign in (1, -1)
        ]
        moved = [_rebuild(model, _moved(graph.system, *shift)) for shift in shifts]
        energies = np.array([r.energy for r in predict(model, moved)]).reshape(-1, 3, 2)
        differences = -(energies[..., 0] - energies[..., 1]) / (2 * _STEP)
        _close_to_differences("forces", result.forces, differences)


def check_stress_is_gradient(model: Potential, graphs: Sequence[Graph]) -> None:
    """Stress is the energy's central difference by a strain over the volume; NaN without a volume."""
    for graph, result in zip(graphs, predict(model, graphs), strict=True):
        assert result.stress is not None, "a conservative model must have a stress"
        if not graph.system.pbc.all():
            assert np.isnan(result.stress).all(), f"stress {result.stress.tolist()} where there is no volume"
            continue
        numeric = np.zeros((3, 3))
        for i, j in np.ndindex(3, 3):
            strain = np.zeros((3, 3))
            strain[i, j] += _STEP / 2
            strain[j, i] += _STEP / 2
            plus, minus = (
                predict(model, [_rebuild(model, _deformed(graph.system, np.eye(3) + sign * strain))])[
                    0
                ].energy
                for sign in (1, -1)
            )
            numeric[i, j] = (plus - minus) / (2 * _STEP * abs(np.linalg.det(graph.system.cell)))
        _close_to_differences("stress", result.stress, numeric)


CHECKS: tuple[Check, ...] = (
    check_rotation,
    check_translation,
    check_permutation,
    check_supercell,
    check_lattice_vector_move,
    check_batch_equals_single,
    check_large_separation,
    check_cutoff,
    check_isolated_atoms,
)
CONSERVATIVE_CHECKS: tuple[Check, ...] = (check_forces_are_gradient, check_stress_is_gradient)


def _dtype(model: Potential) -> torch.dtype:
    return next(model.parameters()).dtype


def _rebuild(model: Potential, system: System) -> Graph:
    return build_graph(system, model.config.cutoff)


def _rebuilt(model: Potential, graphs: Sequence[Graph], change: Callable[[System], System]) -> list[Graph]:
    return [_rebuild(model, change(graph.system)) for graph in graphs]


def _take(system: System, order: NDArray[np.int64]) -> System:
    return replace(system, atomic_numbers=system.atomic_numbers[order], positions=system.positions[order])


def _moved(system: System, atom: int, by: Floats) -> System:
    positions = system.positions.copy()
    positions[atom] += by
    return replace(system, positions=positions)


def _lattice_moved(system: System, axis: int) -> System:
    return _moved(system, 0, -2 * system.cell[axis])


def _deformed(system: System, by: Floats) -> System:
    return replace(system, positions=system.positions @ by, cell=system.cell @ by)


def _doubled(system: System, axis: int) -> System:
    cell = system.cell.copy()
    cell[axis] *= 2
    return replace(
        system,
        atomic_numbers=np.tile(system.atomic_numbers, 2),
        positions=np.concatenate([system.positions, system.positions + system.cell[axis]]),
        cell=cell,
    )


def _same(model: Potential, what: str, actual: Sequence[Result], expected: Sequence[Result]) -> None:
    atol = ATOL[_dtype(model)]
    for one, other in zip(actual, expected, strict=True):
        _close(f"{what}: energy", np.array(one.energy), np.array(other.energy), atol)
        _close(f"{what}: forces", one.forces, other.forces, atol)
        if one.stress is not None and other.stress is not None:
            _close(f"{what}: stress", one.stress, other.stress, atol)


def _close(what: str, actual: Floats, expected: Floats, atol: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=atol, err_msg=what)


def _close_to_differences(what: str, actual: Floats, expected: Floats) -> None:
    # The differences' own error grows with how steep the energy is.
    _close(what, actual, expected, GRADIENT_ATOL * max(1.0, float(abs(actual).max())))
