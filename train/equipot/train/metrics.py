"""Keeps the numbers of a run as CSV and for TensorBoard; a resumed run continues them."""

from __future__ import annotations

import csv
import errno
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from equipot.train.console import Display
from equipot.train.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One step, or one validation after it; absent numbers are empty cells."""

    step: int
    """Updates made so far."""
    epoch: float
    """Epochs made so far."""
    loss: float | None = None
    energy_loss: float | None = None
    """Mean penalty before weighting."""
    forces_loss: float | None = None
    stress_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """Before clipping."""
    structures_per_second: float | None = None
    validation_loss: float | None = None
    validation_energy_mae_mev_per_atom: float | None = None
    validation_forces_mae_ev_per_angstrom: float | None = None
    validation_stress_mae_ev_per_cubic_angstrom: float | None = None


COLUMNS = tuple(field.name for field in fields(Row))
_FLUSH_SECONDS = 5.0


class Metrics:
    """Collects rows and appends them to the files on :meth:`flush`; use as a context manager.

    A disk that is full costs no training: rows wait for the next flush, and the user is told once.

    Args:
        run: where to.
        display: tells the user.
        step: rows after this step are dropped: they are about to be made again.
    """

    def __init__(self, run: RunDirectory, display: Display, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed on the first rank alone

        self._path = run.metrics
        self._display = display
        self._waiting: list[Row] = []
        self._told = False
        self._flushed = time.monotonic()
        _keep_up_to(run.metrics, step)
        self._board: SummaryWriter | None = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()
        if self._board is not None:
            self._guard(self._board.close)

    def add(self, row: Row) -> None:
        """Take in a row."""
        self._waiting.append(row)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring everything to disk, so that a checkpoint is never ahead of its rows."""
        self._flushed = time.monotonic()
        if self._guard(self._append):
            rows, self._waiting = self._waiting, []
            if self._board is not None and not self._guard(lambda: self._show(rows)):
                self._board = None

    def _append(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        # unbuffered: what a full disk leaves of a row can be taken back, and nothing is tried again behind us
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            if not before:
                writer.writerow(COLUMNS)
            writer.writerows(_cells(row) for row in self._waiting)
            data = text.getvalue().encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise

    def _show(self, rows: list[Row]) -> None:
        assert self._board is not None
        for row in rows:
            for name in COLUMNS[2:]:
                value = getattr(row, name)
                if value is not None:
                    group = "validation" if name.startswith("validation_") else "train"
                    self._board.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, row.step)
        self._board.flush()

    def _guard(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except OSError as error:
            if not self._told:
                self._display.warn(f"{self._path} or TensorBoard's files could not be written: {error}")
            self._told = True
            return False
        return True


def _cells(row: Row) -> list[str]:
    values = [getattr(row, name) for name in COLUMNS]
    return ["" if value is None else f"{value:.9g}" for value in values]


def read_rows(path: Path) -> list[Row]:
    """Rows of a metrics file; a torn last line is left out."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for values in csv.DictReader(file):
            if None in values or None in values.values():
                continue
            numbers = {name: float(text) if text else None for name, text in values.items()}
            step, epoch = numbers.pop("step"), numbers.pop("epoch")
            rows.append(Row(step=int(step or 0), epoch=epoch or 0.0, **numbers))
    return rows


def _keep_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = lines[:1] + [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
