"""The page's JSON, and the messages of the service that it stands for. Knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from equipot.serve.errors import InvalidRequest
from equipot.serve.ui.values import Json, finite, text_of
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import CodecError, StructureArrays, decode_predictions, encode_structures

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
        "members": model.members,
        "is_calibrated": model.is_calibrated,
        "has_domain": model.has_domain,
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
    sure = pb.UncertaintyOptions() if body.get("uncertainty") else None
    return pb.PredictRequest(
        model=text_of(body, "model"),
        level_of_theory=text_of(body, "level_of_theory"),
        structures=structures_of(body.get("structures")),
        properties=[pb.PROPERTY_ENERGY, *([pb.PROPERTY_FORCES] if body.get("forces", True) else []), *stress],
        uncertainty=sure,
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
            if response.HasField("uncertainty"):
                result["uncertainty"] = _uncertainty_json(response.uncertainty, index, start, start + count)
            results.append(result)
        start += count
    return {"model": reference_json(response.model), "results": results}


def _uncertainty_json(told: pb.Uncertainty, index: int, start: int, end: int) -> Json:
    """How sure a structure's answer is; energies in eV, forces in eV/Å. None: the model cannot tell."""

    def one(raw: bytes) -> float | None:
        return finite(float(np.frombuffer(raw, dtype="<f8")[index])) if raw else None

    def each(raw: bytes) -> list[float | None] | None:
        return (
            [finite(value) for value in np.frombuffer(raw, dtype="<f8")[start:end].tolist()] if raw else None
        )

    outside = next((found for found in told.outside if found.index == index), None)
    return {
        "members": told.members,
        "coverage": told.coverage,
        "energy_spread": one(told.energy_spread),
        "energy_interval": one(told.energy_interval),
        "forces_spread": each(told.forces_spread),
        "forces_interval": each(told.forces_interval),
        "outside": None if outside is None else {"atom": outside.atom, "reason": outside.reason},
    }


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


def _whole(value: Any) -> int:  # noqa: ANN401  # whatever a file or a page has there
    try:
        whole = int(value)
        # A charge that only comes near a whole one is another charge, as clients find, too.
        if isinstance(value, str) or whole == value:
            return whole
    except (ValueError, TypeError, OverflowError):
        pass
    raise InvalidRequest(f"charge or spin is no whole number: {str(value)[:60]!r}")
