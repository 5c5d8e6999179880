"""Where training stands: what a checkpoint must remember besides weights and optimizer. Plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Where training stands; steps count updates made so far."""

    step: int = 0
    epoch: int = 0
    epoch_offset: int = 0
    """Steps into the epoch: with the seed, the sampler's whole position."""
    validated_step: int = -1
    best_step: int = -1
    best_loss: float | None = None
    validations_without_improvement: int = 0
    skipped: int = 0
    """Steps that went wrong and changed nothing."""
    rolled_back: int = 0
    """Steps that went wrong and were answered by the weights of an earlier checkpoint."""
    losses: tuple[float, ...] = ()
    """Of the last steps that went well, the newest at the end: what a spike is measured by."""
    seconds: float = 0.0

    def after_step(self, epoch: int, epoch_offset: int) -> TrainerState:
        """One update later."""
        return replace(self, step=self.step + 1, epoch=epoch, epoch_offset=epoch_offset)

    def with_loss(self, loss: float, window: int) -> TrainerState:
        """Remember a loss, and so many in all."""
        return replace(self, losses=(*self.losses, loss)[-window:])

    def after_validation(self, loss: float | None) -> TrainerState:
        """A validation later; the loss of an empty split is None, and the newest weights are its best."""
        seen = replace(self, validated_step=self.step)
        if loss is None or self.best_loss is None or loss < self.best_loss:
            return replace(seen, best_step=self.step, best_loss=loss, validations_without_improvement=0)
        return replace(seen, validations_without_improvement=self.validations_without_improvement + 1)

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether so many validations brought no improvement."""
        return patience is not None and self.validations_without_improvement >= patience

    @property
    def is_best(self) -> bool:
        """Whether no earlier weights did better on the validation split."""
        return self.best_step == self.step

    def differs_from(self, other: TrainerState | None) -> bool:
        """Whether there is more to remember than in another state; time alone is not."""
        return other is None or replace(self, seconds=other.seconds) != other

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrainerState:
        """From the fields by name, as JSON keeps them."""
        return TrainerState(**{**values, "losses": tuple(values["losses"])})
