"""Steps that go wrong: how they are noticed, what is done, and how it is told. Knows no engine and no ranks.

What is decided depends on numbers that all ranks have alike, and on the trainer's state, which checkpoints
remember: so all ranks decide the same, and a run that is continued decides as it would have without a break.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from equipot.train.console import Display
from equipot.train.errors import TrainError
from equipot.train.metrics import keep_lines
from equipot.train.recipe import WatchSection
from equipot.train.state import TrainerState

Decision = Literal["report", "stop", "skip", "rollback"]

_NAMED = 5  # structures on the terminal; all are in the file


class NonFiniteError(TrainError):
    """A step went wrong, and training is not to go on."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with a step."""

    what: Literal["loss", "gradient"]
    why: Literal["not finite", "spike"]
    loss: float
    usual: float | None
    """Median of the losses before."""
    decision: Decision

    def in_words(self) -> str:
        """As a half sentence."""
        if self.why == "not finite":
            return f"the {self.what} is not a finite number"
        return f"the loss is {self.loss:.4g}, {self.loss / (self.usual or 1.0):.1f} times the usual"


@dataclass(frozen=True, slots=True)
class Culprit:
    """A structure of a batch that went wrong."""

    store: str
    structure: int
    file: str
    frame: int
    loss: float | None
    """Its part of the batch's loss; None if that is no finite number."""

    def in_words(self) -> str:
        """As an error message calls it."""
        return f"{self.store}[{self.structure}] ({self.file}, frame {self.frame})"


def trouble_with_loss(loss: float, state: TrainerState, settings: WatchSection) -> Trouble | None:
    """What is wrong with the loss of a step, before anything is updated by it."""
    if not math.isfinite(loss):
        return Trouble("loss", "not finite", loss, _usual(state), settings.not_finite)
    if 2 * len(state.losses) < settings.window:
        return None
    usual = median(state.losses)
    if usual > 0 and loss > settings.spike_factor * usual:
        return Trouble("loss", "spike", loss, usual, settings.spike)
    return None


def trouble_with_gradient(loss: float, state: TrainerState, settings: WatchSection) -> Trouble:
    """The same for a gradient that is not finite, of a loss that is."""
    return Trouble("gradient", "not finite", loss, _usual(state), settings.not_finite)


def _usual(state: TrainerState) -> float | None:
    return median(state.losses) if state.losses else None


def is_bound_reached(state: TrainerState, settings: WatchSection) -> bool:
    """Whether so many steps have gone wrong that no more may be skipped or rolled back."""
    return state.skipped + state.rolled_back >= settings.most


class Incidents:
    """The file of incidents, and the lines on the terminal; on the first rank alone.

    Args:
        path: of the file.
        display: tells the user.
        step: incidents after this step are dropped: they are about to be met again.
    """

    def __init__(self, path: Path, display: Display, *, step: int) -> None:
        self._path = path
        self._display = display
        keep_lines(path, lambda line: int(json.loads(line)["step"]) <= step)

    def add(
        self, step: int, epoch: float, trouble: Trouble, culprits: Sequence[Culprit], outcome: str
    ) -> None:
        """Write an incident down, and tell it unless it ends the run, which tells it itself.

        Args:
            step: that went wrong, from 1.
            epoch: epochs made so far.
            trouble: what is wrong.
            culprits: the structures that caused it, the worst first.
            outcome: what was done, in words.
        """
        record = {
            "step": step,
            "epoch": epoch,
            **asdict(trouble),
            "loss": trouble.loss if math.isfinite(trouble.loss) else None,
            "outcome": outcome,
            "structures": [asdict(culprit) for culprit in culprits],
        }
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            self._display.warn(f"{self._path} could not be written: {error}")
        if trouble.decision != "stop":
            self._display.warn(
                f"step {step}: {trouble.in_words()}, from structures {named(culprits)}; {outcome}. "
                f"All are in {self._path}"
            )


def named(culprits: Sequence[Culprit]) -> str:
    """The worst structures in words."""
    more = f" and {len(culprits) - _NAMED} more" if len(culprits) > _NAMED else ""
    return ", ".join(culprit.in_words() for culprit in culprits[:_NAMED]) + more
