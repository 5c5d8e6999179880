"""Where a run's numbers are shown besides its files. A board is told numbers by name and step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Board(Protocol):
    """Shows numbers; may raise OSError, and is asked no more after that."""

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Take in the numbers of a step, by names as ``train/loss``."""

    def flush(self) -> None:
        """Let others see what was shown."""

    def close(self) -> None:
        """The run is over, or goes on later."""


class TensorBoard:
    """Event files.

    Args:
        path: of their folder.
        step: what older runs showed of later steps is taken back.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed on the first rank alone

        self._writer = SummaryWriter(str(path), purge_step=step + 1)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """To disk."""
        self._writer.flush()

    def close(self) -> None:
        """To disk, for good."""
        self._writer.close()
