"""What tests of jobs ask, and how they read what comes."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.serve.conftest import arrays

from equipot.model.batch import System
from equipot.wire.v1 import jobs_pb2 as jpb
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import encode_structures


def part(name: str, systems: list[System], *, start: int = 0, last: bool = True, **fields: Any) -> Any:
    words = {"model": "tiny", "fmax": 0.02, "max_steps": 40, **fields}
    structures = encode_structures(arrays(systems)) if systems else pb.Structures()
    relax = pb.RelaxRequest(structures=structures, **words)
    return jpb.SubmitJobRequest(id=name, start=start, last=last, relax=relax)


def results(replies: Any) -> dict[int, jpb.JobResult]:
    """By index: each once, and numbered one after the other."""
    found: dict[int, jpb.JobResult] = {}
    numbers = []
    for reply in replies:
        if reply.HasField("result"):
            assert reply.result.index not in found
            found[reply.result.index] = reply.result
            numbers.append(reply.result.number)
    if numbers:
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return found


def positions(result: jpb.JobResult) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.frombuffer(result.relaxed.positions)


def get(name: str) -> jpb.GetJobRequest:
    return jpb.GetJobRequest(id=name)
