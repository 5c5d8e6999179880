"""Trains one point of a study in this process, evaluates it and writes its result."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipot.train.checkpoint import newest_valid
from equipot.train.evaluate import EvaluationStopped
from equipot.train.flops import Flops, step_flops
from equipot.train.incidents import NonFiniteError
from equipot.train.launch import Stop, launch
from equipot.train.metrics import read_rows
from equipot.train.mix import Mix
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.scaling.evaluation import evaluate_point
from equipot.train.scaling.exposure import Exposure, exposure
from equipot.train.scaling.folder import PointFolder, read_json, write_json
from equipot.train.scaling.planning import parameters_of
from equipot.train.scaling.point import Point
from equipot.train.scaling.probe import similarity
from equipot.train.scaling.results import curve, finite, seen_at, write_curve
from equipot.train.worker import Job, work

_WATCH_SECONDS = 0.5


def train_point(
    point: Point,
    recipe: Recipe,
    folder: PointFolder,
    *,
    unseen: Mapping[str, Path],
    keep: bool,
    stop: Stop,
) -> bool:
    """Train a point from where it stands, and write its result; false if it was stopped before its end.

    Args:
        point: its settings.
        recipe: of its run.
        folder: of the point, which this process has a claim on.
        unseen: stores to evaluate it on besides.
        keep: its checkpoints, which are removed otherwise.
        stop: whether to save and end.

    Raises:
        TrainError: it cannot be trained; the message says why.
    """
    write_json(folder.settings, point.to_json())
    run = RunDirectory(folder.run)
    _reset_peak_memory()
    try:
        with _told_to(folder.log):
            _train(point, recipe, run, stop)
    except NonFiniteError as error:
        _write(point, recipe, folder, {}, stopped="diverged", reason=str(error))
        return True
    last, _ = newest_valid(run.checkpoints)
    if last is None or last.state.step < point.steps:
        return False
    began = time.monotonic()
    try:
        found = evaluate_point(folder.run, unseen=unseen, stopped=lambda: stop.requested)
    except EvaluationStopped:
        return False
    found.write_parity(folder.parity)
    values = found.to_json() | {
        "similarity": similarity(folder.run),
        "seconds": last.state.seconds,
        "evaluation_seconds": time.monotonic() - began,
    }
    _write(point, recipe, folder, values, stopped="finished")
    if not keep:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    shutil.rmtree(run.tensorboard, ignore_errors=True)  # the same numbers are in metrics.csv
    run.learning_curve.unlink(missing_ok=True)
    return True


def why(error: Exception) -> dict[str, Any]:
    """What ``failure.json`` says of an error."""
    mine = isinstance(getattr(error, "exit_code", None), int)
    reason = str(error) if mine else f"{type(error).__name__}: {error}"
    return {"reason": reason, "traceback": None if mine else traceback.format_exc(), "time": time.time()}


def _train(point: Point, recipe: Recipe, run: RunDirectory, stop: Stop) -> None:
    job = Job(recipe=recipe, out=run.path, resume=run.has_checkpoints)
    last, _ = newest_valid(run.checkpoints)
    if last is not None and last.state.step >= point.steps:
        return  # it was stopped while it was evaluated
    if point.ranks == 1:
        work(job, stop)
        return
    with _passed_on(stop):
        launch("equipot.train.worker", [job.to_json()], ranks=point.ranks, logs=run.logs)


@contextmanager
def _passed_on(stop: Stop) -> Iterator[None]:
    """Meanwhile, a request to stop that came by no signal is sent to this process as one."""
    end = threading.Event()

    def watch() -> None:
        while not end.wait(_WATCH_SECONDS):
            if stop.requested:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def _told_to(path: Path) -> Iterator[None]:
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


def _write(
    point: Point,
    recipe: Recipe,
    folder: PointFolder,
    values: Mapping[str, Any],
    *,
    stopped: str,
    reason: str = "",
) -> None:
    run = RunDirectory(folder.run)
    card = RunCard.read(run.card)
    rows = read_rows(run.metrics)
    steps = max((row.step for row in rows), default=0)
    seen: Exposure = exposure(recipe, Mix.open(recipe.data.mix or run.mix), steps)
    flops: Flops = step_flops(recipe, card.config)
    points = curve(rows, seen, flops)
    write_curve(folder.curve, points)
    parameters, beside_embedding = parameters_of(card.config, card.references)
    last = points[-1] if points else {}
    write_json(
        folder.result,
        {
            "point": (read_json(folder.settings) or point.to_json()),
            "parameters": parameters,
            "parameters_without_embedding": beside_embedding,
            **seen_at(steps, seen, flops),
            "steps": steps,
            "epochs": steps / seen.steps_per_epoch,
            "stopped": stopped,
            "reason": reason,
            "train_loss": last.get("train_loss"),
            "validation_loss": last.get("validation_loss"),
            "seconds": None,
            "test": None,
            "unseen": {},
            "baselines": {},
            "similarity": None,
            **values,
            "peak_memory_bytes": _peak_memory(),
            "host_load": finite(os.getloadavg()[0]),
        },
    )


def _reset_peak_memory() -> None:
    # a worker trains many points; Linux lets a process begin its high-water mark anew
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
