"""A pickle is read as data or refused by name; whatever it holds, nothing of it runs."""

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData

from equipot.train.sources.pickle_machine import PickleDamaged, PickleRefused, Record
from equipot.train.sources.restricted_pickle import MAX_EXPANDED, loads

PROTOCOLS = (2, 3, 4, 5)
TENSOR = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array([True, False]),
        np.array([1.5, np.nan], dtype=np.float32),
        np.zeros((0, 3)),
    ],
)
def test_numpy_arrays_come_back_exactly(array: Any, protocol: int) -> None:
    read = loads(pickle.dumps(array, protocol))
    assert isinstance(read, np.ndarray)
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "tensor",
    [
        TENSOR,
        TENSOR.permute(2, 0, 1),
        TENSOR[:, 1],
        TENSOR.expand(5, 2, 3, 4),
        TENSOR.half(),
        TENSOR.double(),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        torch.nn.Parameter(TENSOR),
    ],
)
def test_tensors_come_back_as_arrays(tensor: torch.Tensor, protocol: int) -> None:
    np.testing.assert_array_equal(loads(pickle.dumps(tensor, protocol)), tensor.detach().numpy())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_back(protocol: int) -> None:
    value = [1, -5, 300, 70000, 10**30, 2.5, "å", b"x", None, True, (1, (2, 3)), {"a": {1: 2}}]
    assert loads(pickle.dumps(value, protocol)) == value


def test_pyg_data_becomes_a_record() -> None:
    record = loads(pickle.dumps(Data(pos=TENSOR[0], y=-1.5, sid=7)))
    assert isinstance(record, Record)
    mapping = record.state["_store"].state["_mapping"]
    assert mapping["y"] == -1.5
    assert mapping["sid"] == 7
    np.testing.assert_array_equal(mapping["pos"], TENSOR[0].numpy())


class Runs:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path) -> list[tuple[bytes, str]]:
    """Pickles that would leave `marker` behind if anything of them ran, and what the refusal has to name."""
    import os
    import subprocess

    touch = f"touch {marker}"
    inner = io.BytesIO()
    torch.save(Runs(os.system, touch), inner, _use_new_zipfile_serialization=False)
    storage_loader = torch.storage._load_from_bytes
    cases = [(pickle.dumps(Runs(os.system, touch), protocol), "posix.system") for protocol in range(6)]
    cases += [
        (pickle.dumps(Runs(subprocess.check_call, touch.split())), "subprocess.check_call"),
        (pickle.dumps(Runs(eval, f"open({str(marker)!r}, 'w')")), "builtins.eval"),
        (pickle.dumps(Runs(exec, f"open({str(marker)!r}, 'w')")), "builtins.exec"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"),
        (pickle.dumps({"pos": TENSOR, "y": Runs(os.system, touch)}), "posix.system"),
        (pickle.dumps(Data(pos=TENSOR, y=Runs(os.system, touch))), "posix.system"),
        (pickle.dumps(Runs(torch.load, "/x")), "torch.serialization.load"),
        (pickle.dumps(Runs(storage_loader, inner.getvalue())), "posix.system"),
        (pickle.dumps(np.array([Runs(os.system, touch)], dtype=object)), "'O8'"),
        (pickle.dumps(np.array([[1, 2]], dtype=object)), "'O8'"),
        (b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.", "os.system"),
        (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "step"),
        (b"\x80\x02\x82\x01.", "step"),  # EXT1: a name from copyreg's registry
        (pickle.dumps(HeteroData()), "HeteroData"),
    ]
    return cases


def test_hostile_pickles_are_refused_by_name_and_do_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for data, name in hostile(marker):
        with pytest.raises(PickleRefused, match=name.replace("(", r"\(")):
            loads(data)
    assert not marker.exists()
    pickle.loads(hostile(marker)[5][0])  # what the plain reader would have done
    assert marker.exists()


def test_known_names_cannot_be_called_for_other_ends() -> None:
    with pytest.raises(PickleRefused, match="calls torch_geometric"):
        loads(b"\x80\x02ctorch_geometric.data.data\nData\n)R.")
    with pytest.raises(PickleRefused, match="no known container"):
        loads(b"\x80\x02ccollections\nOrderedDict\n)\x81.")
    with pytest.raises(PickleRefused, match="outside of itself"):
        loads(b"\x80\x02K\x01Q.")


def tensor_pickle(size: bytes, stride: bytes) -> bytes:
    """A float tensor on a storage of three numbers, with size and stride as pickle steps."""
    storage = pickle.dumps(torch.zeros(3).storage(), 2)[2:-1]  # type: ignore[no-untyped-call]
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + stride + b"\x89}tR."


def test_tensors_never_reach_beyond_their_storage() -> None:
    np.testing.assert_array_equal(loads(tensor_pickle(b"K\x03\x85", b"K\x01\x85")), np.zeros(3))
    for size, stride in (
        (b"K\x04\x85", b"K\x01\x85"),
        (b"K\x03\x85", b"K\x02\x85"),
        (b"K\x03\x85", b"J\xff\xff\xff\xff\x85"),
        (b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
        (b"\x8a\x05\x00\x00\x00\x00\x01\x85", b"K\x00\x85"),  # 2**32 numbers out of one
        (b"K\x03K\x01\x86", b"K\x01\x85"),
    ):
        with pytest.raises(PickleRefused, match="tensor of size"):
            loads(tensor_pickle(size, stride))
    assert MAX_EXPANDED < 2**32


def test_any_damage_is_a_refusal_and_nothing_else() -> None:
    whole = pickle.dumps(Data(pos=TENSOR, y=-1.5, cell=torch.eye(3)), 4)
    for cut in range(0, len(whole) - 1, 7):
        with pytest.raises(PickleDamaged):
            loads(whole[:cut])
    dice = random.Random(0)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(dice.choice((1, 4))):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            loads(bytes(damaged))
        except PickleRefused:
            refused += 1
    assert refused > 500
