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
from matplotlib.ticker import FuncFormatter, NullFormatter


def plot_learning_curve(metrics: Path, picture: Path) -> None:
    """Draw training loss, and validation errors of energy and forces, over epochs; writes `picture`."""
    rows = read_rows(metrics)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.15, top=0.9, wspace=0.3)
    epochs, losses = _column(rows, "loss")
    if len(losses):
        window = max(1, len(losses) // 100)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(epochs, losses, color="0.8", linewidth=0.8, label="each step")
        left.plot(epochs[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} step(s)")
    _line(left, rows, "validation_loss")
    _line(middle, rows, "validation_energy_mae_mev_per_atom")
    _line(right, rows, "validation_forces_mae_ev_per_angstrom")
    _finish(left, "loss", "loss")
    _finish(middle, "energy", "MAE, meV/atom")
    _finish(right, "forces", "MAE, eV/Å")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _column(rows: list[Row], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    present = [(row.epoch, getattr(row, name)) for row in rows if getattr(row, name) is not None]
    values = np.array(present, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _line(axes: Axes, rows: list[Row], name: str) -> None:
    epochs, values = _column(rows, name)
    if len(values):
        axes.plot(epochs, values, color="tab:orange", marker=".", label="validation")


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="epoch", ylabel=unit)
    values = np.concatenate([np.asarray(line.get_ydata()) for line in axes.lines] or [np.empty(0)])
    # Within a decade a logarithmic axis has hardly a number to read.
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(values):
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
