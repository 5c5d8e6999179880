"""Predictions and measurements as tables, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from equipot.train.errors import TrainError
from equipot.train.memory.plan import Candidate, as_toml, gib, in_words, propose
from equipot.train.memory.planning import Plan
from equipot.train.memory.profile import Profile
from equipot.train.recipe import Recipe

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from rich.table import Table

KINDS = (
    "weights",
    "gathered weights",
    "master weights",
    "optimizer",
    "moving average",
    "gradients",
    "offloading",
    "communication",
    "activations",
    "checkpoint",
)


def plan_table(plan: Plan) -> Table:
    """Every setting, the proposed one marked."""
    fitting = [each for each in plan.candidates if each.total <= plan.memory]
    chosen = propose(plan.candidates, plan.memory) if fitting else None
    shared = "all ranks" if plan.sharing > 1 else "in all"
    table = Table(box=None, pad_edge=False, title=_title(plan), title_justify="left")
    for column in ("", "stage", "recompute", "messages", "offload", "micro"):
        table.add_column(column)
    for column in ("per rank", shared, "most when", "s/step"):
        table.add_column(column, justify="right")
    for each in plan.candidates:
        recipe = each.recipe
        fits = each.total <= plan.memory
        messages = recipe.model.messages
        table.add_row(
            "→" if each is chosen else "" if fits else "✗",
            str(recipe.zero.stage),
            "yes" if recipe.activation_checkpointing else "no",
            messages if isinstance(messages, str) else "/".join(messages),
            recipe.zero.offload_optimizer,
            str(recipe.batch.accumulation),
            gib(each.prediction.per_rank),
            gib(each.total),
            each.prediction.phase,
            f"{each.prediction.seconds:.3g}",
            style=None if fits else "dim",
        )
    return table


def proposal_lines(plan: Plan, chosen: Candidate) -> list[str]:
    """What is proposed, and of what its memory is made."""
    changes = in_words(chosen.changes)
    what = f"proposed: {', '.join(changes)}" if changes else "proposed: the recipe as it is"
    parts = [*chosen.prediction.parts.items(), ("process and libraries", chosen.prediction.process)]
    made_of = ", ".join(
        f"{name} {gib(size)}" for name, size in sorted(parts, key=lambda p: -p[1]) if size > 2**20
    )
    return [
        f"{what}: {gib(chosen.total)} of {gib(plan.memory)}, {chosen.prediction.seconds:.3g} s a step",
        f"a rank's {gib(chosen.prediction.per_rank)} in {chosen.prediction.phase}: {made_of}",
    ]


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe's TOML.

    Raises:
        TrainError: it cannot be written.
    """
    try:
        path.write_text(as_toml(recipe), encoding="utf-8")
    except OSError as error:
        raise TrainError(f"{path} cannot be written: {error}") from None


def profile_table(profiles: Sequence[Profile]) -> Table:
    """Predicted and measured side by side."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for column in ("predicted", "measured", "error", "s/step predicted", "computed", "error", "on the wall"):
        table.add_column(column, justify="right")
    for each in profiles:
        table.add_row(
            each.name,
            gib(each.predicted_bytes),
            gib(each.measured.peak),
            f"{each.memory_error:+.1%}",
            f"{each.prediction.seconds:.3g}",
            f"{each.measured.busy:.3g}",
            f"{each.time_error:+.0%}",
            f"{each.measured.seconds:.3g}",
        )
    return table


def comparison_table(profiles: Sequence[Profile]) -> Table:
    """The paper's table: memory and time relative to the first of each form."""
    table = Table(box=None, pad_edge=False, title="relative to the same form as it is", title_justify="left")
    table.add_column("run", no_wrap=True)
    for column in ("peak memory", "without processes", "time"):
        table.add_column(column, justify="right")
    for row in relative(profiles):
        table.add_row(str(row["run"]), *(f"{row[key]:.0%}" for key in ("memory", "own", "time")))
    return table


def relative(profiles: Sequence[Profile]) -> list[dict[str, object]]:
    """Measured memory and time over those of the first run of the same form."""
    rows: list[dict[str, object]] = []
    first: dict[str, Profile] = {}
    for each in profiles:
        reference = first.setdefault(each.form, each)
        rows.append(
            {
                "run": each.name,
                "memory": each.measured.peak / reference.measured.peak,
                "own": _own(each) / _own(reference),
                "time": each.measured.busy / reference.measured.busy,
            }
        )
    return rows


def as_json(profiles: Sequence[Profile]) -> list[dict[str, object]]:
    """For a file."""
    return [
        {
            "run": each.name,
            "ranks": each.ranks,
            "predicted_bytes": each.predicted_bytes,
            "measured_bytes": each.measured.peak,
            "measured_pss_bytes": each.measured.pss,
            "memory_error": round(each.memory_error, 4),
            "predicted_seconds": round(each.prediction.seconds, 4),
            "measured_seconds": round(each.measured.busy, 4),
            "measured_seconds_on_the_wall": round(each.measured.seconds, 4),
            "time_error": round(each.time_error, 3),
            "parts_of_a_rank": dict(each.prediction.parts) | {"process": each.prediction.process},
            "most_when": each.prediction.phase,
        }
        for each in profiles
    ]


def save(profiles: Sequence[Profile], out: Path, *, table: bool) -> list[str]:
    """Write report and figure into a directory; says where they are.

    Raises:
        TrainError: it cannot be written.
    """
    content: dict[str, object] = {"runs": as_json(profiles)}
    if table:
        content["relative"] = relative(profiles)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "memory.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw(profiles, out / "memory.png")
    except OSError as error:
        raise TrainError(f"{out} cannot be written: {error}") from None
    return [f"results in {out}: memory.json, memory.png"]


def draw(profiles: Sequence[Profile], path: Path) -> None:
    """Where a rank's memory goes over a step, predicted, with what was measured; a panel for each run."""
    columns = min(3, len(profiles))
    rows = -(-len(profiles) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns + 1, 3.4 * rows + 0.6), squeeze=False, sharey=True
    )
    colours = dict(zip(KINDS, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    top = 0.0
    for axis, profile in zip(axes.flat, profiles, strict=False):
        timeline = profile.prediction.timeline
        time = profile.clock(timeline)
        kinds = [kind for kind in KINDS if kind in timeline.live]
        process = np.full(len(time), profile.prediction.process)
        values = [process, *(timeline.live[kind] for kind in kinds)]
        axis.stackplot(
            time,
            [value / 2**20 for value in values],
            labels=["process", *kinds],
            colors=["0.8", *(colours[kind] for kind in kinds)],
        )
        measured = profile.measured.peak / profile.ranks / 2**20
        axis.axhline(measured, color="black", linestyle="--", linewidth=1, label="measured peak")
        top = max(top, measured, float(sum(values).max()) / 2**20)  # type: ignore[union-attr]
        axis.set_title(profile.name, fontsize=9)
        axis.set_xlabel("s of a step, predicted")
    axes[0, 0].set_ylabel("MiB a rank")
    axes[0, 0].set_ylim(0, 1.08 * top)
    for axis in list(axes.flat)[len(profiles) :]:
        axis.set_axis_off()
    handles: dict[str, Artist] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="lower center",
        ncol=2 + 2 * columns,
        fontsize=8,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.2 if rows == 1 else 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _own(profile: Profile) -> int:
    return max(1, profile.measured.peak - profile.ranks * profile.prediction.process)


def _title(plan: Plan) -> str:
    kernels = "compiled message kernels" if plan.machine.compiled else "messages in pure torch"
    return (
        f"{plan.ranks} rank(s), {gib(plan.memory)}; {plan.machine.rates.gemm / 1e9:.0f} GFLOP/s a rank, "
        f"{kernels}; an empty rank takes {gib(plan.machine.baseline.own)} and libraries "
        f"{gib(plan.machine.baseline.files)}"
    )
