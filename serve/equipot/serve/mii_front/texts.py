"""Structures and answers as JSON in strings, which is all that MII carries. Knows nothing of MII."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from equipot.serve.errors import CallError, InvalidRequest, OverLimit
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import CodecError, StructureArrays, decode_predictions, encode_structures

FIELDS = ("atomic_numbers", "positions", "cell", "pbc", "charge", "spin_multiplicity")
OPTIONS = ("model", "level_of_theory", "properties")

PROPERTIES = {
    "energy": pb.PROPERTY_ENERGY,
    "forces": pb.PROPERTY_FORCES,
    "stress": pb.PROPERTY_STRESS,
}


def within(text: str, most_bytes: int) -> None:
    """Raises OverLimit if a request is larger than a message may be."""
    # Text beyond ASCII has more bytes than characters, and none of ours needs any.
    if len(text) > most_bytes:
        raise OverLimit(
            f"the request has {len(text)} bytes, the limit is {most_bytes}: send fewer atoms",
            facts={"max_message_bytes": str(most_bytes)},
        )


def request_of(text: str, options: Mapping[str, object]) -> pb.PredictRequest:
    """One structure, and what is wanted of it.

    Args:
        text: a JSON object of `FIELDS`: atomic_numbers (N,), positions (N, 3) in Å, and where they apply cell
            (3, 3) in Å, pbc (3,), charge, spin_multiplicity.
        options: of `OPTIONS`, strings as in PredictRequest; properties separated by commas.

    Raises:
        InvalidRequest: it cannot be understood; the message names the field.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise InvalidRequest(f"{unknown[0]} is no option; options are {', '.join(OPTIONS)}", field=unknown[0])
    properties = []
    for name in str(options.get("properties", "energy,forces")).split(","):
        if name.strip() not in PROPERTIES:
            raise InvalidRequest(
                f"{name.strip()[:50]!r} is no property; they are {', '.join(PROPERTIES)}", field="properties"
            )
        properties.append(PROPERTIES[name.strip()])
    return pb.PredictRequest(
        model=str(options.get("model", "")),
        level_of_theory=str(options.get("level_of_theory", "")),
        properties=properties,
        structures=_structure(text),
    )


def _structure(text: str) -> pb.Structures:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the request is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("the request is no JSON object")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise InvalidRequest(
            f"{unknown[0][:50]!r} is no field; fields are {', '.join(FIELDS)}", field=unknown[0][:50]
        )
    numbers = _whole(fields, "atomic_numbers", (-1,), None)
    n_atoms = len(numbers)
    try:
        return encode_structures(
            StructureArrays(
                n_atoms=np.array([n_atoms]),
                atomic_numbers=numbers.astype(np.int32),
                positions=_real(fields, "positions", (n_atoms, 3), None),
                cell=_real(fields, "cell", (1, 3, 3), np.zeros((1, 3, 3))),
                pbc=_array(fields, "pbc", (1, 3), np.zeros((1, 3), dtype=bool), "b").astype(bool),
                charge=_whole(fields, "charge", (1,), np.zeros(1)).astype(np.int32),
                spin_multiplicity=_whole(fields, "spin_multiplicity", (1,), np.zeros(1)).astype(np.int32),
            )
        )
    except CodecError as error:
        raise InvalidRequest(str(error), field=error.field) from error


def _real(fields: Mapping[str, Any], name: str, shape: tuple[int, ...], default: Any) -> Any:  # noqa: ANN401
    return _array(fields, name, shape, default, "iuf").astype(np.float64)


def _whole(fields: Mapping[str, Any], name: str, shape: tuple[int, ...], default: Any) -> Any:  # noqa: ANN401
    array = _array(fields, name, shape, default, "iu")
    if array.size and not (np.abs(array.astype(np.float64)) < 2**31).all():
        raise InvalidRequest(f"{name} has a number of more than 31 bits", field=name)
    return array


def _array(
    fields: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    default: Any,  # noqa: ANN401
    kinds: str,
) -> Any:  # noqa: ANN401
    if name not in fields or fields[name] is None:
        if default is None:
            raise InvalidRequest(f"{name} is missing", field=name)
        return default
    try:
        array = np.array(fields[name])
    except ValueError as error:
        raise InvalidRequest(f"{name} is not an array: {error}", field=name) from error
    if array.dtype.kind not in kinds and array.size:
        raise InvalidRequest(f"{name} does not hold {_WORDS[kinds]}", field=name)
    try:
        return array.reshape(shape)
    except ValueError as error:
        wanted = " × ".join(str(side) for side in shape if side > 0)
        raise InvalidRequest(f"{name} has the shape {array.shape}, not {wanted}", field=name) from error


_WORDS = {"iu": "whole numbers", "iuf": "numbers", "b": "true and false"}


def text_of(request: pb.PredictRequest, response: pb.PredictResponse) -> str:
    """The answer to one structure, or its failure."""
    (n_atoms,) = request.structures.n_atoms
    arrays = decode_predictions(response, [n_atoms])
    if arrays.failures:
        (failure,) = arrays.failures
        told = {
            "reason": failure.reason.value,
            "field": failure.field,
            "message": failure.message,
            "remedy": failure.remedy,
        }
        return json.dumps({"error": told})
    answer: dict[str, object] = {"energy": float(arrays.energy[0])}
    if arrays.forces is not None:
        answer["forces"] = arrays.forces.tolist()
    if arrays.stress is not None:
        finite = bool(np.isfinite(arrays.stress).all())
        answer["stress"] = arrays.stress[0].tolist() if finite else None
    model = response.model
    answer["model"] = {
        "name": model.name,
        "digest": model.digest,
        "level_of_theory": model.level_of_theory,
        "dtype": model.dtype,
    }
    return json.dumps(answer)


def text_of_error(error: CallError) -> str:
    """Why a request was not answered."""
    told: dict[str, object] = {"reason": error.reason, "field": error.field, "message": error.message}
    if error.retry_after is not None:
        told["retry_after"] = error.retry_after
    return json.dumps({"error": told})
