"""A run goes on at another number of ranks and another ZeRO stage as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from equipot.train.checkpoint import newest_valid, read_weights
from equipot.train.launch import free_port, rank_environment
from equipot.train.metrics import read_rows
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe
from equipot.train.run_directory import RunDirectory

STEPS = 8
BEFORE = 4
PACE = (
    f"optimizer.steps={STEPS}",
    "optimizer.learning_rate=0.01",
    "ema.decay=0.9",
    f"checkpoint.every_steps={BEFORE}",
    "checkpoint.keep=99",
)
KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")
WORDS = {
    "0": ["zero.stage=0"],
    "1": ["zero.stage=1"],
    "2": ["zero.stage=2"],
    "3": ["zero.stage=3"],
    "2-cpu": ["zero.stage=2", "zero.offload_optimizer=cpu"],
    "3-cpu": ["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_parameters=cpu"],
    "1-bf16": ["zero.stage=1", "precision=bf16"],
    "3-bf16": ["zero.stage=3", "precision=bf16"],
}


class Division(NamedTuple):
    ranks: int
    word: str

    def __str__(self) -> str:
        return f"{self.ranks}x{self.word}"


class Change(NamedTuple):
    before: Division
    after: Division

    def __str__(self) -> str:
        return f"{self.before}-to-{self.after}"


def change(before: int, word: str, after: int, other: str) -> Change:
    return Change(Division(before, word), Division(after, other))


QUICK = [
    change(1, "0", 2, "2"),
    change(1, "1", 3, "3"),
    change(2, "3-cpu", 1, "0"),
    change(2, "3-cpu", 2, "1"),
    change(2, "1-bf16", 2, "3-bf16"),
    change(2, "1-bf16", 2, "1-bf16"),
    change(2, "3-cpu", 2, "3-cpu"),
]


@pytest.fixture(scope="module")
def follow(
    recipe_file: Path, recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[Change]], Path]:
    """Trains what is to be changed, whole, and continues copies; gives where all these runs are."""

    program = str(Path(__file__).with_name("division_program.py"))

    def launch(ranks: int, prepared: Path, jobs: list[tuple[str | None, str, list[str]]]) -> None:
        if ranks == 1:  # here: importing torch is what takes time
            with pytest.MonkeyPatch.context() as patch:
                for name, value in rank_environment(0, 1, free_port()).items():
                    patch.setenv(name, value)
                runpy.run_path(program)["main"](str(recipe_file), prepared, BEFORE, jobs)
            return
        command = [sys.executable, program, str(recipe_file), str(prepared), str(BEFORE), json.dumps(jobs)]
        port = free_port()
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **rank_environment(rank, ranks, port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        said = [process.communicate(timeout=120 + 20 * len(jobs))[0] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(said)[-8000:]

    def run(changes: list[Change]) -> Path:
        home = tmp_path_factory.mktemp("divisions")
        prepare(recipe(*PACE), RunDirectory(home / "prepared"), resume=False)
        begun = sorted({change.before for change in changes})
        for ranks in (1, 2, 3):
            # what is continued at more ranks than it was begun at follows in the same launch
            jobs: list[tuple[str | None, str, list[str]]] = [
                (None, str(division), [*PACE, *WORDS[division.word]])
                for division in begun
                if division.ranks == ranks
            ]
            jobs += [
                (str(change.before), str(change), [*PACE, *WORDS[change.after.word]])
                for change in changes
                if change.after.ranks == ranks >= change.before.ranks
            ]
            if jobs:
                launch(ranks, home / "prepared", jobs)
        for ranks in (1, 2):
            jobs = [
                (str(change.before), str(change), [*PACE, *WORDS[change.after.word]])
                for change in changes
                if change.after.ranks == ranks < change.before.ranks
            ]
            if jobs:
                launch(ranks, home / "prepared", jobs)
        return home

    return run


def problems_of(change: Change, home: Path) -> Iterator[str]:
    """What is not as it should be after a change of division."""
    whole, run = home / str(change.before), home / str(change)
    found, damaged = newest_valid(run / "again")
    assert found is not None, damaged
    if (found.state.step, found.updates) != (BEFORE, BEFORE):
        yield f"{found.state.step} steps, {found.updates} updates"
    yield from differences(whole / "checkpoints" / found.name, found.path)
    expected, mine = list(numbers(whole)), list(numbers(run))
    if change.before == change.after:
        if mine != expected:
            yield "another curve"
        yield from differences(*(path / f"checkpoints/step-{STEPS:08d}" for path in (whole, run)))
    if "bf16" in f"{change}":  # rounding is in all of it, and in the norm of a small gradient most
        expected, mine, bound = list(numbers(whole, "loss")), list(numbers(run, "loss")), 0.05
    else:
        bound = 1e-3
    if [step for step, _ in mine] != [step for step, _ in expected]:
        yield "other steps"
    for (step, value), (_, correct) in zip(mine, expected, strict=False):
        if value != pytest.approx(correct, rel=bound):
            yield f"step {step}: {value} instead of {correct}"


def differences(one: Path, other: Path) -> Iterator[str]:
    """Tensors of two checkpoints that are not the same bit for bit."""
    for kind in KINDS:
        expected = dict(read_weights(one, kind))
        if not any(tensor.any() for tensor in expected.values()):
            yield f"{kind} is nothing"
        for key, tensor in read_weights(other, kind):
            if not torch.equal(tensor, expected[key]):
                yield f"{kind} {key} of {other.name}"


def numbers(run: Path, *names: str) -> Iterator[tuple[int, float]]:
    """A run's curves of those names, or all that do not depend on the clock."""
    for row in read_rows(run / "metrics.csv"):
        for name in names or ("loss", "gradient_norm", "validation_loss", "learning_rate"):
            value = getattr(row, name)
            if value is not None:
                yield row.step, value


def check(changes: list[Change], home: Path) -> None:
    wrong = {str(change): list(problems_of(change, home)) for change in changes}
    assert not any(wrong.values()), "\n".join(f"{name}: {what}" for name, what in wrong.items() if what)


@pytest.mark.timeout(900)  # a dozen processes that import torch
def test_a_run_goes_on_however_it_is_divided(follow: Callable[[list[Change]], Path]) -> None:
    check(QUICK, follow(QUICK))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_goes_on_from_every_division_to_every_other(follow: Callable[[list[Change]], Path]) -> None:
    ranks = itertools.cycle([(1, 2), (2, 3), (3, 1), (2, 2), (3, 2), (1, 3), (2, 1)])
    words = itertools.product(WORDS, WORDS)
    changes = [change(n, word, m, other) for (word, other), (n, m) in zip(words, ranks, strict=False)]
    check(changes, follow(changes))
