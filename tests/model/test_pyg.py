"""Structures go to torch_geometric and back unchanged, and its batches mean what ours mean."""

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from equipot.model.batch import Graph, collate
from equipot.model.errors import StructureError
from equipot.model.pyg import from_data, to_data

FIELDS = ("atomic_numbers", "positions", "cell", "pbc")


def test_round_trip(structures: dict[str, list[Graph]]) -> None:
    for graph in structures["mixed"]:
        back = from_data(to_data(graph))
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(back, field), getattr(graph.system, field))
        for field in ("charge", "spin_multiplicity", "level_of_theory"):
            assert getattr(back, field) == getattr(graph.system, field)


def test_its_batches_are_ours(structures: dict[str, list[Graph]]) -> None:
    theirs = Batch.from_data_list([to_data(graph) for graph in structures["mixed"]])
    ours = collate(structures["mixed"], dtype=torch.float64)
    assert torch.equal(theirs.edge_index, torch.stack([ours.senders, ours.receivers]))
    assert torch.equal(theirs.batch, ours.system_idx)
    assert torch.equal(theirs.pos, ours.positions)
    assert torch.equal(theirs.cell, ours.cell)


def test_reads_the_fields_key_variants() -> None:
    system = from_data(
        Data(
            atomic_numbers=torch.tensor([8.0, 1.0]), pos=torch.zeros(2, 3), cell=torch.eye(3).reshape(1, 3, 3)
        )
    )
    assert system.atomic_numbers.tolist() == [8, 1]
    assert system.pbc.all()
    assert not from_data(Data(z=torch.tensor([1]), pos=torch.zeros(1, 3))).pbc.any()


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (Data(pos=torch.zeros(1, 3)), "z"),
        (Data(z=torch.tensor([1])), "pos"),
        (Data(z=torch.tensor([1, 1]), pos=torch.zeros(2, 3), cell=torch.zeros(2, 3, 3)), "cell"),
        (Data(z=torch.tensor([1, 1]), pos=torch.zeros(2, 3), pbc=torch.zeros(2, 3)), "pbc"),
    ],
)
def test_what_is_missing_is_named(data: Data, field: str) -> None:
    with pytest.raises(StructureError) as caught:
        from_data(data)
    assert caught.value.field == field
