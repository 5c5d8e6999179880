"""How alike the atoms of a finished point's test structures are after each layer of its model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equipot.train.dataset import Dataset
from equipot.train.export import averaged, choose_checkpoint, restore_potential
from equipot.train.prepare import reopen_mix
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.scaling.smoothing import similarity_by_layer

_AT_ONCE = 16


def similarity(run: Path, *, most: int = 128) -> list[float]:
    """Mean cosine similarity of two atoms' features: the embedding's, then each layer's.

    Args:
        run: directory of a run with its checkpoints.
        most: structures, evenly spread over the test split.
    """
    directory = RunDirectory(run)
    card = RunCard.read(directory.card)
    mix = reopen_mix(directory, card)
    chosen = choose_checkpoint(directory, "last")
    potential = restore_potential(directory, card, chosen, averaged(chosen))
    dataset = Dataset(mix.stores, card.config)
    places = mix.part("test")
    rows = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(np.int64))
    parts = np.array_split(rows, -(-len(rows) // _AT_ONCE))
    return similarity_by_layer(potential, (dataset.batch(places[part]).systems for part in parts))
