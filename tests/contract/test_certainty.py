"""How sure an answer is, on the wire and back; what does not fit is refused with the field's name."""

from __future__ import annotations

import numpy as np
import pytest

from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import (
    OutsideDomain,
    UncertaintyArrays,
    decode_uncertainty,
    encode_uncertainty,
)
from equipot.wire.v1.codec import CodecError, PredictionArrays, decode_predictions, encode_predictions

N_ATOMS = [2, 3]


def arrays() -> UncertaintyArrays:
    return UncertaintyArrays(
        members=4,
        coverage=0.9,
        energy_spread=np.array([0.1, np.nan]),
        forces_spread=np.arange(5.0),
        energy_interval=np.array([0.2, np.nan]),
        forces_interval=None,
        domain_score=np.array([1.5, np.nan]),
        outside=(OutsideDomain(0, 1, 1.5, "Å: too close"),),
        not_available=("intervals of forces: too few",),
    )


def test_it_comes_back_as_it_was_sent_within_a_reply() -> None:
    before = arrays()
    response = pb.PredictResponse()
    encode_predictions(PredictionArrays(np.zeros(2), None, None, (), before), response)
    after = decode_predictions(
        pb.PredictResponse.FromString(response.SerializeToString()), N_ATOMS
    ).uncertainty
    assert after is not None
    for name in UncertaintyArrays.__slots__:
        one, other = getattr(before, name), getattr(after, name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other
    nothing = pb.PredictResponse()
    encode_predictions(PredictionArrays(np.zeros(2), None, None), nothing)
    assert not nothing.HasField("uncertainty")
    assert decode_predictions(nothing, N_ATOMS).uncertainty is None


def test_a_structure_alone_has_its_own_part() -> None:
    first, second = arrays().of(0, slice(0, 2)), arrays().of(1, slice(2, 5))
    assert [one.index for one in first.outside] == [0]
    assert second.outside == ()
    assert first.forces_spread is not None
    assert second.forces_spread is not None
    assert first.forces_spread.tolist() == [0.0, 1.0]
    assert second.forces_spread.tolist() == [2.0, 3.0, 4.0]
    assert second.forces_interval is None


@pytest.mark.parametrize("name", ["energy_spread", "forces_spread", "forces_interval", "domain_score"])
def test_another_length_is_refused(name: str) -> None:
    message = encode_uncertainty(arrays())
    setattr(message, name, bytes(7 * 8))
    with pytest.raises(CodecError, match=f"uncertainty.{name}: has 56 bytes"):
        decode_uncertainty(message, N_ATOMS)


@pytest.mark.parametrize(("index", "atom"), [(2, 0), (0, 2)])
def test_an_atom_that_is_not_there_is_refused(index: int, atom: int) -> None:
    message = encode_uncertainty(arrays())
    message.outside.add(index=index, atom=atom, score=2.0)
    with pytest.raises(CodecError, match=f"names atom {atom} of structure {index}"):
        decode_uncertainty(message, N_ATOMS)
