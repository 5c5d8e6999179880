"""One look at a repository: versions with their cards, and labels. Reads again only what has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from equipot.model.card import CARD_FILE
from equipot.model.errors import BundleError
from equipot.serve.card import ModelCard, read_model_card
from equipot.serve.registry import Label
from equipot.serve.repository.labels import FILE, LabelError, parse
from equipot.serve.repository.source import Key, Place, Source, SourceError, Unread
from equipot.serve.repository.versions import order

Labels = dict[str, Label] | LabelError | None
"""What a labels file says, or why it says nothing; None if there is nothing in it."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What there is.

    Attributes:
        places: by model and version, the oldest first.
        cards: of the versions that have one.
        reasons: why other versions cannot be loaded.
        labels: by model, the stamp of its labels file and what it says; a model without such a file is not
            there.
        unread: what is there and could not be read.
        problems: what else is wrong, one sentence each.
    """

    places: Mapping[str, Mapping[str, Place]] = field(default_factory=dict)
    cards: Mapping[Key, ModelCard] = field(default_factory=dict)
    reasons: Mapping[Key, str] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, Labels]] = field(default_factory=dict)
    unread: Unread = field(default_factory=Unread)
    problems: tuple[str, ...] = ()


class Observer:
    """Looks from one thread; remembers cards by the stamp of their file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._cards: dict[tuple[Key, str], ModelCard | str] = {}
        self._labels: dict[str, tuple[str, Labels]] = {}

    def look(self) -> Observed:
        """What there is now.

        Raises:
            SourceError: the repository cannot be read.
        """
        contents = self._source.contents()
        problems, unread = list(contents.problems), contents.unread
        cards: dict[Key, ModelCard] = {}
        reasons: dict[Key, str] = {}
        remembered: dict[tuple[Key, str], ModelCard | str] = {}
        for name, places in contents.places.items():
            if not places and name not in {model for model, _ in unread.versions}:
                problems.append(f"{name} has no version yet: put bundles into {name}/1, {name}/2 …")
            for version, place in places.items():
                key = (name, version)
                if not place.card_stamp:
                    reasons[key] = f"has no {CARD_FILE}: it is being copied, or it is no bundle"
                    continue
                known = self._cards.get((key, place.card_stamp))
                if known is None:
                    try:
                        known = self._read_card(place)
                    except (SourceError, OSError) as error:  # this machine's disk may be full, too
                        known = str(error)
                        unread.versions.add(key)
                        problems.append(known)
                if isinstance(known, ModelCard):
                    cards[key] = known
                    remembered[key, place.card_stamp] = known
                else:
                    reasons[key] = known
            problems += _twins(name, [(version, cards.get((name, version))) for version in places])
        self._cards = remembered
        labels: dict[str, tuple[str, Labels]] = {}
        for name, stamp in contents.labels.items():
            try:
                labels[name] = self._read_labels(name, stamp)
            except SourceError as error:
                unread.labels[name] = str(error)
        self._labels = labels
        problems += unread.labels.values()
        some = {name: places for name, places in contents.places.items() if places}
        return Observed(some, cards, reasons, labels, unread, tuple(problems))

    def _read_card(self, place: Place) -> ModelCard | str:
        raw = self._source.card_bytes(place)
        with TemporaryDirectory() as folder:
            (Path(folder) / CARD_FILE).write_bytes(raw)
            try:
                return read_model_card(Path(folder))
            except BundleError as error:
                # The folder that the message names is not the operator's.
                return str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "")

    def _read_labels(self, name: str, stamp: str) -> tuple[str, Labels]:
        known = self._labels.get(name)
        if known is not None and known[0] == stamp:
            return known
        raw = self._source.labels_bytes(name)
        try:
            text = raw.decode("utf-8-sig")
            return stamp, parse(text) if text.strip() else None
        except LabelError as error:
            return stamp, error
        except UnicodeDecodeError as error:
            return stamp, LabelError(f"{FILE} is not UTF-8: {error.reason} at byte {error.start}")


def completed(now: Observed, before: Observed) -> Observed:
    """A look in which what was there, and could not be read, is as it was before."""
    unread = now.unread
    places = {name: dict(versions) for name, versions in now.places.items()}
    cards, reasons, labels = dict(now.cards), dict(now.reasons), dict(now.labels)
    kept = {
        (name, version): place
        for name, versions in before.places.items()
        for version, place in versions.items()
        if name in unread.names or (name, version) in unread.versions
    }
    for key, place in kept.items():
        name, version = key
        places[name] = places.get(name, {}) | {version: place}
        reasons.pop(key, None)
    cards |= {key: before.cards[key] for key in kept if key in before.cards}
    reasons |= {key: before.reasons[key] for key in kept if key in before.reasons}
    labels |= {
        name: found for name, found in before.labels.items() if name in unread.names or name in unread.labels
    }
    still = {name: why for name, why in before.unread.labels.items() if name in unread.names}
    return replace(
        now,
        places={
            name: {version: versions[version] for version in sorted(versions, key=order)}
            for name, versions in places.items()
        },
        cards=cards,
        reasons=reasons,
        labels=labels,
        unread=replace(unread, labels=still | unread.labels),
    )


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
