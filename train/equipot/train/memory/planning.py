"""Makes a plan: the recipe's data, the machine's measures, a prediction of each setting."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from equipot.train.launch import available_cores
from equipot.train.memory.machine import (
    Baseline,
    free_memory,
    has_compiled_kernels,
    measure_baseline,
    measure_rates,
)
from equipot.train.memory.plan import Candidate, candidates, propose
from equipot.train.memory.predict import Machine, Prediction, predict
from equipot.train.memory.workload import Data
from equipot.train.prepare import open_mix, prepare
from equipot.train.recipe import Recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What was asked, and what was found."""

    ranks: int
    memory: int
    sharing: int
    """ranks that share that memory: all on CPUs, one on a GPU"""
    machine: Machine
    candidates: list[Candidate]


@contextmanager
def opened(recipe: Recipe) -> Iterator[tuple[RunDirectory, Data]]:
    """The run that the recipe would begin, in a directory for the moment, and its data."""
    with tempfile.TemporaryDirectory(prefix="equipot-memory-") as scratch:
        run = RunDirectory(Path(scratch) / "run")
        prepare(recipe, run, resume=False)
        yield run, Data(recipe, RunCard.read(run.card), open_mix(recipe, run))


def measure_machine(recipe: Recipe, ranks: int, say: Say, *, baseline: Baseline | None = None) -> Machine:
    """Seconds: unless its baseline is known, a process is started that imports what training imports."""
    if baseline is None:
        say("starting an empty rank")
        baseline = measure_baseline()
    say("multiplying matrices")
    threads, wanted = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(wanted) if wanted else max(1, available_cores() // ranks))
    try:
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        rates = measure_rates(recipe.model.width, dtype)
    finally:
        torch.set_num_threads(threads)
    return Machine(baseline, rates, has_compiled_kernels())


def make_plan(recipe: Recipe, ranks: int, memory: int | None, on_progress: Say) -> Plan:
    """Predict the recipe and its neighbours.

    Raises:
        TrainError: the data cannot be used, or the machine cannot be measured.
    """
    wanted = free_memory() if memory is None else memory
    on_gpu = torch.cuda.is_available()
    sharing = 1 if on_gpu else ranks
    with opened(recipe) as (_, data):
        machine = measure_machine(recipe, ranks, on_progress)

        def of(candidate: Recipe) -> Prediction:
            on_progress(f"following a step: {_name(candidate)}")
            return predict(
                candidate, data.card_for(candidate), ranks, data.workload(candidate, ranks), machine
            )

        found = candidates(recipe, ranks, wanted, of, sharing=sharing, offload=on_gpu)
    return Plan(ranks, wanted, sharing, machine, found)


def proposal(plan: Plan) -> Candidate:
    """The cheapest that fits.

    Raises:
        PlanError: nothing fits.
    """
    return propose(plan.candidates, plan.memory)


def _name(recipe: Recipe) -> str:
    again = ", checkpointing" if recipe.activation_checkpointing else ""
    return f"stage {recipe.zero.stage}, {recipe.model.messages}{again}"
