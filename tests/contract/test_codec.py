"""The wire codec: what goes in comes out, and what does not fit is refused by name, cheaply."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import (
    MAX_ATOMS,
    REQUEST_BYTES_PER_ATOM,
    REQUEST_BYTES_PER_STRUCTURE,
    CodecError,
    Failure,
    FailureReason,
    PredictionArrays,
    StructureArrays,
    decode_predictions,
    decode_structures,
    encode_predictions,
    encode_structures,
)

# The machine's load is no property of the codec.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

STRUCTURE_FIELDS = ("atomic_numbers", "positions", "cell", "pbc", "charge", "spin_multiplicity")
BYTES_FIELDS_OF_ATOMS = ("atomic_numbers", "positions")
BYTES_FIELDS_OF_STRUCTURES = ("cell", "pbc", "charge", "spin_multiplicity")


@st.composite
def structure_arrays(draw: st.DrawFn) -> StructureArrays:
    counts = draw(st.lists(st.integers(0, 6), max_size=6))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_structures, n_atoms = len(counts), sum(counts)
    positions = generator.normal(size=(n_atoms, 3))
    if n_atoms:
        positions.flat[0] = draw(st.floats(width=64))
    cell = (
        generator.normal(size=(n_structures, 3, 3)) if draw(st.booleans()) else np.zeros((n_structures, 3, 3))
    )
    return StructureArrays(
        n_atoms=np.array(counts, dtype=np.int64),
        atomic_numbers=generator.integers(-(2**31), 2**31, n_atoms, dtype=np.int32),
        positions=positions,
        cell=cell,
        pbc=generator.integers(0, 2, (n_structures, 3)).astype(bool) & draw(st.booleans()),
        charge=generator.integers(-3, 4, n_structures, dtype=np.int32),
        spin_multiplicity=generator.integers(0, 4, n_structures, dtype=np.int32),
    )


def assert_same_bits(first: StructureArrays, second: StructureArrays) -> None:
    for field in ("n_atoms", *STRUCTURE_FIELDS):
        one, other = getattr(first, field), getattr(second, field)
        assert one.dtype == other.dtype, field
        assert one.shape == other.shape, field
        assert one.tobytes() == other.tobytes(), field


def water() -> StructureArrays:
    return StructureArrays(
        n_atoms=np.array([3, 1], dtype=np.int64),
        atomic_numbers=np.array([8, 1, 1, 2], dtype=np.int32),
        positions=np.arange(12.0).reshape(4, 3),
        cell=np.stack([np.eye(3), 2 * np.eye(3)]),
        pbc=np.array([[True, False, True], [True, True, True]]),
        charge=np.array([-1, 2], dtype=np.int32),
        spin_multiplicity=np.array([2, 1], dtype=np.int32),
    )


@unhurried
@given(structure_arrays())
def test_structures_survive_the_wire_bit_by_bit(arrays: StructureArrays) -> None:
    message = pb.Structures.FromString(encode_structures(arrays).SerializeToString())
    assert_same_bits(decode_structures(message), arrays)


@unhurried
@given(structure_arrays())
def test_a_message_is_no_longer_than_its_stated_bound(arrays: StructureArrays) -> None:
    bound = len(arrays) * REQUEST_BYTES_PER_STRUCTURE + len(arrays.positions) * REQUEST_BYTES_PER_ATOM
    headers = 7 * 6
    assert encode_structures(arrays).ByteSize() <= bound + headers


@unhurried
@given(structure_arrays(), st.integers(-8, 8), st.integers(-8, 8))
def test_a_slice_holds_the_structures_a_list_would(arrays: StructureArrays, start: int, stop: int) -> None:
    chosen = list(range(len(arrays)))[start:stop]
    part = arrays.slice(start, stop)
    assert len(part) == len(chosen)
    for k, i in enumerate(chosen):
        ours = part.positions[part.offsets[k] : part.offsets[k + 1]]
        whole = arrays.positions[arrays.offsets[i] : arrays.offsets[i + 1]]
        assert ours.tobytes() == whole.tobytes()
        assert part.charge[k] == arrays.charge[i]


@unhurried
@given(st.data())
def test_predictions_survive_the_wire_bit_by_bit(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    failures = tuple(
        Failure(index, data.draw(st.sampled_from(FailureReason)), "cell", data.draw(st.text()), "make it so")
        for index in data.draw(st.sets(st.integers(0, len(counts) - 1)))
    )
    energy = generator.normal(size=len(counts))
    energy[[failure.index for failure in failures]] = np.nan
    arrays = PredictionArrays(
        energy=energy,
        forces=generator.normal(size=(sum(counts), 3)) if data.draw(st.booleans()) else None,
        stress=generator.normal(size=(len(counts), 3, 3)) if data.draw(st.booleans()) else None,
        failures=failures,
    )
    response = pb.PredictResponse(model=pb.ModelReference(name="kept"), forces=b"stale")
    response.failures.add(index=77)
    encode_predictions(arrays, response)
    back = decode_predictions(pb.PredictResponse.FromString(response.SerializeToString()), counts)
    assert response.model.name == "kept"
    assert back.failures == arrays.failures
    for field in ("energy", "forces", "stress"):
        one, other = getattr(back, field), getattr(arrays, field)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.tobytes() == other.tobytes()
            assert one.shape == other.shape


def test_empty_optional_arrays_mean_their_defaults() -> None:
    message = encode_structures(water())
    for field in BYTES_FIELDS_OF_STRUCTURES:
        message.ClearField(field)  # type: ignore[arg-type]
    arrays = decode_structures(message)
    assert arrays.cell.shape == (2, 3, 3)
    assert arrays.pbc.shape == (2, 3)
    assert arrays.pbc.dtype == np.bool_
    assert not any(getattr(arrays, field).any() for field in BYTES_FIELDS_OF_STRUCTURES)


def test_defaults_are_not_sent() -> None:
    arrays = water()
    plain = StructureArrays(
        arrays.n_atoms,
        arrays.atomic_numbers,
        arrays.positions,
        np.zeros((2, 3, 3)),
        np.zeros((2, 3), dtype=bool),
        np.zeros(2, dtype=np.int32),
        np.zeros(2, dtype=np.int32),
    )
    message = encode_structures(plain)
    assert all(getattr(message, field) == b"" for field in BYTES_FIELDS_OF_STRUCTURES)
    assert_same_bits(decode_structures(message), plain)


def test_no_structures_at_all() -> None:
    arrays = decode_structures(pb.Structures())
    assert len(arrays) == 0
    assert arrays.positions.shape == (0, 3)
    assert arrays.cell.shape == (0, 3, 3)
    assert arrays.offsets.tolist() == [0]
    assert encode_structures(arrays).ByteSize() == 0


def test_a_structure_of_zero_atoms_keeps_its_place() -> None:
    message = pb.Structures(n_atoms=[0, 1], atomic_numbers=b"\1\0\0\0", positions=bytes(24))
    assert decode_structures(message).offsets.tolist() == [0, 0, 1]


@pytest.mark.parametrize("change", [-1, 1, 8])
@pytest.mark.parametrize("field", STRUCTURE_FIELDS)
def test_a_wrong_length_names_its_field(field: str, change: int) -> None:
    message = encode_structures(water())
    raw = getattr(message, field)
    setattr(message, field, raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(CodecError) as caught:
        decode_structures(message)
    assert caught.value.field == field
    assert f"has {len(raw) + change} bytes, expected {len(raw)}" in caught.value.message


@pytest.mark.parametrize("field", BYTES_FIELDS_OF_ATOMS)
def test_arrays_that_are_not_optional_must_come(field: str) -> None:
    message = encode_structures(water())
    setattr(message, field, b"")
    with pytest.raises(CodecError) as caught:
        decode_structures(message)
    assert caught.value.field == field


def test_pbc_is_nothing_but_zero_and_one() -> None:
    message = encode_structures(water())
    message.pbc = b"\0\1\0\0\2\0"
    with pytest.raises(CodecError, match="pbc: holds 2"):
        decode_structures(message)


@pytest.mark.parametrize("counts", [[2**32 - 1], [2**31 - 1, 1], [2**32 - 1] * 1000, [2**30] * 2])
def test_a_hostile_count_of_atoms_costs_no_memory(counts: list[int]) -> None:
    message = pb.Structures(n_atoms=counts, positions=bytes(24), atomic_numbers=bytes(4))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError) as caught:
            decode_structures(message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.field == "n_atoms"
    assert str(MAX_ATOMS) in caught.value.message
    assert peak < 1e6


def test_a_count_below_the_limit_is_met_by_the_length_check_alone() -> None:
    message = pb.Structures(n_atoms=[2**31 - 1], positions=bytes(24), atomic_numbers=bytes(4))
    with pytest.raises(CodecError, match="atomic_numbers: has 4 bytes, expected 8589934588"):
        decode_structures(message)


def test_decoded_arrays_cannot_be_written() -> None:
    arrays = decode_structures(encode_structures(water()))
    for field in ("n_atoms", *STRUCTURE_FIELDS):
        assert not getattr(arrays, field).flags.writeable, field


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("n_atoms", np.array([3.0, 1.0]), "float64"),
        ("n_atoms", np.array([-1, 5]), "holds -1"),
        ("atomic_numbers", np.array([8, 1, 1, 2]), "int64"),
        ("positions", np.zeros((4, 3), dtype=np.float32), "float32"),
        ("positions", np.zeros((3, 4)), r"\(3, 4\), expected \(4, 3\)"),
        ("cell", np.zeros((3, 3)), r"\(3, 3\), expected \(2, 3, 3\)"),
        ("pbc", np.zeros((2, 3), dtype=np.uint8), "uint8"),
        ("charge", np.zeros(3, dtype=np.int32), r"\(3,\), expected \(2,\)"),
        ("spin_multiplicity", np.zeros((2, 1), dtype=np.int32), r"\(2, 1\), expected \(2,\)"),
    ],
)
def test_arrays_are_checked_on_construction(field: str, value: np.ndarray, wrong: str) -> None:
    good = water()
    values = {name: getattr(good, name) for name in ("n_atoms", *STRUCTURE_FIELDS)}
    with pytest.raises(CodecError, match=wrong) as caught:
        StructureArrays(**{**values, field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["energy", "forces", "stress"])
def test_an_answer_that_does_not_fit_the_request_names_its_field(field: str) -> None:
    response = pb.PredictResponse()
    encode_predictions(PredictionArrays(np.zeros(2), np.zeros((4, 3)), np.zeros((2, 3, 3))), response)
    setattr(response, field, getattr(response, field)[:-8])
    with pytest.raises(CodecError) as caught:
        decode_predictions(response, [3, 1])
    assert caught.value.field == field


def test_an_answer_without_energies_is_refused() -> None:
    with pytest.raises(CodecError, match="energy: has 0 bytes, expected 16"):
        decode_predictions(pb.PredictResponse(), [3, 1])


def test_a_failure_of_a_structure_that_is_not_there_is_refused() -> None:
    response = pb.PredictResponse(energy=bytes(16))
    response.failures.add(index=2)
    with pytest.raises(CodecError, match="structure 2 in an answer to 2 structures"):
        decode_predictions(response, [3, 1])


def test_a_reason_of_a_newer_server_is_unspecified() -> None:
    raw = pb.PredictResponse(energy=bytes(8))
    raw.failures.add(index=0, reason=pb.FailureReason.ValueType(99))
    assert decode_predictions(raw, [3]).failures[0].reason is FailureReason.UNSPECIFIED


def test_every_reason_of_the_proto_has_its_word() -> None:
    words = {f"FAILURE_REASON_{reason.name}" for reason in FailureReason}
    assert words == set(pb.FailureReason.keys())
    assert all(reason.value == reason.name.lower() for reason in FailureReason)


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CodecError("cell", "is bent", "straighten it")))
    assert (error.field, error.message, error.remedy) == ("cell", "is bent", "straighten it")
    assert str(error) == "cell: is bent; straighten it"
