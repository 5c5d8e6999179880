"""Every way to divide and offload a run trains as one rank with nothing divided does, or is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe, RecipeError, check_combination
from equipot.train.run_directory import RunDirectory
from equipot.train.scratch import nvme_problem

Job = tuple[str, ...]
"""Changes to the recipe."""
Results = Mapping[str, torch.Tensor]

AXES: dict[str, list[str]] = {
    "zero.stage": ["0", "1", "2", "3"],
    "zero.offload_optimizer": ["none", "cpu", "nvme"],
    "zero.offload_parameters": ["none", "cpu"],
    "precision": ["fp32", "bf16"],
    "batch.accumulation": ["1", "2"],
    "activation_checkpointing": ["false", "true"],
    "model.forces": ["conservative", "direct"],
    "model.messages": ["plain", "split", "lean", "balanced", "fast"],
}
# All combinations take long. These have every value of every axis, and the pairs that meet in DeepSpeed.
QUICK: list[Job] = [
    ("zero.stage=0", "activation_checkpointing=true", "model.messages=fast"),
    ("zero.stage=0", "batch.accumulation=2"),
    ("zero.stage=1", "zero.offload_optimizer=cpu", "model.messages=plain", "batch.accumulation=2"),
    ("zero.stage=2", "zero.offload_optimizer=cpu", "model.messages=lean", "activation_checkpointing=true"),
    ("zero.stage=2", "precision=bf16", "model.messages=fast", "batch.accumulation=2"),
    ("zero.stage=3", "model.messages=plain", "loss.stress=100"),
    ("zero.stage=3", "model.messages=fast", "batch.accumulation=2", "activation_checkpointing=true"),
    ("zero.stage=3", "zero.offload_optimizer=cpu", "model.messages=lean"),
    ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_parameters=cpu", "precision=bf16"),
    ("zero.stage=3", "zero.offload_parameters=cpu", "model.forces=direct", "model.messages=fast"),
    ("zero.stage=3", "model.forces=direct", "activation_checkpointing=true", "model.messages=lean"),
    ("zero.stage=3", "model.forces=direct", "batch.accumulation=2", "model.messages=lean"),
    ("zero.stage=2", "model.forces=direct", "model.messages=lean"),
]


def possible(recipe: Callable[..., Recipe]) -> Iterator[Job]:
    """Every combination that two ranks are not refused, but for NVMe, which needs a wide model."""
    for values in itertools.product(*AXES.values()):
        job = tuple(f"{key}={value}" for key, value in zip(AXES, values, strict=True))
        try:
            check_combination(recipe(*job), 2)
        except RecipeError:
            continue
        yield job


@pytest.fixture(scope="module")
def prepared(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run's card and splits, which all combinations share."""
    run = RunDirectory(tmp_path_factory.mktemp("matrix") / "run")
    prepare(recipe(), run, resume=False)
    return run


@pytest.fixture(scope="module")
def follow(
    recipe_file: Path, prepared: RunDirectory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[Job], int], dict[Job, Results]]:
    """Takes the steps of every job on so many ranks, in one launch."""

    def run(jobs: list[Job], ranks: int) -> dict[Job, Results]:
        home = tmp_path_factory.mktemp(f"ranks-{ranks}")
        files = {job: home / f"{number}.pt" for number, job in enumerate(jobs)}
        plan = home / "jobs.json"
        plan.write_text(json.dumps({str(path): job for job, path in files.items()}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        program = [str(Path(__file__).with_name("matrix_program.py")), str(recipe_file), str(prepared.path)]
        command = [*torchrun, "--standalone", *program, str(plan)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600 + 30 * len(jobs))
        assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
        return {job: torch.load(path) for job, path in files.items()}

    return run


def undivided(job: Job) -> Job:
    """The same physics on one rank: nothing divided, offloaded, rounded, recomputed or reordered."""
    kept = ("model.forces", "model.width", "model.layers", "loss")
    physics = tuple(change for change in job if change.startswith(kept))
    return ("zero.stage=0", "model.messages=plain", *physics)


def compare(found: Results, expected: Results, *, rounded: bool) -> None:
    """Losses and gradient norms of each step, then weights."""
    assert found.keys() == expected.keys()
    # Norms beside weights: AdamW's steps hardly show a gradient that is too long.
    for name, tolerance in {"losses": 0.05, "norms": 0.15}.items():
        rtol = tolerance if rounded else 2e-4
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=0)
    if rounded:
        assert (found["losses"] / expected["losses"] - 1).abs().max() > 1e-6, "is fp32 by another name"
        return
    for name in expected.keys() - {"losses", "norms"}:
        # AdamW turns a gradient of nothing but rounding into a step of the full learning rate, so a few
        # weights may differ by more than rounding; none by more than a fraction of what was learnt.
        difference = (found[name] - expected[name]).abs()
        assert difference.mean() < 2e-6, name
        assert difference.max() < 5e-4, name


def compare_all(jobs: list[Job], follow: Callable[[list[Job], int], dict[Job, Results]]) -> None:
    found = follow(jobs, 2)
    expected = follow(sorted({undivided(job) for job in jobs}), 1)
    wrong = []
    for job in jobs:
        try:
            compare(found[job], expected[undivided(job)], rounded="precision=bf16" in job)
        except AssertionError as error:
            wrong.append(f"{' '.join(job)}: {error}")
    assert not wrong, "\n".join(wrong)


def test_combinations_of_every_kind_train_alike(
    follow: Callable[[list[Job], int], dict[Job, Results]],
) -> None:
    compare_all(QUICK, follow)


WIDE = ("model.width=1024", "model.layers=1")
UNEVEN = ("model.width=1111", "model.layers=1")  # no part of a weight is a whole number of disk blocks
FILES = ("zero.stage=3", "zero.offload_optimizer=nvme")
NVME: list[Job] = [
    (*FILES, *WIDE),
    (*FILES, *WIDE, "model.forces=direct", "batch.accumulation=2"),
    (*FILES, *WIDE, "precision=bf16"),
    (*FILES, *WIDE, "zero.offload_parameters=cpu"),
    (*FILES, *UNEVEN),
    (*FILES, *UNEVEN, "batch.accumulation=2", "zero.offload_parameters=cpu"),
    (*FILES, *UNEVEN, "model.forces=direct", "precision=bf16"),
]


@pytest.fixture(scope="module")
def nvme(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recipe's word for a directory to offload to."""
    problem = nvme_problem()
    if problem is not None:
        pytest.skip(f"offloading to NVMe is {problem[0]}")
    return f"zero.nvme_path={tmp_path_factory.mktemp('nvme')}"


@pytest.mark.slow
@pytest.mark.timeout(3600)  # DeepSpeed builds two extensions first
def test_offloading_to_files_trains_alike(
    recipe: Callable[..., Recipe], follow: Callable[[list[Job], int], dict[Job, Results]], nvme: str
) -> None:
    jobs = [(*job, nvme) for job in NVME]
    for job in jobs:
        check_combination(recipe(*job), 2)
    compare_all(jobs, follow)
    assert list(Path(nvme.partition("=")[2]).iterdir()) == []  # what was offloaded went with its ranks


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("capfd")  # DeepSpeed's build wants a real stderr
def test_a_run_offloaded_to_files_resumes_with_its_moments(
    train: Callable[..., Path], weights: Callable[..., dict[str, torch.Tensor]], tmp_path: Path, nvme: str
) -> None:
    changes = (*NVME[0], nvme, "checkpoint.every_steps=2", "checkpoint.keep=9", "optimizer.steps=4")
    run = train(tmp_path / "run", *changes)
    kinds = ("weights", "ema", "exp_avg", "exp_avg_sq")
    undisturbed = {kind: weights(run, kind) for kind in kinds}
    assert any(tensor.any() for tensor in undisturbed["exp_avg_sq"].values())
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    train(run, *changes, resume=True)
    for kind, tensors in undisturbed.items():
        found = weights(run, kind)
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=f"{kind} {name}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_combination_trains_alike(
    recipe: Callable[..., Recipe], follow: Callable[[list[Job], int], dict[Job, Results]]
) -> None:
    jobs = list(possible(recipe))
    assert len(jobs) > 500
    compare_all(jobs, follow)
