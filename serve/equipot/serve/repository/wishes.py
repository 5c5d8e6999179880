"""Which labels are wanted, by files or by an operator's call; the later word wins. Loads nothing."""

from __future__ import annotations

from equipot.serve.registry import CANARY, SHADOW, STABLE, Label
from equipot.serve.repository.labels import FILE, LabelError
from equipot.serve.repository.observe import Observed


class Wishes:
    """The labels that each model is to have.

    Attributes:
        problems: why a labels file counts for nothing, by model.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self._unread: dict[str, str] = {}
        self._stamps: dict[str, str] = {}
        self._labels: dict[str, dict[str, Label]] = {}

    def adopt(self, observed: Observed) -> None:
        """Takes over labels files that have changed; one that cannot be read leaves things as they are."""
        self._unread = observed.unread.labels
        for name in observed.places:
            stamp, found = observed.labels.get(name, ("", {}))
            if stamp == self._stamps.get(name, ""):
                continue
            self._stamps[name] = stamp
            self.problems.pop(name, None)
            if isinstance(found, LabelError):
                self.problems[name] = f"{name}/{FILE} is not followed: {found}"
            elif found is None and self._labels.get(name):
                # Whoever writes a file over begins with an empty one.
                self.problems[name] = (
                    f"{name}/{FILE} is empty, so it is not followed: remove it for no labels"
                )
            else:
                self._labels[name] = dict(found or {})
        # By an operator's word there are labels without a file, too.
        for name in {*self._stamps, *self._labels} - set(observed.places):
            self._stamps.pop(name, None)
            self._labels.pop(name, None)
            self.problems.pop(name, None)

    def labels(self, name: str) -> dict[str, Label]:
        """The labels that a model is to have."""
        return self._labels.get(name, {})

    def blocked(self, name: str) -> str:
        """Why it cannot be known what is stable; empty if it can."""
        if name in self._labels:
            return ""
        return self.problems.get(name, "") or self._unread.get(name, "")

    def stable(self, name: str) -> bool:
        """Whether the plain name is settled by a label, or by one that cannot be read."""
        return STABLE in self.labels(name) or bool(self.blocked(name))

    def on_trial(self, name: str) -> set[str]:
        """Versions that are canary or shadow."""
        labels = self.labels(name)
        return {labels[label].version for label in (CANARY, SHADOW) if label in labels}

    def set(self, name: str, label: str, target: Label) -> None:
        """An operator's word."""
        self._labels.setdefault(name, {})[label] = target

    def remove(self, name: str, label: str) -> None:
        """An operator's word.

        Raises:
            KeyError: there is no such label.
        """
        del self._labels.get(name, {})[label]
