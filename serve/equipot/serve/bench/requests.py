"""Structures and requests to load a server with, for a model of any elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipot.model.batch import System
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import StructureArrays, encode_structures

SPACING = 2.4
"""Å between atoms: about as dense as solids are."""


def crystal(random: np.random.Generator, n_atoms: int, elements: Sequence[int]) -> System:
    """A periodic cell of shaken atoms on a grid."""
    side = int(np.ceil(n_atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n_atoms]
    return System(
        atomic_numbers=random.choice(np.array(elements), n_atoms),
        positions=SPACING * grid + random.uniform(-0.2, 0.2, (n_atoms, 3)),
        cell=SPACING * side * np.eye(3),
        pbc=np.ones(3, dtype=np.bool_),
    )


def request(systems: Sequence[System], **fields: object) -> pb.PredictRequest:
    """Energy and forces of these structures; `fields` are more of the message's."""
    count = len(systems)
    arrays = StructureArrays(
        n_atoms=np.array([system.n_atoms for system in systems], dtype=np.int64),
        atomic_numbers=np.concatenate([system.atomic_numbers for system in systems]).astype(np.int32),
        positions=np.concatenate([system.positions for system in systems]),
        cell=np.stack([system.cell for system in systems]),
        pbc=np.stack([system.pbc for system in systems]),
        charge=np.zeros(count, dtype=np.int32),
        spin_multiplicity=np.zeros(count, dtype=np.int32),
    )
    return pb.PredictRequest(structures=encode_structures(arrays), **fields)  # type: ignore[arg-type]
