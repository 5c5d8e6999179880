"""Relaxations and dynamics of the page: its JSON, and the messages of the service that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equipot.serve.ui.messages import failure_json, reference_json, structures_of
from equipot.serve.ui.values import Json, finite, matrix, number_of, one_of, steps_of, text_of
from equipot.wire.v1 import potential_pb2 as pb

MOST_RELAXING = 100_000
"""Steps of a relaxation."""

MOST_MOVING = 20_000
"""Steps of a run of dynamics, which is to be looked at."""

FRAMES = 1_000
"""Of a run at most; the last one besides."""

COORDINATES = 3_000_000
"""Of all frames of a run together: what a browser holds with ease."""

OPTIMIZERS = {"fire": pb.OPTIMIZER_FIRE, "lbfgs": pb.OPTIMIZER_LBFGS}
CELLS = {
    "fixed": pb.CELL_MOTION_FIXED,
    "full": pb.CELL_MOTION_FULL,
    "isotropic": pb.CELL_MOTION_ISOTROPIC,
    "constant_volume": pb.CELL_MOTION_CONSTANT_VOLUME,
}

INTEGRATORS = {"nve": pb.INTEGRATOR_VELOCITY_VERLET, "langevin": pb.INTEGRATOR_LANGEVIN}


def relax_request(body: Mapping[str, Any]) -> pb.RelaxRequest:
    """What the page asks for, with every step told and where it led.

    Raises:
        InvalidRequest: as `structures_of`, or a setting that is none.
    """
    optimizer = one_of(body, "optimizer", OPTIMIZERS, usual="fire")
    cell = one_of(body, "cell", CELLS, usual="fixed")
    return pb.RelaxRequest(
        model=text_of(body, "model"),
        level_of_theory=text_of(body, "level_of_theory"),
        structures=structures_of(body.get("structures")),
        optimizer=optimizer,
        cell=cell,
        fmax=number_of(body, "fmax", usual=0.05, what="force above 0 in eV/Å"),
        max_steps=steps_of(body, "max_steps", usual=500, most=MOST_RELAXING),
        progress_every=1,
        progress_frames=True,
    )


def simulate_request(body: Mapping[str, Any]) -> pb.SimulateRequest:
    """What the page asks for: one structure whose velocities are drawn, with so many frames as can be shown.

    Raises:
        InvalidRequest: as `structures_of`, or a setting that is none.
    """
    structures = structures_of(body.get("structures"))
    steps = steps_of(body, "steps", usual=1_000, most=MOST_MOVING)
    shown = max(1, min(FRAMES, COORDINATES // (3 * max(1, sum(structures.n_atoms)))))
    return pb.SimulateRequest(
        model=text_of(body, "model"),
        level_of_theory=text_of(body, "level_of_theory"),
        structures=structures,
        integrator=one_of(body, "integrator", INTEGRATORS, usual="nve"),
        steps=steps,
        timestep=number_of(body, "timestep", usual=0.5, what="time above 0 in fs"),
        temperature=number_of(body, "temperature", usual=300.0, what="temperature above 0 in K"),
        frame_every=-(-steps // shown),
        frame_forces=True,
    )


def _geometry(told: pb.RelaxProgress | pb.RelaxResult | pb.MotionFrame) -> Json:
    """Where atoms and cell are, and the forces there."""
    return {
        "positions": matrix(told.positions),
        "cell": matrix(told.cell),
        "forces": matrix(told.forces),
    }


def relax_json(reply: pb.RelaxReply) -> Json | None:
    """A line of a relaxation; None for what the page does not need."""
    match reply.WhichOneof("kind"):
        case "begun":
            return {"kind": "begun", "model": reference_json(reply.begun.model)}
        case "progress":
            told = reply.progress
            return {
                "kind": "step",
                "step": told.step,
                "energy": finite(told.energy),
                "fmax": finite(told.largest_force),
                **_geometry(told),
            }
        case "result":
            result = reply.result
            failed = result.HasField("failure")
            return {
                "kind": "result",
                "converged": result.converged,
                "steps": result.steps,
                "energy": finite(result.energy),
                **_geometry(result),
                "stress": matrix(result.stress),
                "failure": failure_json(result.failure) if failed else None,
            }
    return None


def simulate_json(reply: pb.SimulateReply) -> Json | None:
    """A line of a run; None for what the page does not need. Energies in eV, temperature in K."""
    match reply.WhichOneof("kind"):
        case "begun":
            told = reply.begun
            return {
                "kind": "begun",
                "model": reference_json(told.model),
                "warnings": list(told.warnings),
            }
        case "frame":
            frame = reply.frame
            return {
                "kind": "step",
                "step": frame.step,
                "energy": finite(frame.energy),
                "kinetic": finite(frame.kinetic_energy),
                "temperature": finite(frame.temperature),
                **_geometry(frame),
            }
        case "result":
            result = reply.result
            failed = result.HasField("failure")
            return {
                "kind": "result",
                "steps": result.steps,
                "failure": failure_json(result.failure) if failed else None,
            }
    return None
