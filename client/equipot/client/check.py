"""Has each model of a server compute a structure whose answer must obey physics. Knows no references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import numpy.typing as npt

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import StructureArrays, decode_predictions, encode_structures
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

SPACING = 1.6
"""Å between neighbours: within the cutoff of any potential, far from a collision for most elements."""

RELATIVE = 1e-4
"""float32 keeps seven digits; a model that is not invariant misses by far more than this."""

LEAST_ENERGY, LEAST_FORCE = 2e-3, 2e-3
"""eV and eV/Å that rounding may cost whatever the size of the numbers."""


Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """What one model answered.

    Attributes:
        model: its name.
        formula: of the cluster.
        energy: of the cluster in eV.
        largest_force: on an atom in eV/Å.
        energy_error: between two orientations in eV.
        force_error: between forces that were turned and forces of the turned cluster, or of their
            sum, in eV/Å.
        wrong: what is wrong with the answer; empty if nothing is.
    """

    model: str
    formula: str
    energy: float
    largest_force: float
    energy_error: float
    force_error: float
    wrong: str


def check(channel: grpc.Channel, *, timeout: float, metadata: Metadata) -> Iterator[Checked]:
    """Asks every model in memory for the same cluster in two orientations.

    What does not say which elements it knows, or knows no clusters, is left out: so are some potentials that
    are no bundles of ours.

    Raises:
        grpc.RpcError: a call failed.
    """
    stub = PotentialServiceStub(channel)
    for model in stub.ListModels(pb.ListModelsRequest(), timeout=timeout, metadata=metadata).models:
        if model.state not in (pb.MODEL_STATE_READY, pb.MODEL_STATE_UNSPECIFIED) or not model.elements:
            continue
        numbers = np.resize(np.array(model.elements, dtype=np.int32), 5)
        request = pb.PredictRequest(
            structures=encode_structures(_two_orientations(numbers, _charge(model))),
            model=f"{model.name}@{model.digest}",
            level_of_theory=model.levels_of_theory[0] if model.levels_of_theory else "",
        )
        reply = stub.Predict(request, timeout=timeout, metadata=metadata)
        if reply.failures and all(
            failure.reason == pb.FAILURE_REASON_UNSUPPORTED for failure in reply.failures
        ):
            continue
        yield _judged(model, numbers, reply)


def _charge(model: pb.Model) -> int:
    return 0 if 0 in model.charges or not model.charges else model.charges[0]


def _two_orientations(numbers: npt.NDArray[np.int32], charge: int) -> StructureArrays:
    positions = _cluster()
    return StructureArrays(
        n_atoms=np.array([5, 5], dtype=np.int64),
        atomic_numbers=np.concatenate([numbers, numbers]),
        positions=np.concatenate([positions, positions @ _rotation().T + 3.0]),
        cell=np.zeros((2, 3, 3)),
        pbc=np.zeros((2, 3), dtype=bool),
        charge=np.full(2, charge, dtype=np.int32),
        spin_multiplicity=np.zeros(2, dtype=np.int32),
    )


def _cluster() -> npt.NDArray[np.float64]:
    """Five atoms without any symmetry, (5, 3) in Å."""
    corners = [[0.0, 0.0, 0.0], [1.0, 0.1, 0.0], [-0.2, 1.1, 0.1], [0.1, -0.1, 1.05], [-0.9, -0.3, -0.4]]
    return SPACING * np.array(corners)


def _rotation() -> npt.NDArray[np.float64]:
    """By 0.7 rad about (1, 2, 3)."""
    x, y, z = np.array([1.0, 2.0, 3.0]) / np.sqrt(14.0)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    rotation: npt.NDArray[np.float64] = np.eye(3) + np.sin(0.7) * cross + (1 - np.cos(0.7)) * cross @ cross
    return rotation


def _judged(model: pb.Model, numbers: npt.NDArray[np.int32], reply: pb.PredictResponse) -> Checked:
    nothing = 4 * (np.nan,)
    formula = f"a cluster of atomic numbers {'-'.join(map(str, numbers))}"
    if reply.failures:
        failure = reply.failures[0]
        return Checked(model.name, formula, *nothing, f"{failure.field}: {failure.message}")
    answer = decode_predictions(reply, [5, 5])
    if answer.forces is None or not (np.isfinite(answer.energy).all() and np.isfinite(answer.forces).all()):
        return Checked(model.name, formula, *nothing, "the answer has no finite numbers")
    first, second = answer.forces[:5], answer.forces[5:]
    largest = float(np.linalg.norm(first, axis=1).max())
    energy_error = float(abs(answer.energy[0] - answer.energy[1]))
    force_error = float(np.abs(first @ _rotation().T - second).max())
    if model.force_mode == "conservative":
        force_error = max(force_error, float(np.abs(first.sum(axis=0)).max()) / 5)
    wrong = ""
    if energy_error > LEAST_ENERGY + RELATIVE * abs(float(answer.energy[0])):
        wrong = f"a turned cluster has another energy, by {energy_error:.3g} eV"
    elif force_error > LEAST_FORCE + RELATIVE * largest:
        wrong = f"forces do not turn with the cluster, or push it as a whole: by {force_error:.3g} eV/Å"
    return Checked(
        model.name, formula, float(answer.energy[0]), largest, energy_error, force_error, wrong=wrong
    )
