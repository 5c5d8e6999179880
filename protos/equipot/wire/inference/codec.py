"""Structures as tensors of the Open Inference Protocol, and answers back. Knows no physics and no gRPC.

S structures of N atoms in all, flat. Inputs (any integer type where one is named, FP32 where FP64 is):

    n_atoms            INT64 [S]       atoms in each structure; left out: all atoms are one structure
    atomic_numbers     INT32 [N]
    positions          FP64  [N, 3]    Å
    cell               FP64  [S, 3, 3] Å, rows are lattice vectors; optional
    pbc                BOOL  [S, 3]    optional
    charge             INT32 [S]       optional
    spin_multiplicity  INT32 [S]       optional

Outputs, those asked for, or energy and forces:

    energy  FP64 [S]        eV
    forces  FP64 [N, 3]     eV/Å
    stress  FP64 [S, 3, 3]  eV/Å³, positive in tension
    error   BYTES [S]       why a structure has no answer, empty where it has one

and, of how sure it is (see Uncertainty), if one of these is asked for:

    energy_spread    FP64 [S]   eV
    forces_spread    FP64 [N]   eV/Å
    energy_interval  FP64 [S]   eV
    forces_interval  FP64 [N]   eV/Å
    domain_score     FP64 [S]
    outside_domain   BYTES [S]  why a structure is unlike any in training, empty where it is not

A structure that fails has NaN in its slots; `error` then comes whether it was asked for or not. What the
model cannot tell is NaN, too, and the answer's parameter `not_available` says why. The request's parameter
`level_of_theory` is that of PredictRequest, `coverage` (a number, or its text) and `refuse_outside` (a bool)
are those of UncertaintyOptions; `model_version` may be a digest, "sha256:…".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from equipot.wire.inference import open_inference_pb2 as oip
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import MAX_ATOMS, CodecError

Array = npt.NDArray[Any]

INPUTS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "n_atoms": ("INT64", ("S",)),
        "atomic_numbers": ("INT32", ("N",)),
        "positions": ("FP64", ("N", "3")),
        "cell": ("FP64", ("S", "3", "3")),
        "pbc": ("BOOL", ("S", "3")),
        "charge": ("INT32", ("S",)),
        "spin_multiplicity": ("INT32", ("S",)),
    }
)
OUTPUTS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "energy": ("FP64", ("S",)),
        "forces": ("FP64", ("N", "3")),
        "stress": ("FP64", ("S", "3", "3")),
        "error": ("BYTES", ("S",)),
        "energy_spread": ("FP64", ("S",)),
        "forces_spread": ("FP64", ("N",)),
        "energy_interval": ("FP64", ("S",)),
        "forces_interval": ("FP64", ("N",)),
        "domain_score": ("FP64", ("S",)),
        "outside_domain": ("BYTES", ("S",)),
    }
)
REQUIRED = ("atomic_numbers", "positions")

_PROPERTIES: Mapping[str, pb.Property.ValueType] = MappingProxyType(
    {"energy": pb.PROPERTY_ENERGY, "forces": pb.PROPERTY_FORCES, "stress": pb.PROPERTY_STRESS}
)
# The protocol's numeric types: numpy's name of each on the wire, and where it lies if it is not sent raw.
_TYPES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "BOOL": ("u1", "bool_contents"),
        "UINT8": ("u1", "uint_contents"),
        "UINT16": ("<u2", "uint_contents"),
        "UINT32": ("<u4", "uint_contents"),
        "UINT64": ("<u8", "uint64_contents"),
        "INT8": ("i1", "int_contents"),
        "INT16": ("<i2", "int_contents"),
        "INT32": ("<i4", "int_contents"),
        "INT64": ("<i8", "int64_contents"),
        "FP32": ("<f4", "fp32_contents"),
        "FP64": ("<f8", "fp64_contents"),
    }
)
_FLOATS = ("FP32", "FP64")
_MOST_AXES = 3
_MOST_NUMBERS = 9 * MAX_ATOMS
"""Of one tensor: a cell for each of so many atoms."""

_LEVEL, _COVERAGE, _REFUSE, _NOT_AVAILABLE = "level_of_theory", "coverage", "refuse_outside", "not_available"
_CERTAINTY = ("energy_spread", "forces_spread", "energy_interval", "forces_interval", "domain_score")
_OUTSIDE = "outside_domain"


def predict_request(request: oip.ModelInferRequest) -> pb.PredictRequest:
    """The same question in the words of the project's own service.

    Raises:
        CodecError: a tensor that is unknown, missing, given twice, of another type, or of another shape.
    """
    version = request.model_version
    return pb.PredictRequest(
        model=f"{request.model_name}@{version}" if version else request.model_name,
        structures=_structures(_tensors(request)),
        properties=_properties(request),
        level_of_theory=_level_of_theory(request.parameters),
        uncertainty=_uncertainty(request),
    )


def infer_response(
    request: oip.ModelInferRequest, response: pb.PredictResponse, n_atoms: Sequence[int]
) -> oip.ModelInferResponse:
    """The answer as tensors: those asked for, and `error` if a structure failed.

    Args:
        request: what was asked.
        response: what the project's own service answered.
        n_atoms: atoms in each of the S structures.
    """
    model, sizes = response.model, {"S": len(n_atoms), "N": sum(n_atoms), "3": 3}
    answer = oip.ModelInferResponse(model_name=request.model_name, model_version=model.digest, id=request.id)
    for key, word in (
        ("name", model.name),
        ("digest", model.digest),
        (_LEVEL, model.level_of_theory),
        ("dtype", model.dtype),
    ):
        answer.parameters[key].string_param = word
    wanted = [output.name for output in request.outputs] or ["energy", "forces"]
    if response.failures and "error" not in wanted:
        wanted.append("error")
    for name in wanted:
        datatype, axes = OUTPUTS[name]
        tensor = answer.outputs.add(name=name, datatype=datatype, shape=[sizes[axis] for axis in axes])
        assert tensor.name == name
        answer.raw_output_contents.append(_raw(name, response, [sizes[axis] for axis in axes]))
    if response.uncertainty.not_available:
        answer.parameters[_NOT_AVAILABLE].string_param = "; ".join(response.uncertainty.not_available)
    return answer


def _raw(name: str, response: pb.PredictResponse, shape: Sequence[int]) -> bytes:
    if name == "error":
        return _texts(shape[0], {failure.index: _error(failure) for failure in response.failures})
    if name == _OUTSIDE:
        return _texts(shape[0], {one.index: one.reason for one in response.uncertainty.outside})
    if name in _CERTAINTY:
        found: bytes = getattr(response.uncertainty, name)
        return found or np.full(shape, np.nan, dtype="<f8").tobytes()
    computed: bytes = getattr(response, name)
    return computed


def tensor_metadata(
    tensors: Mapping[str, tuple[str, tuple[str, ...]]],
) -> list[oip.ModelMetadataResponse.TensorMetadata]:
    """How `INPUTS` or `OUTPUTS` describe themselves; -1 stands for S and N."""
    return [
        oip.ModelMetadataResponse.TensorMetadata(
            name=name, datatype=datatype, shape=[int(axis) if axis.isdigit() else -1 for axis in axes]
        )
        for name, (datatype, axes) in tensors.items()
    ]


def _tensors(request: oip.ModelInferRequest) -> dict[str, Array]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise CodecError(
            "raw_input_contents",
            f"has {len(raw)} entries for {len(request.inputs)} inputs",
            "send one for each input, in order, or typed contents in every input",
        )
    tensors: dict[str, Array] = {}
    for place, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in INPUTS:
            raise CodecError("inputs", f"{name[:100]!r} is no input", f"the inputs are {', '.join(INPUTS)}")
        if name in tensors:
            raise CodecError(name, "is given twice", "give each input once")
        if raw and tensor.HasField("contents"):
            raise CodecError(name, "has contents both raw and typed", "send one of the two")
        tensors[name] = _numbers(tensor, raw[place] if raw else None)
    for name in REQUIRED:
        if name not in tensors:
            raise CodecError(name, "is missing", f"the inputs {' and '.join(REQUIRED)} are always needed")
    return tensors


def _numbers(tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Array:
    """The tensor's numbers in its own shape and type."""
    name, shape = tensor.name, tuple(tensor.shape)
    wanted = INPUTS[name][0]
    known = _TYPES.get(tensor.datatype)
    if known is None or (tensor.datatype in _FLOATS) != (wanted in _FLOATS):
        fitting = "FP64 or FP32" if wanted in _FLOATS else f"{wanted} or another integer type"
        raise CodecError(name, f"has the datatype {tensor.datatype[:20]!r}", f"send it as {fitting}")
    if len(shape) > _MOST_AXES:
        raise _wrong_shape(name, shape)
    # Beside a 0 lengths are not held by any contents, and numpy multiplies them all the same.
    if any(length < 0 for length in shape) or math.prod(length or 1 for length in shape) > _MOST_NUMBERS:
        raise CodecError(name, f"has the shape {list(shape)}", "give the real lengths")
    dtype, field = np.dtype(known[0]), known[1]
    expected = 1
    for length in shape:
        expected *= length
    count = len(raw) / dtype.itemsize if raw is not None else len(getattr(tensor.contents, field))
    if count != expected:
        held = f"{len(raw)} bytes" if raw is not None else f"{count} numbers in {field}"
        raise CodecError(
            name,
            f"has {held}, but {tensor.datatype} of shape {list(shape)} is {expected} numbers",
            "make contents, shape and datatype fit",
        )
    if raw is not None:
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
    # As int64 or float64 first: what does not fit the type named is then seen where it is narrowed.
    return np.array(getattr(tensor.contents, field)).reshape(shape)


def _structures(tensors: Mapping[str, Array]) -> pb.Structures:
    numbers = tensors["atomic_numbers"]
    if "n_atoms" in tensors:
        n_atoms = _as(tensors["n_atoms"], "n_atoms", np.uint32)
        if n_atoms.ndim != 1:
            raise _wrong_shape("n_atoms", n_atoms.shape)
    else:
        n_atoms = np.array([numbers.size], dtype=np.uint32)
    sizes = {"S": len(n_atoms), "N": int(n_atoms.sum(dtype=np.int64)), "3": 3}
    for name, array in tensors.items():
        expected = tuple(sizes[axis] for axis in INPUTS[name][1])
        # One structure's cell, pbc or charge may come without the axis of structures.
        if array.shape != expected and not (len(n_atoms) == 1 and array.shape == expected[1:]):
            raise _wrong_shape(name, array.shape, expected)
    message = pb.Structures(n_atoms=n_atoms.tolist())
    kinds: dict[str, type[np.generic]] = {"FP64": np.float64, "INT32": np.int32, "BOOL": np.uint8}
    for name, array in tensors.items():
        if name != "n_atoms":
            little = _as(array, name, kinds[INPUTS[name][0]])
            setattr(message, name, little.astype(little.dtype.newbyteorder("<"), copy=False).tobytes())
    return message


def _as(array: Array, name: str, dtype: type[np.generic]) -> Array:
    """The array in a type that must hold every number of it."""
    if issubclass(dtype, np.integer) and array.size:
        limits = np.iinfo(dtype)
        for extreme in (int(array.min()), int(array.max())):
            if not limits.min <= extreme <= limits.max:
                raise CodecError(
                    name, f"holds {extreme}", f"give numbers between {limits.min} and {limits.max}"
                )
    return array.astype(dtype, copy=False)


def _wrong_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...] | None = None) -> CodecError:
    axes = ", ".join(INPUTS[name][1])
    means = f" = {list(expected)}" if expected is not None else ""
    found = f"the shape {list(shape)}" if len(shape) <= _MOST_AXES else f"{len(shape)} axes"
    return CodecError(
        name,
        f"has {found}, expected [{axes}]{means}",
        "S is the number of structures and N that of all their atoms, as n_atoms says",
    )


def _properties(request: oip.ModelInferRequest) -> list[pb.Property.ValueType]:
    names = [output.name for output in request.outputs]
    for place, name in enumerate(names):
        if name not in OUTPUTS:
            raise CodecError(
                "outputs", f"{name[:100]!r} is no output", f"the outputs are {', '.join(OUTPUTS)}"
            )
        if name in names[:place]:
            raise CodecError("outputs", f"{name} is asked for twice", "ask for each output once")
    properties = [_PROPERTIES[name] for name in names if name in _PROPERTIES]
    if any(name.startswith("forces_") for name in names) and pb.PROPERTY_FORCES not in properties:
        properties.append(pb.PROPERTY_FORCES)
    # None at all would be energy and forces.
    return properties if properties or not names else [pb.PROPERTY_ENERGY]


def _level_of_theory(parameters: Mapping[str, oip.InferParameter]) -> str:
    for name, value in parameters.items():
        if name == _LEVEL and value.WhichOneof("parameter_choice") == "string_param":
            return value.string_param
        if name == _LEVEL:
            raise CodecError(f"parameters.{_LEVEL}", "is no string", "give the level's name as string_param")
    return ""


def _uncertainty(request: oip.ModelInferRequest) -> pb.UncertaintyOptions | None:
    """What is to be told of how sure the answer is; None if nothing of it is asked for."""
    options, asked = pb.UncertaintyOptions(), False
    for name, value in request.parameters.items():
        if name == _COVERAGE:
            options.coverage, asked = _coverage(value), True
        elif name == _REFUSE:
            if value.WhichOneof("parameter_choice") != "bool_param":
                raise CodecError(f"parameters.{_REFUSE}", "is no bool", "give true or false as bool_param")
            options.refuse_outside = value.bool_param
            asked = asked or value.bool_param
    asked = asked or any(output.name in (*_CERTAINTY, _OUTSIDE) for output in request.outputs)
    return options if asked else None


def _coverage(value: oip.InferParameter) -> float:
    kind = value.WhichOneof("parameter_choice")
    try:
        # Triton's clients have words and whole numbers alone.
        if kind in ("double_param", "string_param"):
            return float(getattr(value, kind))
    except ValueError:
        pass
    raise CodecError(
        f"parameters.{_COVERAGE}", "is no number", "give 0.01 to 0.99 as double_param or as text"
    )


def _error(failure: pb.Failure) -> str:
    field = f"{failure.field}: " if failure.field else ""
    return f"{field}{failure.message}; {failure.remedy}"


def _texts(count: int, texts: Mapping[int, str]) -> bytes:
    """So many BYTES elements, each its length in four bytes and then the text; empty where there is none."""
    raws = [texts.get(index, "").encode() for index in range(count)]
    return b"".join(struct.pack("<I", len(raw)) + raw for raw in raws)
