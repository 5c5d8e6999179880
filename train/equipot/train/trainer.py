"""The training loop: steps, validations, checkpoints, and how a run ends. Every rank runs it in step."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from equipot.train.allocator import give_memory_back
from equipot.train.assemble import assemble
from equipot.train.boards import Board, TensorBoard
from equipot.train.checkpoint import Checkpoint, CheckpointError, newest_valid
from equipot.train.console import Display
from equipot.train.culprits import Share, find_culprits
from equipot.train.engine import start_world
from equipot.train.errors import TrainError
from equipot.train.evaluate import Errors, EvaluationStopped, Tally, evaluate
from equipot.train.heartbeat import Heartbeat, PeerLost
from equipot.train.incidents import (
    Incidents,
    NonFiniteError,
    Trouble,
    is_bound_reached,
    named,
    trouble_with_gradient,
    trouble_with_loss,
)
from equipot.train.launch import Stop, available_cores
from equipot.train.loader import Loader, StepBatches
from equipot.train.loss import Counts, weighted
from equipot.train.metrics import Metrics, Row, SourceRow
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe, check_combination
from equipot.train.run_directory import RunDirectory
from equipot.train.schedule import learning_rate
from equipot.train.state import TrainerState
from equipot.train.throughput import Speed, Throughput
from equipot.train.world import World


def train(recipe: Recipe, out: Path, *, resume: bool, stop: Stop, peer_timeout: float) -> None:
    """Train as one rank of the world that the environment describes, until the run is over or was stopped.

    Raises:
        TrainError: with a message for the user, on every rank alike where the cause is common.
    """
    give_memory_back()
    torch.set_num_threads(_threads())
    world = start_world()
    check_combination(recipe, world.size)
    with Heartbeat(world, peer_timeout) as heartbeat:
        try:
            _train(recipe, RunDirectory(out), world, resume=resume, stop=stop)
        except RuntimeError as error:
            # When a peer is gone, what fails is some collective operation, with words of its own.
            lost = None if isinstance(error, TrainError) else heartbeat.reason()
            if lost is None:
                raise
            raise PeerLost(lost) from error


def _train(recipe: Recipe, run: RunDirectory, world: World, *, resume: bool, stop: Stop) -> None:
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
        self._metrics: Metrics | None = None  # this and the next on the first rank alone
        self._incidents: Incidents | None = None
        self._throughput = Throughput(self.parts.potential.config, recipe, world)
        self._last_errors: Errors | None = None

    def run(self) -> None:
        """Train to the end, or until asked to stop."""
        self.parts.checkpoints.tidy()
        self._restore()
        self._began = time.monotonic() - self._state.seconds
        with contextlib.ExitStack() as stack:
            if self._world.is_first:
                step, boards = self._state.step, self._open_boards()
                self._metrics = stack.enter_context(
                    Metrics(self._run, self._display, step=step, boards=boards)
                )
                self._incidents = Incidents(self._run.incidents, self._display, step=step)
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
        mine = [float(self._stop.requested), float(failed), *labels, *self._throughput.counts(batches)]
        asked, unsaved, *sums = self._world.sum(mine)
        if asked:
            return False
        if unsaved:
            self._settle()
        counts = Counts(*sums[: len(labels)])
        self.parts.engine.module.train()
        terms = torch.zeros(3, dtype=torch.float64)
        shares = []
        for number, batch in enumerate(batches, start=1):
            _, part = self.parts.engine.forward_backward(
                batch.systems, batch.targets, counts, self._world.size, last=number == len(batches)
            )
            terms += part.sum(1).cpu()
            shares.append(Share(batch.keys, weighted(part, self._recipe.loss, counts)))
        # One NaN on one rank makes the sum NaN on all of them, so that all of them do the same.
        totals = torch.tensor(self._world.sum(terms.tolist()), dtype=torch.float64)
        loss = float(weighted(totals, self._recipe.loss, counts))
        rate, norm = self._update(loss, shares)
        seconds = time.monotonic() - start
        speed = self._throughput.speed(sums[len(labels) :], seconds)
        self._record(totals, loss, counts, rate, norm, speed)
        return True

    def _update(self, loss: float, shares: list[Share]) -> tuple[float | None, float | None]:
        """Update the weights, or do what the recipe says if the step went wrong; learning rate and norm."""
        settings = self._recipe.watch
        trouble = trouble_with_loss(loss, self._state, settings)
        rate = learning_rate(self._state.step, self._total, self._recipe.optimizer)
        norm = None
        if trouble is None or trouble.decision == "report":
            norm = self.parts.engine.step(rate)
            if not np.isfinite(norm):
                trouble = trouble_with_gradient(loss, self._state, settings)
        else:
            self.parts.engine.discard()
        changed = norm is not None and bool(np.isfinite(norm))
        if trouble is not None:
            self._face(trouble, shares)
        position = self.parts.sampler.position(self._state.step + 1)
        self._state = self._state.after_step(position.epoch, position.offset)
        if not changed:
            return None, None
        self._state = self._state.with_loss(loss, settings.window)
        self.parts.ema.update(self._state.step)
        return rate, norm

    def _face(self, trouble: Trouble, shares: list[Share]) -> None:
        """Do with a step that went wrong as the recipe says; count it, write it down, tell it."""
        culprits = find_culprits(trouble, shares, self.parts.dataset, self._world)
        decision, outcome, bound = trouble.decision, "reported", ""
        if decision in ("skip", "rollback") and is_bound_reached(self._state, self._recipe.watch):
            decision, bound = "stop", f"watch.most = {self._recipe.watch.most} steps went wrong before; "
            trouble = replace(trouble, decision="stop")
        step, epoch = self._state.step + 1, self._epoch
        if decision == "stop":
            outcome = "the run was stopped"
        elif decision == "skip":
            self._state, outcome = replace(self._state, skipped=self._state.skipped + 1), "skipped"
        elif decision == "rollback":
            outcome = self._roll_back()
        if self._incidents is not None:
            self._incidents.add(step, epoch, trouble, culprits, outcome)
        if decision == "stop":
            raise NonFiniteError(
                f"{trouble.in_words().replace(trouble.what, f'{trouble.what} of step {step}', 1)}, from "
                f"structures {named(culprits)}. {bound}Look at their labels and distances, or lower "
                "optimizer.learning_rate; earlier checkpoints are untouched, and this continues from the "
                f"newest: {self._resume_command}"
            )

    def _roll_back(self) -> str:
        """Take up the newest checkpoint's weights, moments and average; what was done, in words."""
        self._settle()
        checkpoint, _ = self._newest_checkpoint()
        if checkpoint is None:
            self._state = replace(self._state, skipped=self._state.skipped + 1)
            return "skipped, as there is no checkpoint to roll back to"
        self.parts.checkpoints.restore(checkpoint, self.parts.engine, self.parts.ema)
        count = self._state.rolled_back + 1
        self._state = replace(self._state, rolled_back=count, losses=checkpoint.state.losses)
        return f"rolled back to {checkpoint.name}, to go on behind this batch"

    def _record(
        self,
        totals: torch.Tensor,
        loss: float,
        counts: Counts,
        rate: float | None,
        norm: float | None,
        speed: Speed,
    ) -> None:
        if self._metrics is None:
            return
        present = (counts.energy, counts.forces, counts.stress)
        means = [_finite(float(total) / n) if n else None for total, n in zip(totals, present, strict=True)]
        row = Row(
            step=self._state.step,
            epoch=self._epoch,
            loss=_finite(loss),
            energy_loss=means[0],
            forces_loss=means[1],
            stress_loss=means[2],
            learning_rate=rate,
            gradient_norm=norm,
            structures_per_second=speed.structures,
            atoms_per_second=speed.atoms,
            edges_per_second=speed.edges,
            model_flops_utilisation=speed.utilisation,
            peak_memory_gib=speed.peak_memory,
        )
        self._metrics.add(row)
        self._display.step(row.step, self._total, row.epoch, loss=loss, speed=speed.structures)

    @property
    def _is_out_of_patience(self) -> bool:
        return self._state.is_out_of_patience(self._recipe.validation.patience)

    @property
    def _epoch(self) -> float:
        return self._state.step / self.parts.sampler.steps_per_epoch

    def _validation_is_due(self) -> bool:
        step, settings = self._state.step, self._recipe.validation
        due = step >= self._total or self._falls_on(settings.every_epochs, settings.every_steps)
        return due and self._state.validated_step != step

    def _checkpoint_is_due(self) -> bool:
        settings = self._recipe.checkpoint
        due = self._falls_on(settings.every_epochs, settings.every_steps) or self._state.is_best
        return self._state.step > 0 and due and self._state.differs_from(self._saved)

    def _falls_on(self, epochs: int | None, steps: int | None) -> bool:
        intervals = ((epochs or 0) * self.parts.sampler.steps_per_epoch, steps or 0)
        return self._state.step > 0 and any(every and self._state.step % every == 0 for every in intervals)

    def _validate(self) -> None:
        """Errors of the averaged weights on the validation split; keeps count of the best."""
        if not self.parts.validation:
            self._state = self._state.after_validation(None)
            return
        tally = Tally(len(self.parts.potential.config.levels_of_theory), self._recipe.loss)
        by_source: list[Errors] = []
        with self.parts.ema.swapped_in():
            for source in self.parts.validation:
                found = evaluate(
                    self.parts.potential,
                    self.parts.dataset,
                    source.places,
                    source.costs,
                    self._world,
                    self._recipe.loss,
                    stress=self._recipe.loss.stress > 0,
                    stopped=lambda: self._stop.requested,
                )
                by_source.append(found.errors())
                tally.include(found)
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
        self._metrics.add_sources(
            [
                SourceRow(
                    step=row.step,
                    epoch=row.epoch,
                    source=source.name,
                    level_of_theory=source.level_of_theory,
                    **found.to_json(),  # type: ignore[arg-type]
                )
                for source, found in zip(self.parts.validation, by_source, strict=True)
            ]
        )
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

    def _newest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        found: tuple[Checkpoint | None, list[str]] = (None, [])
        if self._world.is_first:
            found = newest_valid(self._run.checkpoints)
        return self._world.from_first(found)

    def _open_boards(self) -> list[Board]:
        boards: list[Board] = [TensorBoard(self._run.tensorboard, step=self._state.step)]
        mode = self._recipe.watch.wandb
        if mode != "off":
            from equipot.train.wandb_board import WandbBoard  # an extra

            try:
                boards.append(WandbBoard(self._recipe, self._run, mode))
            except OSError as error:
                self._display.warn(f"the run goes on without Weights & Biases: {error}")
        return boards

    def _restore(self) -> None:
        checkpoint, problems = self._newest_checkpoint()
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


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
