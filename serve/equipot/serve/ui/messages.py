"""The page's JSON, and the messages of the service that it stands for. Knows no HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from equipot.serve.errors import InvalidRequest
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import CodecError, StructureArrays, decode_predictions, encode_structures

Json = dict[str, Any]

OPTIMIZERS = {"fire": pb.OPTIMIZER_FIRE, "lbfgs": pb.OPTIMIZER_LBFGS}
CELLS = {
    "fixed": pb.CELL_MOTION_FIXED,
    "full": pb.CELL_MOTION_FULL,
    "isotropic": pb.CELL_MOTION_ISOTROPIC,
    "constant_volume": pb.CELL_MOTION_CONSTANT_VOLUME,
}

_LEFT_OUT = ("shards", "references", "config", "format", "digest", "name")
"""Of a card: what no one looks at, or what is told besides."""


def elements_json() -> Json:
    """What the page draws atoms with, by atomic number: symbols, radii in Å, colours as #rrggbb."""
    rgb = np.rint(255 * np.asarray(jmol_colors)).astype(int)
    colors = ["#{:02x}{:02x}{:02x}".format(*color) for color in rgb]
    # ASE has colours for fewer elements than there are.
    colors += ["#ff69b4"] * (len(chemical_symbols) - len(colors))
    return {
        "symbols": chemical_symbols,
        "radii": [round(float(radius), 3) for radius in covalent_radii],
        "colors": colors,
    }


def model_json(model: pb.Model) -> Json:
    """A model and its card."""
    try:
        card = json.loads(model.card_json, parse_constant=lambda word: None) if model.card_json else {}
    except ValueError:
        card = {}
    return {
        "name": model.name,
        "version": model.version,
        "digest": model.digest,
        "labels": list(model.labels),
        "state": pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        "reason": model.reason,
        "is_default": model.is_default,
        "is_current": model.is_current,
        "elements": list(model.elements),
        "levels_of_theory": list(model.levels_of_theory),
        "cutoff": model.cutoff,
        "force_mode": model.force_mode,
        "has_stress": model.has_stress,
        "dtype": model.dtype,
        "n_parameters": model.n_parameters,
        "card": {key: value for key, value in card.items() if key not in _LEFT_OUT},
    }


def frame_json(atoms: Atoms) -> Json:
    """A structure of a file."""
    info = atoms.info
    return {
        "formula": atoms.get_chemical_formula(),
        "atomic_numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell[:].tolist(),
        "pbc": atoms.pbc.tolist(),
        "charge": _whole(info.get("charge", 0)),
        "spin_multiplicity": _whole(info.get("spin_multiplicity", info.get("spin", 0))),
    }


def structures_of(frames: object) -> pb.Structures:
    """Structures of the page, as they are sent.

    Raises:
        InvalidRequest: a field is missing or malformed, by its name.
    """
    if not isinstance(frames, Sequence) or not frames or not all(isinstance(one, Mapping) for one in frames):
        raise InvalidRequest("give a list of at least one structure", field="structures")
    try:
        numbers = [_array(frame, "atomic_numbers", np.int32, 1) for frame in frames]
        return encode_structures(
            StructureArrays(
                n_atoms=np.array([len(one) for one in numbers], dtype=np.int64),
                atomic_numbers=np.concatenate(numbers),
                positions=np.concatenate([_array(frame, "positions", np.float64, 2) for frame in frames]),
                cell=np.stack([_array(frame, "cell", np.float64, 2) for frame in frames]),
                pbc=np.stack([_array(frame, "pbc", np.bool_, 1) for frame in frames]),
                charge=np.array([_whole(frame.get("charge", 0)) for frame in frames], dtype=np.int32),
                spin_multiplicity=np.array(
                    [_whole(frame.get("spin_multiplicity", 0)) for frame in frames], dtype=np.int32
                ),
            )
        )
    except CodecError as error:
        raise InvalidRequest(str(error), field=f"structures.{error.field}") from error
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"the arrays of the structures do not fit: {error}", field="structures"
        ) from error


def predict_request(body: Mapping[str, Any]) -> pb.PredictRequest:
    """What the page asks for.

    Raises:
        InvalidRequest: as `structures_of`.
    """
    stress = [pb.PROPERTY_STRESS] if body.get("stress") else []
    return pb.PredictRequest(
        model=_text(body, "model"),
        level_of_theory=_text(body, "level_of_theory"),
        structures=structures_of(body.get("structures")),
        properties=[pb.PROPERTY_ENERGY, *([pb.PROPERTY_FORCES] if body.get("forces", True) else []), *stress],
    )


def relax_request(body: Mapping[str, Any]) -> pb.RelaxRequest:
    """What the page asks for, with every step told and where it led.

    Raises:
        InvalidRequest: as `structures_of`, or a setting that is none.
    """
    optimizer, cell = _text(body, "optimizer") or "fire", _text(body, "cell") or "fixed"
    for name, word, known in (("optimizer", optimizer, OPTIMIZERS), ("cell", cell, CELLS)):
        if word not in known:
            raise InvalidRequest(f"{name} is {word[:100]!r}: give one of {', '.join(known)}", field=name)
    fmax, steps = body.get("fmax", 0.05), body.get("max_steps", 500)
    if not _is_number(fmax) or not math.isfinite(fmax) or fmax <= 0:
        raise InvalidRequest("fmax is no force above 0 in eV/Å", field="fmax")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps < 2**32:
        raise InvalidRequest("max_steps is no number of steps", field="max_steps")
    return pb.RelaxRequest(
        model=_text(body, "model"),
        level_of_theory=_text(body, "level_of_theory"),
        structures=structures_of(body.get("structures")),
        optimizer=OPTIMIZERS[optimizer],
        cell=CELLS[cell],
        fmax=fmax,
        max_steps=steps,
        progress_every=1,
        progress_frames=True,
    )


def predictions_json(response: pb.PredictResponse, n_atoms: Sequence[int]) -> Json:
    """What each structure came to, or why it failed; energies in eV, forces in eV/Å, stress in eV/Å³."""
    answer = decode_predictions(response, n_atoms)
    failures = {failure.index: failure for failure in response.failures}
    results: list[Json] = []
    start = 0
    for index, count in enumerate(n_atoms):
        if (failure := failures.get(index)) is not None:
            results.append({"failure": failure_json(failure)})
        else:
            result: Json = {"energy": float(answer.energy[index])}
            if answer.forces is not None:
                result["forces"] = answer.forces[start : start + count].tolist()
            if answer.stress is not None:
                result["stress"] = answer.stress[index].tolist()
            results.append(result)
        start += count
    return {"model": reference_json(response.model), "results": results}


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
                "energy": _finite(told.energy),
                "fmax": _finite(told.largest_force),
                "positions": _matrix(told.positions),
                "cell": _matrix(told.cell),
                "forces": _matrix(told.forces),
            }
        case "result":
            result = reply.result
            failed = result.HasField("failure")
            return {
                "kind": "result",
                "converged": result.converged,
                "steps": result.steps,
                "energy": _finite(result.energy),
                "positions": _matrix(result.positions),
                "cell": _matrix(result.cell),
                "forces": _matrix(result.forces),
                "stress": _matrix(result.stress),
                "failure": failure_json(result.failure) if failed else None,
            }
    return None


def failure_json(failure: pb.Failure) -> Json:
    """Why a structure failed."""
    return {"field": failure.field, "message": failure.message, "remedy": failure.remedy}


def reference_json(model: pb.ModelReference) -> Json:
    """What computed an answer."""
    return {
        "name": model.name,
        "version": model.version,
        "digest": model.digest,
        "level_of_theory": model.level_of_theory,
        "dtype": model.dtype,
    }


def _array(frame: Mapping[str, Any], name: str, dtype: type[np.generic], ndim: int) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(frame.get(name), dtype=dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidRequest(f"{name} is no array of numbers: {error}", field=f"structures.{name}") from error
    if array.ndim != ndim:
        raise InvalidRequest(
            f"{name} has {array.ndim} dimensions and needs {ndim}", field=f"structures.{name}"
        )
    return array


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is no text", field=name)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> int:  # noqa: ANN401  # whatever a file or a page has there
    try:
        return int(value)
    except (ValueError, TypeError, OverflowError):
        raise InvalidRequest(f"charge or spin is no whole number: {str(value)[:60]!r}") from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _matrix(raw: bytes) -> list[list[float | None]] | None:
    """(n, 3) float64; what is not finite, as after an explosion, is no JSON."""
    if not raw:
        return None
    rows = np.frombuffer(raw, dtype="<f8").reshape(-1, 3)
    if np.isfinite(rows).all():
        return rows.tolist()
    return [[_finite(value) for value in row] for row in rows.tolist()]
