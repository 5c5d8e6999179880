"""The training loop: steps, validations, checkpoints, and how a run ends. Every rank runs it in step."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from equipot.train.allocator import give_memory_back
from equipot.train.assemble import assemble
from equipot.train.checkpoint import Checkpoint, CheckpointError, newest_valid
from equipot.train.console import Display
from equipot.train.engine import start_world
from equipot.train.errors import TrainError
from equipot.train.evaluate import Errors, EvaluationStopped, evaluate
from equipot.train.launch import available_cores
from equipot.train.loader import Loader, StepBatches
from equipot.train.loss import Counts, weighted
from equipot.train.metrics import Metrics, Row
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe, check_combination
from equipot.train.run_directory import RunDirectory
from equipot.train.schedule import learning_rate
from equipot.train.state import TrainerState
from equipot.train.world import World


class NonFiniteError(TrainError):
    """A loss or gradient that is not a number; training cannot go on."""


class Stop(Protocol):
    """Tells whether this process was asked to save and end."""

    requested: bool


def train(recipe: Recipe, out: Path, *, resume: bool, stop: Stop) -> None:
    """Train as one rank of the world that the environment describes, until the run is over or was stopped.

    Raises:
        TrainError: with a message for the user, on every rank alike where the cause is common.
    """
    give_memory_back()
    torch.set_num_threads(_threads())
    world = start_world()
    check_combination(recipe, world.size)
    run = RunDirectory(out)
    notes = _prepare_together(recipe, run, world, resume=resume)  # has bars of its own
    with Display(silent=not world.is_first) as display:
        for note in notes:
            display.warn(note)
        Trainer(recipe, run, world, display, stop).run()


def _threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS")
    # torchrun's name for it, then the deepspeed launcher's
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return int(wanted) if wanted else max(1, available_cores() // int(ranks_here))


def _prepare_together(recipe: Recipe, run: RunDirectory, world: World, *, resume: bool) -> list[str]:
    problem: TrainError | None = None
    notes: list[str] = []
    if world.is_first:
        try:
            notes = prepare(recipe, run, resume=resume)
        except TrainError as error:
            problem = error
        except OSError as error:
            problem = TrainError(f"{run.path} cannot be written: {error}")
    agreed = world.agree(None if problem is None else str(problem))
    if agreed is not None:
        raise problem or TrainError(agreed)
    return notes


class Trainer:
    """One rank's part of a run."""

    def __init__(self, recipe: Recipe, run: RunDirectory, world: World, display: Display, stop: Stop) -> None:
        self._recipe, self._run, self._world, self._display, self._stop = recipe, run, world, display, stop
        self.parts = assemble(recipe, run, world)
        self._total = self.parts.total_steps
        self._state = TrainerState()
        self._saved: TrainerState | None = None
        self._began = time.monotonic()
        self._metrics: Metrics | None = None  # on the first rank alone
        self._last_errors: Errors | None = None

    def run(self) -> None:
        """Train to the end, or until asked to stop."""
        self.parts.checkpoints.tidy()
        self._restore()
        self._began = time.monotonic() - self._state.seconds
        with contextlib.ExitStack() as stack:
            if self._world.is_first:
                self._metrics = stack.enter_context(Metrics(self._run, self._display, step=self._state.step))
            self._display.note(self.parts.summary)
            try:
                finished = self._loop()
            except Exception:
                self.parts.checkpoints.wait()  # what was begun before it went wrong is good
                raise
            self._settle()
            if self._state.differs_from(self._saved):
                self._save_last()
            if self._metrics is not None:
                self._draw(self._metrics)
                self._conclude(finished)

    def _loop(self) -> bool:
        """Steps and what comes between them; false if it was ended by a request to stop."""
        loader = Loader(
            self.parts.dataset,
            self.parts.sampler,
            self._world,
            accumulation=self._recipe.batch.accumulation,
            first_step=self._state.step,
            steps=self._total,
            workers=self._recipe.batch.workers,
        )
        self._display.begin(self._state.step, self._total)
        with loader:
            steps = iter(loader)
            while True:
                if self._validation_is_due():
                    try:
                        self._validate()
                    except EvaluationStopped:
                        return False
                if self._state.step >= self._total or self._is_out_of_patience:
                    return True
                if self._checkpoint_is_due() and self.parts.checkpoints.may_begin(self._state):
                    self._settle()
                    self._save()
                if not self._step(steps):
                    return False

    def _step(self, steps: Iterator[StepBatches]) -> bool:
        """One update; false if some rank was asked to stop instead."""
        start = time.monotonic()
        batches = next(steps).batches
        labels = np.sum([Counts.of(batch.targets) for batch in batches], axis=0)
        failed = self.parts.checkpoints.has_failed
        asked, unsaved, *counted = self._world.sum([float(self._stop.requested), float(failed), *labels])
        if asked:
            return False
        if unsaved:
            self._settle()
        counts = Counts(*counted)
        self.parts.engine.module.train()
        terms = torch.zeros(3, dtype=torch.float64)
        spoiled = []
        for number, batch in enumerate(batches, start=1):
            _, part = self.parts.engine.forward_backward(
                batch.systems, batch.targets, counts, self._world.size, last=number == len(batches)
            )
            terms += part.sum(1).cpu()
            spoiled.append(batch.keys[~torch.isfinite(part).all(0).cpu().numpy()])
        # One NaN on one rank makes the sum NaN on all of them, so that all of them stop.
        totals = torch.tensor(self._world.sum(terms.tolist()), dtype=torch.float64)
        if not torch.isfinite(totals).all():
            self._refuse(np.concatenate(spoiled), "the loss")
        rate = learning_rate(self._state.step, self._total, self._recipe.optimizer)
        norm = self.parts.engine.step(rate)
        if not np.isfinite(norm):
            self._refuse(np.concatenate([batch.keys for batch in batches]), "the gradient")
        position = self.parts.sampler.position(self._state.step + 1)
        self._state = self._state.after_step(position.epoch, position.offset)
        self.parts.ema.update(self._state.step)
        self._record(totals, counts, rate, norm, time.monotonic() - start)
        return True

    def _record(self, totals: torch.Tensor, counts: Counts, rate: float, norm: float, seconds: float) -> None:
        if self._metrics is None:
            return
        loss = float(weighted(totals, self._recipe.loss, counts))
        present = (counts.energy, counts.forces, counts.stress)
        means = [float(total) / n if n else None for total, n in zip(totals, present, strict=True)]
        speed = self._recipe.batch.structures / seconds
        row = Row(
            step=self._state.step,
            epoch=self._epoch,
            loss=loss,
            energy_loss=means[0],
            forces_loss=means[1],
            stress_loss=means[2],
            learning_rate=rate,
            gradient_norm=norm,
            structures_per_second=speed,
        )
        self._metrics.add(row)
        self._display.step(row.step, self._total, row.epoch, loss=loss, speed=speed)

    @property
    def _is_out_of_patience(self) -> bool:
        return self._state.is_out_of_patience(self._recipe.validation.patience)

    @property
    def _epoch(self) -> float:
        return self._state.step / self.parts.sampler.steps_per_epoch

    def _validation_is_due(self) -> bool:
        step = self._state.step
        every = self._recipe.validation.every_epochs * self.parts.sampler.steps_per_epoch
        due = step >= self._total or (step > 0 and step % every == 0)
        return due and self._state.validated_step != step

    def _checkpoint_is_due(self) -> bool:
        step, settings = self._state.step, self._recipe.checkpoint
        epochs = (settings.every_epochs or 0) * self.parts.sampler.steps_per_epoch
        due = any(every and step % every == 0 for every in (epochs, settings.every_steps or 0))
        return step > 0 and (due or self._state.is_best) and self._state.differs_from(self._saved)

    def _validate(self) -> None:
        """Errors of the averaged weights on the validation split; keeps count of the best."""
        if not len(self.parts.validation):
            self._state = self._state.after_validation(None)
            return
        with self.parts.engine.swapped(self.parts.ema.parts):
            tally = evaluate(
                self.parts.potential,
                self.parts.dataset,
                self.parts.validation,
                self.parts.validation_costs,
                self._world,
                self._recipe.loss,
                stress=self._recipe.loss.stress > 0,
                stopped=lambda: self._stop.requested,
            )
        self._last_errors = errors = tally.errors()
        self._state = self._state.after_validation(tally.loss())
        if self._metrics is None:
            return
        row = Row(
            step=self._state.step,
            epoch=self._epoch,
            validation_loss=tally.loss(),
            validation_energy_mae_mev_per_atom=errors.energy_mae,
            validation_forces_mae_ev_per_angstrom=errors.forces_mae,
            validation_stress_mae_ev_per_cubic_angstrom=errors.stress_mae,
        )
        self._metrics.add(row)
        self._display.validation(row.step, self._total, row.epoch, errors.in_words())

    def _save(self) -> None:
        self._state = replace(self._state, seconds=time.monotonic() - self._began)
        if self._metrics is not None:
            self._metrics.flush()
        self.parts.checkpoints.begin(self._state, self.parts.engine, self.parts.ema)
        self._saved = self._state

    def _settle(self) -> None:
        problem = self.parts.checkpoints.settle()
        if problem is not None:
            self._saved = None
            self._display.warn(f"{problem}. Training goes on; earlier checkpoints are untouched")

    def _save_last(self) -> None:
        self._save()
        problem = self.parts.checkpoints.settle()
        if problem is not None:
            raise CheckpointError(
                f"{problem}. Training ends without its last steps being saved; make room and continue from "
                f"the checkpoint before with: {self._resume_command}"
            )

    def _draw(self, metrics: Metrics) -> None:
        from equipot.train.plots import plot_learning_curve  # matplotlib: for one rank, at the end

        metrics.flush()
        try:
            plot_learning_curve(self._run.metrics, self._run.learning_curve)
        except OSError as error:
            self._display.warn(f"{self._run.learning_curve} could not be written: {error}")

    def _restore(self) -> None:
        found: tuple[Checkpoint | None, list[str]] = (None, [])
        if self._world.is_first:
            found = newest_valid(self._run.checkpoints)
        checkpoint, problems = self._world.from_first(found)
        for problem in problems:
            self._display.warn(f"a damaged checkpoint is passed over: {problem}")
        if checkpoint is None:
            return
        self.parts.checkpoints.restore(checkpoint, self.parts.engine, self.parts.ema)
        self._saved = self._state = checkpoint.state
        was = checkpoint.parallelism
        self._display.note(
            f"resumed from {checkpoint.path}: step {self._state.step} of {self._total}, saved by "
            f"{was.ranks} rank(s), ZeRO stage {was.zero_stage}, {was.precision}"
        )

    def _refuse(self, mine: NDArray[np.int64], what: str) -> None:
        gathered = self._world.gather(mine)
        keys = np.concatenate([np.asarray(part, dtype=np.int64).reshape(-1, 2) for part in gathered])
        raise NonFiniteError(
            f"{what} of step {self._state.step + 1} is not a finite number, from structures "
            f"{self.parts.dataset.describe(keys)}. Look at their labels and distances, or lower "
            "optimizer.learning_rate; earlier checkpoints are untouched, and this continues from the newest: "
            f"{self._resume_command}"
        )

    def _conclude(self, finished: bool) -> None:
        state, path = self._state, self._run.path
        if not finished:
            self._display.note(
                f"stopped as asked at step {state.step} of {self._total} and saved; "
                f"continue with: {self._resume_command}"
            )
            return
        early = state.validations_without_improvement if self._is_out_of_patience else 0
        why = f", ended early: no improvement in {early} validations" if early else ""
        self._display.note(f"trained {state.step} steps in {state.seconds:.0f} s{why}")
        if self._last_errors is not None:
            best = f"best at step {state.best_step}"
            self._display.note(f"validation: {self._last_errors.in_words()}; {best}")
        files = f"{self._run.learning_curve.name}, {self._run.metrics.name}, checkpoints/, tensorboard/"
        self._display.note(f"results in {path}: {files}")
        self._display.note(f"next: equipot export {path} --out {path / 'bundle'}")

    @property
    def _resume_command(self) -> str:
        ranks = f" --ranks {self._world.size}" if self._world.size > 1 else ""
        return f"equipot train RECIPE --out {self._run.path}{ranks} --resume"
