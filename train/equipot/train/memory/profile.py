"""Measures a few real steps of a recipe in real ranks, watched from outside, beside what was predicted."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from equipot.train.launch import launch
from equipot.train.memory.planning import Say, measure_machine, opened
from equipot.train.memory.predict import Machine, Prediction, predict
from equipot.train.memory.trace import Timeline
from equipot.train.memory.watch import Sample, Watch
from equipot.train.recipe import Recipe

STEPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What ranks took."""

    peak: int
    """bytes of all ranks at once: their own, and libraries once"""
    pss: int
    """the most that the system's proportional count came to, which other users of a library lower"""
    seconds: float
    """median of the steps after the first, on the wall"""
    busy: float
    """the same of what a thread computed, which other work on the machine does not lengthen"""
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """A run's prediction and measurement."""

    name: str
    form: str
    ranks: int
    prediction: Prediction
    measured: Measured
    machine: Machine

    @property
    def predicted_bytes(self) -> int:
        """Of all ranks."""
        return self.prediction.per_rank * self.ranks

    @property
    def memory_error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_bytes / self.measured.peak - 1

    @property
    def time_error(self) -> float:
        """Predicted over what a thread computed, less one."""
        return self.prediction.seconds / self.measured.busy - 1

    def clock(self, timeline: Timeline) -> NDArray[np.float64]:
        """Predicted seconds since the step began, of each moment."""
        rates = self.machine.rates
        clock: NDArray[np.float64] = (
            timeline.flops / rates.gemm + timeline.touched / rates.bandwidth + timeline.calls * rates.call
        )
        return clock


def profile(
    recipe: Recipe, ranks: int, *, name: str, steps: int = STEPS, machine: Machine | None = None, say: Say
) -> Profile:
    """Predict, then run.

    Raises:
        TrainError: the data cannot be used, or a rank failed.
    """
    with opened(recipe) as (run, data):
        known = machine or measure_machine(recipe, ranks, say)
        say(f"{name}: following a step")
        work = data.workload(recipe, ranks, steps=steps)
        prediction = predict(recipe, data.card, ranks, work, known)
        say(f"{name}: {steps} real steps")
        with tempfile.TemporaryDirectory(prefix="equipot-profile-") as scratch:
            measured = _measure(recipe, run.path, ranks, steps, Path(scratch))
    form = recipe.model.messages
    return Profile(
        name, form if isinstance(form, str) else "/".join(form), ranks, prediction, measured, known
    )


def _measure(recipe: Recipe, run: Path, ranks: int, steps: int, scratch: Path) -> Measured:
    job = {
        "recipe": recipe.model_dump(mode="json"),
        "run": str(run),
        "steps": steps,
        "scratch": str(scratch),
    }
    watch = Watch(scratch, ranks)
    thread = threading.Thread(target=watch.run, name="memory-watch", daemon=True)
    thread.start()
    try:
        launch("equipot.train.memory.rank", [json.dumps(job)], ranks=ranks, logs=scratch / "log")
    finally:
        watch.stop()
        thread.join()
    written = scratch / "steps.jsonl"
    lines = written.read_text().splitlines() if written.exists() else []
    if not lines or "device_bytes" not in json.loads(lines[-1]):
        raise KeyboardInterrupt  # a rank that fails is raised as such: these were asked to end
    marks = [json.loads(line) for line in lines]
    steps_done = [mark for mark in marks if "seconds" in mark]

    def median(name: str) -> float:
        return float(np.median([mark[name] for mark in steps_done[1:] or steps_done]))

    device = [mark["device_bytes"] for mark in marks if mark.get("device_bytes")]
    samples = tuple(watch.samples)
    peak = max(device) * ranks if device else watch.peak
    return Measured(
        peak=peak,
        pss=max((sample.pss for sample in samples), default=0),
        seconds=median("seconds"),
        busy=median("busy"),
        samples=samples,
    )


def paper_runs(recipe: Recipe, ranks: int, plain: bool) -> Sequence[tuple[str, Recipe, int]]:
    """The paper's three settings for the recipe's form, and for the plain one: name, recipe, ranks."""
    from equipot.train.memory.plan import apply

    forms = [recipe.model_dump(mode="json")["model"]["messages"]]
    if plain and forms[0] != "plain":
        forms.insert(0, "plain")
    runs = []
    lowest = 1 if recipe.precision == "bf16" else 0
    for form in forms:
        word = form if isinstance(form, str) else "/".join(form)
        for label, stage, again in (
            ("as it is", lowest, False),
            ("checkpointing", lowest, True),
            ("checkpointing, ZeRO 2", 2, True),
        ):
            changes = [
                ("model.messages", form),
                ("zero.stage", stage),
                ("activation_checkpointing", again),
            ]
            runs.append((f"{word}: {label}", apply(recipe, changes), ranks))
    return runs
