"""Where a training run keeps what. Knows no content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipot.train.errors import TrainError


class RunError(TrainError):
    """A run directory that cannot be begun, continued or read."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where a run keeps what."""

    path: Path

    @property
    def card(self) -> Path:
        """The resolved recipe and what was derived from the data."""
        return self.path / "recipe.resolved.json"

    @property
    def mix(self) -> Path:
        """Which structures are trained on, validated on, tested on, if the recipe names stores and no mix."""
        return self.path / "mix"

    @property
    def parent(self) -> Path:
        """A copy of the bundle that a fine-tuned run began from."""
        return self.path / "parent"

    @property
    def metrics(self) -> Path:
        """One row per step, validation columns where there was one."""
        return self.path / "metrics.csv"

    @property
    def sources(self) -> Path:
        """Validation errors of each store, one row each per validation."""
        return self.path / "validation-by-source.csv"

    @property
    def incidents(self) -> Path:
        """Steps that went wrong, with the structures that caused it: one JSON object a line."""
        return self.path / "incidents.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same numbers for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def learning_curve(self) -> Path:
        """The same numbers as a picture."""
        return self.path / "learning-curve.png"

    @property
    def checkpoints(self) -> Path:
        """One directory per checkpoint."""
        return self.path / "checkpoints"

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is something to continue, and to lose."""
        return any(self.checkpoints.glob("step-*"))

    @property
    def logs(self) -> Path:
        """What ranks other than the first had to say."""
        return self.path / "log"
