"""One rank of a spread model: a process that loads its slices and computes what it is sent.

DeepSpeed sets up the process group: gloo between processors, NCCL between GPUs. It splits no weights here;
see `equipot.model.sharding` for why.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from equipot.model.batch import SystemBatch
from equipot.model.bundle import load_potential
from equipot.model.errors import BundleError, ModelError
from equipot.model.potential import Potential
from equipot.model.process_group import ProcessGroup
from equipot.serve.memory import is_out_of_memory

COLLECTIVE_MINUTES = 10
"""A collective that takes longer has lost a rank without a sign of it. A batch is many, and may."""

LAST_WORD_SECONDS = 1.0
"""A rank that fails lives so long before it says how: one that failed for another's sake is ended before."""


@dataclass(frozen=True, slots=True)
class RankConfig:
    """Everything a rank is told when it starts.

    Attributes:
        bundle: what to load.
        digest: that it must have: the folder may hold another one by the time a rank starts again.
        dtype: what to compute in, as `equipot.serve.engine` names it; None is as stored.
        device: as torch names its kind; of several GPUs each rank takes its own.
        rank, size: its place.
        local: its place among the ranks of its machine.
        leader: address of the first rank's machine, as seen from this one.
        port: on which the first rank lets the others find it.
        threads: that compute in this rank.
    """

    bundle: Path
    digest: str
    dtype: str | None
    device: str
    rank: int
    size: int
    port: int
    threads: int
    local: int
    leader: str = "127.0.0.1"

    def on(self, leader: str) -> Self:
        """The same on a machine that sees the leader under this address."""
        return replace(self, leader=leader)


@dataclass(frozen=True, slots=True)
class Job:
    """One batch: the fields of a `SystemBatch`, and what is asked for."""

    fields: dict[str, npt.NDArray[np.generic]]
    forces: bool
    stress: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a batch gave: energy (S,), forces (N, 3), stress (S, 3, 3), float64."""

    energy: npt.NDArray[np.float64]
    forces: npt.NDArray[np.float64] | None
    stress: npt.NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank has loaded its part: so many of the model's parameters."""

    parameters: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The rank cannot load its part, for a reason that trying again does not change."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exhausted:
    """The rank ran out of memory with its job. It ends: the others wait for it in the midst of a sum."""


def main(config: RankConfig, pipe: Connection) -> None:
    """Loads, says so, and answers jobs until the pipe is closed."""
    # Ctrl-C reaches the whole group of processes; the server decides when its ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.update(
        RANK=str(config.rank),
        LOCAL_RANK=str(config.local),
        WORLD_SIZE=str(config.size),
        MASTER_ADDR=config.leader,
        MASTER_PORT=str(config.port),
    )
    if config.device == "cpu":
        # DeepSpeed chooses its accelerator while it is imported.
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(config.threads)
    device = torch.device("cpu" if config.device == "cpu" else f"{config.device}:{config.local}")
    try:
        if (potential := _loaded(config, pipe, device)) is not None:
            _serve(potential, config, pipe, device)
    except Exception:
        # What broke because another rank ended is no news: its server knows, and ends this one.
        time.sleep(LAST_WORD_SECONDS)
        raise


def _loaded(config: RankConfig, pipe: Connection, device: torch.device) -> Potential | None:
    """Its part, or None if it cannot have it; says so."""
    group = _join(device)
    try:
        dtype = getattr(torch, config.dtype) if config.dtype else None
        potential, card = load_potential(config.bundle, dtype=dtype, device=device, group=group)
    except (BundleError, ModelError) as error:
        pipe.send(Refused(str(error)))
        return None
    if card.digest != config.digest:
        pipe.send(Refused(_another(config, card.digest)))
        return None
    pipe.send(Ready(sum(parameter.numel() for parameter in potential.parameters())))
    return potential


def _serve(potential: Potential, config: RankConfig, pipe: Connection, device: torch.device) -> None:
    while True:
        try:
            outcome = _outcome(potential, pipe.recv(), device)
        except EOFError:
            return
        except Exception as error:
            if is_out_of_memory(error):
                pipe.send(Exhausted())
                return
            raise
        if config.rank == 0:
            pipe.send(outcome)


def _end_with(parent: BaseProcess) -> None:
    """Ends this process with its server's, also while it waits in a sum for a rank that hangs."""
    parent.join()
    os._exit(1)


def _another(config: RankConfig, digest: str) -> str:
    return (
        f"{config.bundle}: rank {config.rank} found {digest} there, and {config.digest} is served: "
        "put that back, or load the model anew"
    )


def _outcome(potential: Potential, job: Job, device: torch.device) -> Outcome:
    batch = SystemBatch(*(torch.from_numpy(job.fields[name]) for name in SystemBatch.__slots__))
    with torch.no_grad():
        out = potential(batch.to(device=device), forces=job.forces, stress=job.stress)
    return Outcome(out.energy.cpu().numpy(), _numbers(out.forces), _numbers(out.stress))


def _join(device: torch.device) -> ProcessGroup:
    import deepspeed
    import deepspeed.ops

    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Otherwise init_distributed compiles a C++ extension: a minute, and a crash where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=COLLECTIVE_MINUTES),
    )
    return ProcessGroup()


def _numbers(tensor: torch.Tensor | None) -> npt.NDArray[np.float64] | None:
    return None if tensor is None else tensor.double().cpu().numpy()
