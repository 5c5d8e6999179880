"""Keeps the numbers of a run as CSV and for TensorBoard; a resumed run continues them."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

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


class Metrics:
    """Appends rows; use as a context manager.

    Args:
        run: where to.
        step: rows after this step are dropped: they are about to be made again.
    """

    def __init__(self, run: RunDirectory, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, needed on the first rank alone

        _keep_up_to(run.metrics, step)
        self._file = run.metrics.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if self._file.tell() == 0:
            self._writer.writerow(COLUMNS)
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._board.close()

    def add(self, row: Row) -> None:
        """Append a row."""
        values = [getattr(row, name) for name in COLUMNS]
        self._writer.writerow(["" if value is None else f"{value:.9g}" for value in values])
        for name, value in zip(COLUMNS[2:], values[2:], strict=True):
            if value is not None:
                group = "validation" if name.startswith("validation_") else "train"
                self._board.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, row.step)

    def flush(self) -> None:
        """Bring everything to disk, so that a checkpoint is never ahead of its rows."""
        self._file.flush()
        self._board.flush()


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
