"""What this machine does in a second, has free, and what a rank takes before it holds anything: measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from equipot.model.kernels import available
from equipot.train.allocator import give_memory_back
from equipot.train.errors import TrainError
from equipot.train.launch import free_port, rank_environment

_SECONDS = 0.25
"""How long one rate is measured; the best of several goes counts, as others may use the machine, too."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What one rank's process takes before it holds a model: measured in one that trains a tiny one."""

    own: int
    """bytes of its own"""
    files: int
    """bytes of libraries, which the ranks of a machine share"""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one thread-pool of this machine does in a second."""

    gemm: float
    """floating-point operations of matrix products as tall as a block of edges"""
    bandwidth: float
    """bytes read and written by elementwise work"""
    call: float
    """seconds of an operator that does nothing"""


def free_memory() -> int:
    """Bytes that a run could take: of the device, or what the system says is available."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise TrainError("the system does not say how much memory is free; give --memory, as in --memory 24GiB")


def has_compiled_kernels() -> bool:
    """Whether training here would use the compiled message kernels."""
    return not torch.cuda.is_available() and available()


def measure_rates(width: int, dtype: torch.dtype) -> Rates:
    """In about a second, with as many threads as torch uses now."""
    give_memory_back()  # as training does: new tensors cost new pages
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, columns = 1024, min(width, 4096)
    left = torch.randn(rows, columns, device=device).to(dtype)
    right = torch.randn(columns, columns, device=device).to(dtype)
    big = torch.randn(2**22, device=device)
    tiny = torch.zeros(1, device=device)
    flops = 2.0 * rows * columns * columns
    return Rates(
        gemm=flops / _best(lambda: left @ right),
        bandwidth=3.0 * big.nbytes / _best(lambda: big * big),
        call=_best(lambda: tiny + 1),
    )


def _best(work: object) -> float:
    assert callable(work)
    best, until = float("inf"), time.perf_counter() + _SECONDS
    work()
    goes = 0
    while goes < 3 or time.perf_counter() < until:
        goes += 1
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure_baseline() -> Baseline:
    """Start one rank, let it take a step of next to nothing, and ask the system what it has."""
    command = [sys.executable, "-m", "equipot.train.memory.empty_rank"]
    environment = {**os.environ, **rank_environment(0, 1, free_port())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        raise TrainError(f"a rank that holds nothing could not be started here: {last}")
    return Baseline(**json.loads(done.stdout.strip().splitlines()[-1]))


def of_this_process() -> Baseline:
    """What the calling process has now."""
    sizes = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith("Rss"):
            sizes[name] = int(value.split()[0]) * 1024
    return Baseline(own=sizes["RssAnon"] + sizes["RssShmem"], files=sizes["RssFile"])


def as_json(value: Baseline | Rates) -> dict[str, float]:
    """For reports."""
    return asdict(value)
