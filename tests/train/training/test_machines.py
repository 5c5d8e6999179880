"""Two machines, made of network namespaces: each launcher trains over them, and a lost one is survived."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from equipot.train.checkpoint import committed_paths, read_checkpoint
from equipot.train.metrics import read_rows

from .hosts import Host, made_hosts, wait_until, why_not

MISSING = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

PORT = "29412"
STEPS = 12


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with made_hosts(2, tmp_path) as made:
        yield made


def job(recipe: Path, run: Path, *changes: str) -> list[str]:
    words = ["train", str(recipe), "--out", str(run), "--resume", "--peer-timeout", "10"]
    return words + [word for change in (f"optimizer.steps={STEPS}", *changes) for word in ("--set", change)]


def torchrun(host: Host, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"),
        *("--local-addr", host.address, *options, "-m", "equipot.cli"),
    ]


def saved(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in committed_paths(run / "checkpoints")), default=-1)


def texts(logs: list[Path]) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text()}" for log in logs)


def finish(processes: list[subprocess.Popen[str]], logs: list[Path], seconds: float = 400) -> str:
    for process in processes:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs:\n{texts(logs)}")
    assert [process.returncode for process in processes] == [0] * len(processes), texts(logs)
    return texts(logs)


def by_torchrun(hosts: list[Host], k: int) -> tuple[list[str], dict[str, str]]:
    options = ["--nnodes", "2", "--node-rank", str(k), "--master-addr", hosts[0].address]
    return torchrun(hosts[k], *options, "--master-port", PORT), {}


def by_deepspeed(hosts: list[Host], k: int) -> tuple[list[str], dict[str, str]]:
    hostfile = Path("/tmp") / f"hostfile-{hosts[0].namespace}"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    program = Path(sys.executable).with_name("deepspeed")
    program = program if program.exists() else Path(sys.prefix, "bin", "deepspeed")
    options = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(k), "--master_port", PORT]
    options += ["--master_addr", hosts[0].address, "--module", "equipot.cli"]
    starter = "from deepspeed.launcher.runner import main; main()"
    return [sys.executable, "-c", starter, *options], {"DS_ACCELERATOR": "cpu"}


def by_srun(hosts: list[Host], k: int) -> tuple[list[str], dict[str, str]]:
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "10.77.0.[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_PROCID": str(k),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(k),
    }
    return [sys.executable, "-m", "equipot.cli"], variables


@pytest.mark.parametrize("launcher", [by_torchrun, by_deepspeed, by_srun])
def test_two_machines_train_as_one(
    hosts: list[Host],
    recipe_file: Path,
    tmp_path: Path,
    launcher: Callable[[list[Host], int], tuple[list[str], dict[str, str]]],
    train: Callable[..., Path],
    weights: Callable[..., dict[str, torch.Tensor]],
) -> None:
    run, logs, processes = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"], []
    for k, host in enumerate(hosts):
        command, environment = launcher(hosts, k)
        processes.append(host.start([*command, *job(recipe_file, run)], logs[k], **environment))
    said = finish(processes, logs)
    assert "2 rank(s) on cpu" in said
    alone = train(tmp_path / "alone", f"optimizer.steps={STEPS}")
    for name, tensor in weights(alone).items():
        assert torch.allclose(weights(run)[name], tensor, atol=2e-3), name


@pytest.mark.parametrize("how", ["lose", "kill"])
def test_a_lost_machine_is_named_and_the_rest_goes_on(
    hosts: list[Host], recipe_file: Path, tmp_path: Path, how: str
) -> None:
    run, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    steps = 600
    changes = [f"optimizer.steps={steps}", "checkpoint.every_steps=5", "validation.every_epochs=50"]
    rendezvous = ["--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    rendezvous += ["--rdzv-endpoint", f"{hosts[0].address}:{PORT}"]
    rendezvous += ["--rdzv-conf", "last_call_timeout=20,keep_alive_interval=2,keep_alive_max_attempt=3"]
    processes = [
        host.start([*torchrun(host, *rendezvous), *job(recipe_file, run, *changes)], log)
        for host, log in zip(hosts, logs, strict=True)
    ]
    wait_until(lambda: saved(run) >= 20 or any(process.poll() for process in processes), 300, "no checkpoint")
    assert saved(run) >= 20, texts(logs)
    assert read_checkpoint(committed_paths(run / "checkpoints")[0]).parallelism.ranks == 2
    getattr(hosts[1], how)()
    before = saved(run)
    assert before < steps
    said = finish(processes[:1], logs)
    assert "was lost (" in said
    assert "on node2 (10.77.0.2)" in said
    assert "saved by 2 rank(s)" in said  # resumed from what both had saved …
    last = read_checkpoint(committed_paths(run / "checkpoints")[0])
    assert (last.state.step, last.parallelism.ranks) == (steps, 1)  # … by the one that is left
    trained = [row.step for row in read_rows(run / "metrics.csv") if row.loss is not None]
    assert trained == list(range(1, steps + 1))


def test_where_both_are_wanted_one_waits_for_the_other(
    hosts: list[Host], recipe_file: Path, tmp_path: Path
) -> None:
    run, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log", tmp_path / "2.log"]
    steps = 600
    changes = [f"optimizer.steps={steps}", "checkpoint.every_steps=5", "validation.every_epochs=50"]
    rendezvous = ["--nnodes", "2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    rendezvous += ["--rdzv-endpoint", f"{hosts[0].address}:{PORT}"]
    rendezvous += ["--rdzv-conf", "keep_alive_interval=2,keep_alive_max_attempt=3"]

    def start(k: int, log: Path) -> subprocess.Popen[str]:
        command = [*torchrun(hosts[k], *rendezvous), *job(recipe_file, run, *changes)]
        # Else an agent that comes new is never told the address that the old ones keep from the first time.
        return hosts[k].start(command, log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    first, other = start(0, logs[0]), start(1, logs[1])
    wait_until(lambda: saved(run) >= 20 or first.poll() or other.poll(), 300, "no checkpoint")
    assert saved(run) >= 20, texts(logs[:2])
    hosts[1].kill()
    assert other.returncode != 0
    wait_until(lambda: "was lost (" in logs[0].read_text(), 90, "not noticed")
    time.sleep(5)  # nobody starts that fast
    again = start(1, logs[2])
    said = finish([first, again], logs, 600)
    assert "saved by 2 rank(s)" in said
    last = read_checkpoint(committed_paths(run / "checkpoints")[0])
    assert (last.state.step, last.parallelism.ranks) == (steps, 2)
