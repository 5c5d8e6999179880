"""The learning curve as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

from equipot.train.metrics import Row, read_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def plot_learning_curve(metrics: Path, picture: Path) -> None:
    """Draw training loss, and validation errors of energy and forces, over epochs; writes `picture`."""
    rows = read_rows(metrics)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    epochs, losses = _column(rows, "loss")
    if len(losses):
        window = max(1, len(losses) // 100)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(epochs, losses, color="0.8", linewidth=0.8, label="each step")
        left.plot(epochs[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
    _line(left, rows, "validation_loss", "tab:orange", "validation")
    _finish(left, "loss", "loss")
    _line(middle, rows, "validation_energy_mae_mev_per_atom", "tab:orange", "validation")
    _finish(middle, "energy", "MAE, meV/atom")
    _line(right, rows, "validation_forces_mae_ev_per_angstrom", "tab:orange", "validation")
    _finish(right, "forces", "MAE, eV/Å")
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _column(rows: list[Row], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    present = [(row.epoch, getattr(row, name)) for row in rows if getattr(row, name) is not None]
    values = np.array(present, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _line(axes: Axes, rows: list[Row], name: str, color: str, label: str) -> None:
    epochs, values = _column(rows, name)
    if len(values):
        axes.plot(epochs, values, color=color, marker=".", label=label)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
