"""Older bundles made new: one function per version of the format. Knows nothing of tensors or files.

A change of the card's keys comes with a new `card.BUNDLE_VERSION`, a function here under the version it
reads, and a golden bundle of that version in tests/golden.
"""

from collections.abc import Callable, Mapping
from typing import Any

Card = dict[str, Any]
Upgrade = Callable[[Card], Card]


def _with_uncertainty(card: Card) -> Card:
    return {**card, "members": 1, "uncertainty": None}


UPGRADES: dict[int, Upgrade] = {1: _with_uncertainty}


def upgrade_card(card: Card, *, to_version: int, upgrades: Mapping[int, Upgrade] = UPGRADES) -> Card:
    """Applies the upgrades from the card's ``format_version`` up to ``to_version``, one after the other.

    Raises:
        KeyError: a version on the way has no upgrade.
    """
    for version in range(card["format_version"], to_version):
        card = {**upgrades[version](card), "format_version": version + 1}
    return card
