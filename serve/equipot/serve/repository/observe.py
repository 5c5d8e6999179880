"""One look at a repository: versions with their cards, and labels. Reads again only what has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from equipot.model.card import CARD_FILE
from equipot.model.errors import BundleError
from equipot.serve.card import ModelCard, read_model_card
from equipot.serve.registry import Label
from equipot.serve.repository.labels import LabelError, parse
from equipot.serve.repository.source import Place, Source, SourceError

Key = tuple[str, str]
"""A model's name and version."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What there is.

    Attributes:
        places: by model and version, the oldest first.
        cards: of the versions that have one.
        reasons: why other versions cannot be loaded.
        labels: by model, the stamp of its labels file and what it says, or why it cannot be read; a model
            without such a file is not there.
        problems: what else is wrong, one sentence each.
    """

    places: Mapping[str, Mapping[str, Place]]
    cards: Mapping[Key, ModelCard]
    reasons: Mapping[Key, str]
    labels: Mapping[str, tuple[str, dict[str, Label] | LabelError]]
    problems: tuple[str, ...]


class Observer:
    """Looks from one thread; remembers cards by the stamp of their file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._cards: dict[tuple[Key, str], ModelCard | str] = {}
        self._labels: dict[str, tuple[str, dict[str, Label] | LabelError]] = {}

    def look(self) -> Observed:
        """What there is now.

        Raises:
            SourceError: the repository cannot be read.
        """
        contents = self._source.contents()
        problems = list(contents.problems)
        cards: dict[Key, ModelCard] = {}
        reasons: dict[Key, str] = {}
        remembered: dict[tuple[Key, str], ModelCard | str] = {}
        for name, places in contents.places.items():
            if not places:
                problems.append(f"{name} has no version yet: put bundles into {name}/1, {name}/2 …")
            for version, place in places.items():
                key = (name, version)
                if not place.card_stamp:
                    reasons[key] = f"has no {CARD_FILE}: it is being copied, or it is no bundle"
                    continue
                known = self._cards.get((key, place.card_stamp))
                if known is None:
                    known = self._read_card(place)
                if isinstance(known, ModelCard):
                    cards[key] = known
                    remembered[key, place.card_stamp] = known
                else:
                    reasons[key] = known
            problems += _twins(name, [(version, cards.get((name, version))) for version in places])
        self._cards = remembered
        labels = {name: self._read_labels(name, stamp) for name, stamp in contents.labels.items()}
        self._labels = labels
        some = {name: places for name, places in contents.places.items() if places}
        return Observed(some, cards, reasons, labels, tuple(problems))

    def _read_card(self, place: Place) -> ModelCard | str:
        try:
            text = self._source.card_text(place)
        except SourceError as error:
            return str(error)
        with TemporaryDirectory() as folder:
            (Path(folder) / CARD_FILE).write_text(text, encoding="utf-8")
            try:
                return read_model_card(Path(folder))
            except BundleError as error:
                # The folder that the message names is not the operator's.
                return str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "")

    def _read_labels(self, name: str, stamp: str) -> tuple[str, dict[str, Label] | LabelError]:
        known = self._labels.get(name)
        if known is not None and known[0] == stamp:
            return known
        try:
            return stamp, parse(self._source.labels_text(name))
        except LabelError as error:
            return stamp, error
        except SourceError as error:
            return stamp, LabelError(str(error))


def _twins(name: str, versions: list[tuple[str, ModelCard | None]]) -> list[str]:
    """Versions that are one bundle twice: allowed, and most likely a mistake."""
    seen: dict[str, str] = {}
    problems = []
    for version, card in versions:
        if card is None:
            continue
        if card.digest in seen:
            problems.append(
                f"{name} {seen[card.digest]} and {version} are the same bundle ({card.digest[:19]}…)"
            )
        seen[card.digest] = version
    return problems
