"""Keeps the numbers of a run as CSV and for boards such as TensorBoard; a resumed run continues them."""

from __future__ import annotations

import csv
import errno
import io
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from equipot.train.boards import Board
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
    """Absent where a step went wrong and nothing was updated."""
    gradient_norm: float | None = None
    """Before clipping."""
    structures_per_second: float | None = None
    atoms_per_second: float | None = None
    edges_per_second: float | None = None
    model_flops_utilisation: float | None = None
    """Operations the model needs, over those that the ranks' matrix products could have made meanwhile."""
    peak_memory_gib: float | None = None
    """The most that any rank has held so far."""
    validation_loss: float | None = None
    validation_energy_mae_mev_per_atom: float | None = None
    validation_forces_mae_ev_per_angstrom: float | None = None
    validation_stress_mae_ev_per_cubic_angstrom: float | None = None

    def scalars(self) -> dict[str, float]:
        """What boards show, by name."""
        values = {name: getattr(self, name) for name in COLUMNS[2:]}
        return {_board_name(name): value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """Errors on the validation structures of one store."""

    step: int
    epoch: float
    source: str
    level_of_theory: str
    structures: int
    energy_mae_mev_per_atom: float | None
    energy_rmse_mev_per_atom: float | None
    forces_mae_ev_per_angstrom: float | None
    forces_rmse_ev_per_angstrom: float | None
    stress_mae_ev_per_cubic_angstrom: float | None
    stress_rmse_ev_per_cubic_angstrom: float | None

    def scalars(self) -> dict[str, float]:
        """What boards show, by name."""
        values = {name: getattr(self, name) for name in SOURCE_COLUMNS[5:]}
        return {
            f"validation by source/{self.source}/{name}": value
            for name, value in values.items()
            if value is not None
        }


COLUMNS = tuple(field.name for field in fields(Row))
SOURCE_COLUMNS = tuple(field.name for field in fields(SourceRow))
_FLUSH_SECONDS = 5.0


class Metrics:
    """Collects rows and appends them to the files on :meth:`flush`; use as a context manager.

    A disk that is full costs no training: rows wait for the next flush, and the user is told once.

    Args:
        run: where to.
        display: tells the user.
        step: rows after this step are dropped: they are about to be made again.
        boards: what else shows them.
    """

    def __init__(self, run: RunDirectory, display: Display, *, step: int, boards: Iterable[Board]) -> None:
        self._display = display
        self._steps, self._sources = _Table(run.metrics, COLUMNS), _Table(run.sources, SOURCE_COLUMNS)
        self._told = False
        self._flushed = time.monotonic()
        for table in (self._steps, self._sources):
            table.keep_up_to(step)
        self._boards = list(boards)
        self._unshown: list[Row | SourceRow] = []

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()
        for board in self._boards:
            self._guard(board.close)

    def add(self, row: Row) -> None:
        """Take in a row."""
        self._steps.waiting.append(row)
        self._unshown.append(row)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def add_sources(self, rows: Sequence[SourceRow]) -> None:
        """Take in the rows of one validation."""
        self._sources.waiting.extend(rows)
        self._unshown.extend(rows)

    def flush(self) -> None:
        """Bring everything to disk, so that a checkpoint is never ahead of its rows."""
        self._flushed = time.monotonic()
        for table in (self._steps, self._sources):
            self._guard(table.append)
        rows, self._unshown = self._unshown, []
        self._boards = [board for board in self._boards if self._guard(lambda b=board: _show(b, rows))]  # type: ignore[misc]

    def _guard(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except OSError as error:
            if not self._told:
                self._display.warn(f"the run's numbers could not be written: {error}")
            self._told = True
            return False
        return True


def _show(board: Board, rows: Sequence[Row | SourceRow]) -> None:
    for row in rows:
        board.show(row.step, row.scalars())
    board.flush()


def _board_name(column: str) -> str:
    group = "validation" if column.startswith("validation_") else "train"
    return f"{group}/{column.removeprefix('validation_')}"


class _Table:
    """A CSV file that rows are appended to, whole or not at all."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._columns = columns
        self.waiting: list[Row | SourceRow] = []

    def append(self) -> None:
        """Write what is waiting.

        Raises:
            OSError: not possible; the file is as before.
        """
        if not self.waiting:
            return
        text = io.StringIO()
        writer = csv.writer(text)
        # unbuffered: what a full disk leaves of a row can be taken back, and nothing is tried again behind us
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            if not before:
                writer.writerow(self._columns)
            writer.writerows([_cell(getattr(row, name)) for name in self._columns] for row in self.waiting)
            data = text.getvalue().encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise
        self.waiting = []

    def keep_up_to(self, step: int) -> None:
        """Drop the rows of later steps."""
        keep_lines(self._path, lambda line: int(line.split(",")[0]) <= step, header=1)


def _cell(value: float | str | None) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.9g}"


def keep_lines(path: Path, wanted: Callable[[str], bool], *, header: int = 0) -> None:
    """Drop whole lines of a file, and a torn last one; the header stays. No file is fine."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = lines[:header] + [line for line in lines[header:] if line.endswith("\n") and wanted(line)]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


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
