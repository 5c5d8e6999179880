"""Slurm's variables become those of a rank: as a pure function, and with real ranks that have no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipot.train.checkpoint import committed_paths, read_checkpoint
from equipot.train.errors import TrainError
from equipot.train.launch import free_port
from equipot.train.slurm import expand_counts, expand_hosts, slurm_environment


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login1", ["login1"]),
        ("a,b-2,c.example.org", ["a", "b-2", "c.example.org"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[008-011,7],login1", ["gpu008", "gpu009", "gpu010", "gpu011", "gpu7", "login1"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("n[1-2]-ib,10.0.0.[9-10]", ["n1-ib", "n2-ib", "10.0.0.9", "10.0.0.10"]),
    ],
)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a[1-2", "a1-2]", "a[2-1]", "a[x]", "a[[1]]", "a,"])
def test_what_is_no_list_of_hosts(text: str) -> None:
    with pytest.raises(ValueError, match="is no"):
        expand_hosts(text)


def test_tasks_of_nodes() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="no list of tasks"):
        expand_counts("2(3)")


STEP = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    # what the job has besides: more nodes, of which the step uses some
    "SLURM_JOB_NODELIST": "gpu[01-09]",
    "SLURM_NTASKS": "18",
}


def test_a_task_of_srun_is_a_rank() -> None:
    found = slurm_environment(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }
    assert 20_000 <= port < 30_000
    others = [slurm_environment(STEP | {"SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(5)]
    assert set(others) == {str(port)}
    assert slurm_environment(STEP | {"SLURM_JOB_ID": "4243"})["MASTER_PORT"] != str(port)
    given = slurm_environment(STEP | {"MASTER_ADDR": "ib7", "MASTER_PORT": "5"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("ib7", "5")


def test_what_is_no_rank_of_slurm() -> None:
    batch_script = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")}
    assert slurm_environment({}) == {}
    assert slurm_environment(batch_script) == {}
    assert slurm_environment(STEP | {"SLURM_STEP_ID": "4294967290"}) == {}  # the shell of `salloc`
    assert slurm_environment(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm_environment(STEP | {"RANK": "0"}) == {}  # torchrun, started by srun on each node
    with pytest.raises(TrainError, match="Slurm's variables are incomplete"):
        slurm_environment({name: value for name, value in STEP.items() if name != "SLURM_LOCALID"})
    with pytest.raises(TrainError, match=r"incomplete: \[2-1\] is no range of hosts"):
        slurm_environment(STEP | {"SLURM_STEP_NODELIST": "a[2-1]"})


@pytest.mark.slow
def test_ranks_that_know_slurm_alone(recipe_file: Path, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    step = STEP | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.[1]",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "equipot.cli", "train", str(recipe_file), "--out", str(tmp_path / "run")]
    tasks = [
        subprocess.Popen(
            command,
            env=clean | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 rank(s) on cpu" in said[0]
    assert read_checkpoint(committed_paths(tmp_path / "run" / "checkpoints")[0]).parallelism.ranks == 2
