"""What `equipot doctor` says of training: DeepSpeed, how ranks talk, offloading to disk."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import torch.distributed as dist

from equipot.train.scratch import nvme_problem


def findings(*, build: bool) -> Iterator[tuple[str, str, str | None]]:
    """(name, value, remedy or None) of each thing; nothing of it is ever built here."""
    yield "DeepSpeed", importlib.metadata.version("deepspeed"), None
    backends = {"gloo": dist.is_gloo_available(), "NCCL": dist.is_nccl_available()}
    yield "ranks talk by", ", ".join(name for name, present in backends.items() if present), None
    problem = nvme_problem()
    if problem is None:
        yield "offload to NVMe", "possible (two C++ extensions are built at first use)", None
    else:
        yield "offload to NVMe", *problem
