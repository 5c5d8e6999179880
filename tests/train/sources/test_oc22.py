"""OC22: pickled records of every age read as data; hostile, damaged and unlabelled ones left out by name."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from equipot.train.sources.base import ReadOptions, Reason
from equipot.train.sources.oc22 import open_oc22
from equipot.train.sources.pyg_lmdb import PygLmdb

Sample = Callable[[str], Path]
Read = Callable[..., Any]
OPTIONS = ReadOptions(level="total")


def write_records(path: Path, records: list[bytes], *, length: bool = True) -> Path:
    with lmdb.open(str(path), subdir=False, map_size=2**26) as env, env.begin(write=True) as transaction:
        for index, record in enumerate(records):
            transaction.put(str(index).encode(), record)
        if length:
            transaction.put(b"length", pickle.dumps(len(records)))
    return path


def fields(k: int = 0, **changes: Any) -> dict[str, Any]:
    """A record as the release has it: float32 tensors, float atomic numbers, cell (1, 3, 3)."""
    body = {
        "y": -20.5 - k,
        "pos": torch.tensor([[0.0, 0.0, 5.0], [1.9, 0.0, 5.0], [0.9, 0.9, 6.4 + 0.01 * k]]),
        "cell": torch.diag(torch.tensor([6.0, 6.0, 20.0])).view(1, 3, 3),
        "atomic_numbers": torch.tensor([22.0, 8.0, 8.0]),
        "natoms": 3,
        "force": torch.full((3, 3), 0.25),
        "fixed": torch.tensor([1.0, 0.0, 0.0]),
        "tags": torch.tensor([0, 1, 2]),
        "nads": 1,
        "sid": 100 + k // 2,
        "fid": k,
        "oc22": 1,
    }
    return {key: value for key, value in {**body, **changes}.items() if value is not None}


def old_data(body: dict[str, Any], protocol: int) -> bytes:
    """A record as torch_geometric 1 pickled it: the values are the object's own state."""
    state = pickle.dumps({"edge_attr": None, **body}, protocol)[2:-1]
    return bytes([0x80, protocol]) + b"ctorch_geometric.data.data\nData\n)\x81" + state + b"b."


def new_data(body: dict[str, Any], protocol: int) -> bytes:
    return pickle.dumps(Data(**body), protocol)


def test_the_sample_against_torch(sample: Sample, read: Read) -> None:
    path = sample("oc22/data.0000.lmdb")
    kept, left_out = read(open_oc22(path, OPTIONS))
    assert (len(kept), left_out) == (16, [])
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        for frame in kept:
            record = pickle.loads(transaction.get(str(frame.index).encode()) or b"")  # our own file
            assert frame.energy == record.y
            np.testing.assert_array_equal(frame.forces, record.force.numpy().astype(np.float64))
            np.testing.assert_array_equal(frame.positions, record.pos.numpy().astype(np.float64))
            np.testing.assert_array_equal(frame.cell, record.cell[0].numpy().astype(np.float64))
            np.testing.assert_array_equal(frame.atomic_numbers, record.atomic_numbers.numpy())
            np.testing.assert_array_equal(frame.extras["tags"], record.tags.numpy())
            np.testing.assert_array_equal(frame.extras["fixed"], record.fixed.numpy())
            assert (frame.group, frame.name) == (("sid", f"oc22 {record.sid}"), f"{record.sid}/{record.fid}")
            assert frame.pbc.all()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", [new_data, old_data, pickle.dumps])
def test_records_of_every_age(tmp_path: Path, read: Read, kind: Any, protocol: int) -> None:
    records = [kind(fields(k), protocol) for k in range(3)]
    kept, left_out = read(open_oc22(write_records(tmp_path / "a.lmdb", records), OPTIONS))
    assert left_out == []
    assert [(f.energy, f.name) for f in kept] == [(-20.5, "100/0"), (-21.5, "100/1"), (-22.5, "101/2")]


def test_numbers_may_be_tensors(tmp_path: Path, read: Read) -> None:
    body = fields(
        3, sid=torch.tensor([9]), fid=torch.tensor(4), y=torch.tensor([[-3.5]]), natoms=torch.tensor([3])
    )
    (frame,), _ = read(open_oc22(write_records(tmp_path / "a.lmdb", [pickle.dumps(Data(**body))]), OPTIONS))
    assert (frame.name, frame.energy) == ("9/4", -3.5)


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_record_is_named_and_does_not_run(tmp_path: Path, read: Read) -> None:
    marker = tmp_path / "ran"
    records = [
        pickle.dumps(Data(**fields(0))),
        pickle.dumps(Runs(marker)),
        pickle.dumps(Data(**fields(2), extra=Runs(marker))),
        pickle.dumps(Data(**fields(3))),
    ]
    kept, left_out = read(open_oc22(write_records(tmp_path / "a.lmdb", records), OPTIONS))
    assert [frame.index for frame in kept] == [0, 3]
    assert [(i.index, i.reason) for i in left_out] == [(1, Reason.REFUSED), (2, Reason.REFUSED)]
    assert all("posix.system" in item.detail for item in left_out)
    path = tmp_path / "b.lmdb"
    with lmdb.open(str(path), subdir=False, map_size=2**26) as env, env.begin(write=True) as transaction:
        transaction.put(b"0", pickle.dumps(Data(**fields(0))))
        transaction.put(b"length", pickle.dumps(Runs(marker)))
    kept, _ = read(open_oc22(path, OPTIONS))
    assert len(kept) == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"y": None, "force": None}, Reason.NO_LABEL, "the test split"),
        ({"y": None, "y_relaxed": -1.0}, Reason.NO_LABEL, "IS2RE"),
        ({"y": float("nan")}, Reason.NON_FINITE_LABEL, "energy holds nan"),
        ({"force": torch.full((3, 3), float("nan"))}, Reason.NON_FINITE_LABEL, "forces holds nan"),
        ({"force": torch.zeros(2, 3)}, Reason.WRONG_SHAPE, "(2, 3)"),
        ({"natoms": 4}, Reason.INVALID, "natoms is 4"),
        ({"atomic_numbers": torch.tensor([22.5, 8.0, 8.0])}, Reason.INVALID, "whole"),
        ({"pos": torch.full((3, 3), float("inf"))}, Reason.NON_FINITE_POSITIONS, "atom 0"),
        ({"cell": torch.eye(2)}, Reason.INVALID, "cell"),
        ({"cell": torch.zeros(1, 3, 3)}, Reason.CELL, "cell"),
        ({"sid": None}, Reason.NO_GROUP, "sid"),
        ({"oc22": 0}, Reason.OTHER_LEVEL, "OC20"),
        ({"pos": None}, Reason.INVALID, "no pos"),
    ],
)
def test_bad_records_are_left_out_by_reason(
    tmp_path: Path, read: Read, changes: dict[str, Any], reason: Reason, words: str
) -> None:
    records = [pickle.dumps(Data(**fields(0, **changes))), pickle.dumps(Data(**fields(1)))]
    kept, left_out = read(open_oc22(write_records(tmp_path / "a.lmdb", records), OPTIONS))
    assert [frame.index for frame in kept] == [1]
    assert [item.reason for item in left_out] == [reason]
    assert words in left_out[0].detail


def test_damage_costs_the_records_it_hits(sample: Sample, tmp_path: Path, read: Read) -> None:
    whole = sample("oc22/data.0000.lmdb").read_bytes()
    cut = tmp_path / "cut.lmdb"
    cut.write_bytes(whole[: len(whole) // 2])
    kept, left_out = read(open_oc22(cut, OPTIONS))
    assert 0 < len(kept) < 16
    assert len(kept) + len(left_out) == 16
    assert {item.reason for item in left_out} == {Reason.UNREADABLE}
    assert "bytes short" in left_out[0].detail
    record = pickle.dumps(Data(**fields(0)))
    path = write_records(tmp_path / "pickles.lmdb", [record[:-30], record, b"", b"garbage"])
    kept, left_out = read(open_oc22(path, OPTIONS))
    assert [frame.index for frame in kept] == [1]
    assert [item.reason for item in left_out] == [Reason.UNREADABLE, Reason.UNREADABLE, Reason.REFUSED]


def test_records_are_counted_without_a_length_too(tmp_path: Path, read: Read) -> None:
    records = [pickle.dumps(Data(**fields(k))) for k in range(12)]
    kept, _ = read(open_oc22(write_records(tmp_path / "a.lmdb", records, length=False), OPTIONS))
    assert [frame.index for frame in kept] == list(range(12))
    path = write_records(tmp_path / "gap.lmdb", records)
    with lmdb.open(str(path), subdir=False, map_size=2**26) as env, env.begin(write=True) as transaction:
        transaction.delete(b"5")
    kept, left_out = read(open_oc22(path, OPTIONS))
    assert [(i.index, i.reason) for i in left_out] == [(5, Reason.UNREADABLE)]
    assert len(kept) == 11


def test_other_lmdb_files_of_records(sample: Sample, read: Read) -> None:
    """The ColabFit copper set: its energies are per atom, and it states no unit for its stresses."""
    kept, left_out = read(
        PygLmdb(sample("crystals/matsciml_colabfit_Cu.lmdb"), ReadOptions(energy_per_atom=True))
    )
    assert (len(kept), left_out) == (262, [])
    per_atom = np.array([frame.energy / len(frame.atomic_numbers) for frame in kept])
    assert per_atom.min() > -4.2
    assert per_atom.max() < -2.5
    assert all(frame.stress is None and frame.pbc.all() for frame in kept)
