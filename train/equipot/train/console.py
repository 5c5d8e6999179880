"""What a run shows while it goes: a live bar on a terminal, now and then a line elsewhere. Rank 0 only."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_QUIET_SECONDS = 5.0  # between two lines where there is no terminal


class Display:
    """Shows notes, steps and validations; a silent one for ranks that do not print."""

    def __init__(self, *, silent: bool = False) -> None:
        self._console = Console(quiet=silent, highlight=False)
        self._live = self._console.is_terminal and not silent
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=None, numbers="")
        self._numbers = ""
        self._validation = ""
        self._spoke = 0.0
        self._began = time.monotonic()
        self._first_step = 0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stays and stands out."""
        self._console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def begin(self, step: int, total: int) -> None:
        """Training goes from `step` to `total`."""
        self._first_step = step
        self._began = time.monotonic()
        self._progress.reset(self._task, total=total, completed=step)

    def step(self, step: int, total: int, epoch: float, *, loss: float, speed: float) -> None:
        """A step is done, at that many structures a second."""
        self._numbers = f"loss {loss:.3g}" if self._live else f"loss {loss:.4g}  {speed:.0f} structures/s"
        self._update(step, epoch)
        if not self._live and time.monotonic() - self._spoke > _QUIET_SECONDS:
            self._say(step, total, epoch)

    def validation(self, step: int, total: int, epoch: float, errors: str) -> None:
        """A validation is done."""
        self._validation = errors if self._live else f"validation {errors}"
        self._update(step, epoch)
        if not self._live and (step == total or time.monotonic() - self._spoke > _QUIET_SECONDS):
            self._say(step, total, epoch)

    def _update(self, step: int, epoch: float) -> None:
        numbers = "  ".join(part for part in (self._numbers, self._validation) if part)
        self._progress.update(self._task, completed=step, description=f"epoch {epoch:.1f}", numbers=numbers)

    def _say(self, step: int, total: int, epoch: float) -> None:
        self._spoke = time.monotonic()
        done = step - self._first_step
        left = (self._spoke - self._began) / done * (total - step) if done else 0.0
        parts = [f"epoch {epoch:.1f}", f"step {step}/{total}", self._numbers, self._validation]
        parts.append(f"{left:.0f} s left" if left else "")
        self._console.print(escape("  ".join(part for part in parts if part)), soft_wrap=True)
