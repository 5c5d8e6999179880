"""Draws what a load showed; needs matplotlib, which serving does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipot.serve.errors import ServeError


def draw(path: Path, capacity: float, levels: Sequence[Mapping[str, Any]]) -> None:
    """Goodput and latency against the load.

    Args:
        path: of the picture; its ending says which kind.
        capacity: structures a second, measured before.
        levels: of the report.

    Raises:
        ServeError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ServeError("a plot needs matplotlib: pip install matplotlib, or leave --plot out") from error
    offered = [level["load"] for level in levels]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(offered, [level["goodput"] / capacity for level in levels], "o-", label="answered in time")
    left.plot(offered, [min(load, 1.0) for load in offered], "--", color="grey", label="ideal")
    left.set(xlabel="offered ÷ capacity", ylabel="answered ÷ capacity", xscale="log", ylim=(0, None))
    for name, marker in (("p50_s", "o-"), ("p99_s", "s-")):
        right.plot(offered, [level[name] for level in levels], marker, label=name[:3])
    right.axhline(levels[0]["deadline_s"], linestyle="--", color="grey", label="deadline")
    right.set(xlabel="offered ÷ capacity", ylabel="latency of the answered, s", xscale="log", yscale="log")
    for axes in (left, right):
        axes.set_xticks(offered, [f"{load:g}×" for load in offered])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
