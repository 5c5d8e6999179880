"""A bundle's weights in the shapes of the model that is fine-tuned from it, and references that suit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equipot.model.bundle import tensor_reader
from equipot.model.card import BundleCard, read_card
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.train.dataset import Dataset
from equipot.train.finetune import nearest_element
from equipot.train.mix import Mix
from equipot.train.places import Places
from equipot.train.reference_fit import NormalEquations
from equipot.train.store import N_ELEMENTS

PREFIX = "potential."
"""The potential's name inside the trained module."""

_HEADS = ("energy_head.", "force_head.")
SAMPLE = 256
"""Structures of a level whose energies settle what its references have to leave to the network."""
_AT_ONCE = 16


def is_head(name: str) -> bool:
    """Whether a parameter of a potential is of its heads."""
    return name.startswith(_HEADS)


class Inherited:
    """The weights that a fine-tuned model begins with, by name and as float32.

    Elements, charges, spins and levels of theory have rows of their own: known ones keep theirs, and new
    ones begin as the nearest known (:func:`nearest_level`, and `nearest_element` in `finetune`). Rows of
    levels are rescaled, so that the network's energies in eV are at first the bundle's.
    """

    def __init__(self, bundle: Path, config: ModelConfig, references: References) -> None:
        """Args:
        bundle: whose shards have been checked.
        config: of the fine-tuned model.
        references: of the fine-tuned model.
        """
        self._card = read_card(bundle)
        self._stored = tensor_reader(bundle, self._card)
        self._config = config
        self._references = references
        self._special: dict[str, Callable[[], Tensor]] = {
            "embedding.element.weight": self._elements,
            "embedding.charge.weight": lambda: self._labels("charge", "charges"),
            "embedding.spin.weight": lambda: self._labels("spin", "spin_multiplicities"),
            "energy_head.down.weight": lambda: self._levels("energy_head.down.weight"),
            "force_head.down.weight": lambda: self._levels("force_head.down.weight"),
        }

    @property
    def names(self) -> list[str]:
        """Of all weights of the fine-tuned potential."""
        with torch.device("meta"):
            return list(Potential(self._config, self._references).state_dict())

    def tensor(self, name: str) -> Tensor:
        """One weight of the potential, whole."""
        make = self._special.get(name)
        return self._stored(name) if make is None else make()

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        """Flat numbers of a weight of the trained module: a `Reader` for the engine."""
        assert kind == "weights"
        return self.tensor(name.removeprefix(PREFIX)).flatten()[offset : offset + length]

    def _elements(self) -> Tensor:
        known = self._card.config.elements
        sources = [z if z in known else nearest_element(z, known) for z in self._config.elements]
        rows = self._stored("embedding.element.weight")[[known.index(z) for z in sources]]
        for name, field in (("charge", "charges"), ("spin", "spin_multiplicities")):
            mine = getattr(self._config, field)
            if len(mine) == 1 and len(getattr(self._card.config, field)) > 1:
                rows = rows + self._labels(name, field)  # what every structure has in common
        return rows

    def _labels(self, name: str, field: str) -> Tensor:
        mine, known = getattr(self._config, field), getattr(self._card.config, field)
        if len(known) == 1:
            return torch.zeros(len(mine), self._config.width)  # as the bundle, which does not tell them apart
        sources = [min(known, key=lambda other: (abs(other - value), other)) for value in mine]
        return self._stored(f"embedding.{name}.weight")[[known.index(value) for value in sources]]

    def _levels(self, name: str) -> Tensor:
        rows = []
        stored = self._stored(name)
        for row, level in enumerate(self._config.levels_of_theory):
            source = nearest_level(self._card, level, self._config, self._references)
            factor = self._card.references.scale[source] / self._references.scale[row]
            rows.append(stored[source] * float(factor))
        return torch.stack(rows)


def nearest_level(card: BundleCard, level: str, config: ModelConfig, references: References) -> int:
    """The level of theory of a bundle that a level begins as: itself, or else the one of nearest references.

    Nearest by the mean square difference of the reference energies of the elements that both know.
    """
    known = card.config.levels_of_theory
    if level in known:
        return known.index(level)
    shared = [z for z in config.elements if z in card.config.elements]
    theirs = card.references.energy[:, [card.config.elements.index(z) for z in shared]]
    mine = references.energy[config.levels_of_theory.index(level), [config.elements.index(z) for z in shared]]
    distance = np.square(theirs - mine).sum(axis=1)
    return int(distance.argmin())


def suited_references(bundle: Path, config: ModelConfig, references: References, mix: Mix) -> References:
    """Reference energies fitted to what the bundle's network leaves of the labels, not to the labels alone.

    The network has learnt its energies beside other references. With these, the energies of the training
    split are on average right before the first step.

    Args:
        bundle: whose shards have been checked.
        config: of the fine-tuned model.
        references: fitted to the labels of the training split.
        mix: whose training split is looked at, some structures of each level.
    """
    inherited = Inherited(bundle, config, references)
    bare = Potential(config, References(energy=np.zeros_like(references.energy), scale=references.scale))
    bare.load_state_dict({name: inherited.tensor(name) for name in inherited.names})
    bare.eval().requires_grad_(False)
    dataset = Dataset(mix.stores, config)
    levels = [config.levels_of_theory.index(store.manifest.level_of_theory) for store in mix.stores]
    energy = references.energy.copy()
    elements = np.array(config.elements)
    train = mix.part("train")
    for level in sorted(set(levels)):
        segments = [segment for segment in train.segments if levels[segment.store] == level]
        sums = network_sums(bare, dataset, Places(segments))
        if sums.structures:
            energy[level] -= sums.solve(elements)
    return References(energy=energy, scale=references.scale)


def network_sums(bare: Potential, dataset: Dataset, places: Places) -> NormalEquations:
    """Sums of what a potential without references says of structures, of `SAMPLE` of them at most."""
    sums = NormalEquations()
    if not len(places):
        return sums
    rows = np.unique(np.linspace(0, len(places) - 1, min(SAMPLE, len(places))).astype(np.int64))
    for part in np.array_split(rows, -(-len(rows) // _AT_ONCE)):
        batch = dataset.batch(places[part])
        systems = batch.systems
        places_of_atoms = systems.system_idx * N_ELEMENTS + systems.atomic_numbers
        counts = torch.bincount(places_of_atoms, minlength=systems.n_systems * N_ELEMENTS)
        found = bare(systems, forces=False).energy
        sums.add(counts.view(-1, N_ELEMENTS).double().numpy(), found.numpy())
    return sums
