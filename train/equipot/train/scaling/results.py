"""Writes what a finished point was: its learning curve and its result. Reads nothing of other points."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipot.train.flops import Flops
from equipot.train.metrics import Row
from equipot.train.scaling.exposure import Exposure

CURVE = (
    "step", "flops", "structures", "edges", "atoms", "train_loss", "validation_loss", "energy_mae_per_atom",
    "force_mae",
)  # fmt: skip
"""Columns of ``curve.csv``: model FLOPs of training, and what was seen so far; losses; eV/atom, eV/Å."""


def seen_at(step: int, exposure: Exposure, flops: Flops) -> dict[str, float | int]:
    """Exact sums after so many steps."""
    atoms, edges = int(exposure.atoms[step]), int(exposure.edges[step])
    return {
        "flops": flops.of(atoms, edges),
        "structures": int(exposure.structures[step]),
        "edges": edges,
        "atoms": atoms,
    }


def curve(rows: Sequence[Row], exposure: Exposure, flops: Flops) -> list[dict[str, Any]]:
    """One row per validation; the training loss is the mean over the steps since the one before."""
    found: list[dict[str, Any]] = []
    losses: list[float] = []
    for row in rows:
        if row.loss is not None:
            losses.append(row.loss)
        if row.validation_loss is None:
            continue
        energy = row.validation_energy_mae_mev_per_atom
        found.append(
            {
                "step": row.step,
                **seen_at(row.step, exposure, flops),
                "train_loss": finite(float(np.mean(losses))) if losses else None,
                "validation_loss": finite(row.validation_loss),
                "energy_mae_per_atom": None if energy is None else finite(energy / 1000),
                "force_mae": finite(row.validation_forces_mae_ev_per_angstrom),
            }
        )
        losses = []
    return found


def write_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write it aside, then name it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE)
    writer.writerows([_cell(row[name]) for name in CURVE] for row in rows)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.replace(path)


def finite(value: float | None) -> float | None:
    """The number, or None for one that is none."""
    return value if value is not None and math.isfinite(value) else None


def _cell(value: float | int | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.9g}"
