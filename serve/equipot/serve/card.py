"""What a server knows of a model, whatever computes it. Knows nothing of engines, and no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from equipot.model.card import BundleCard, read_card

ForceMode = Literal["conservative", "direct", "unknown", "none"]
NO_FORCES: ForceMode = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One potential as callers see it: a bundle of ours, or somebody else's.

    Attributes:
        name: what it calls itself.
        digest: "sha256:…" over all that decides its numbers.
        levels_of_theory: whose total energies it gives; at least one.
        elements: atomic numbers it knows, ascending; empty if it does not say.
        charges: total charges in e it knows; empty if any is passed on.
        spin_multiplicities: 2S+1 it knows, 0 for "not stated"; empty if any is passed on.
        cutoff: in Å; 0 if it has none or does not say.
        mean_neighbors: edges of an atom to expect before any are counted.
        force_mode: where its forces come from; "none" if it has none.
        has_stress: whether it gives stress.
        dtype: of its stored weights; empty if it does not say.
        n_parameters: 0 if it does not say.
        text: the whole card as JSON.
        members: potentials in it; 0 if it does not say.
        is_calibrated: whether it knows intervals.
        has_domain: whether it knows where its training ended.
    """

    name: str
    digest: str
    levels_of_theory: tuple[str, ...]
    elements: tuple[int, ...]
    charges: tuple[int, ...]
    spin_multiplicities: tuple[int, ...]
    cutoff: float
    mean_neighbors: float
    force_mode: ForceMode
    has_stress: bool
    dtype: str
    n_parameters: int
    text: str
    members: int = 0
    is_calibrated: bool = False
    has_domain: bool = False

    @property
    def has_forces(self) -> bool:
        """Whether it gives forces."""
        return self.force_mode != NO_FORCES

    @classmethod
    def of_bundle(cls, card: BundleCard, text: str = "") -> ModelCard:
        """The card of a bundle.

        Args:
            card: as it was read.
            text: its model.json as it stands; made anew if empty.
        """
        config = card.config
        return cls(
            name=card.name,
            digest=card.digest,
            levels_of_theory=config.levels_of_theory,
            elements=config.elements,
            charges=config.charges,
            spin_multiplicities=config.spin_multiplicities,
            cutoff=config.cutoff,
            mean_neighbors=config.mean_neighbors,
            force_mode="unknown" if config.forces == "invariant" else config.forces,
            # Stress is a derivative of the energy: a direct head has none.
            has_stress=config.forces == "conservative",
            dtype=card.dtype,
            n_parameters=card.n_parameters,
            text=text or json.dumps(card.to_json(), sort_keys=True, indent=1, ensure_ascii=False),
            members=card.members,
            is_calibrated=card.uncertainty is not None and card.uncertainty.calibration is not None,
            has_domain=card.uncertainty is not None and card.uncertainty.domain is not None,
        )


def read_model_card(bundle: Path) -> ModelCard:
    """The card of a bundle's folder.

    Raises:
        BundleError: it is missing, damaged, or of a newer version.
    """
    return ModelCard.of_bundle(read_card(bundle), (bundle / "model.json").read_text(encoding="utf-8"))


def listed(values: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(repr(value) for value in values)
