"""A model spread over two ranks against one process: time of a call and private memory, as JSON.

    python benchmarks/tensor_parallel.py --width 7168

writes a bundle of random weights and loads it three times: in one process with one thread, in one with two,
and on two ranks with a thread each. All are called in turn with the same structures, so that they meet the
same machine. At width 7,168 (a billion parameters) it needs 14 GiB of memory and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from equipot.model.batch import Graph, System
from equipot.model.bundle import write_bundle
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.serve.config import DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result

ELEMENTS = (1, 6, 8)
ATOMS = 20


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--forces", choices=["conservative", "direct"], default="conservative")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        parameters, whole_bytes = write_random_bundle(bundle, options.width, options.forces)
        ways = {
            "one process, 1 thread": {"threads": 1, "tensor_parallel": 1},
            "one process, 2 threads": {"threads": 2, "tensor_parallel": 1},
            "two ranks, 1 thread each": {"threads": 2, "tensor_parallel": 2},
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        memory = {}
        with contextlib.ExitStack() as stack:
            pipes = {name: stack.enter_context(subject(bundle, words)) for name, words in ways.items()}
            for name, pipe in pipes.items():
                memory[name] = pipe.recv()
            for seed in range(options.rounds + 1):
                answers = []
                for name, pipe in pipes.items():
                    pipe.send(seed)
                    seconds, energy, forces = pipe.recv()
                    answers.append((energy, forces))
                    if seed:  # the first call of each is for warming up
                        times[name].append(1e3 * seconds)
                check(answers)
    median = {name: statistics.median(values) for name, values in times.items()}
    ranks = median["two ranks, 1 thread each"]
    report = {
        "what": "tensor_parallel",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "parameters": parameters,
        "width": options.width,
        "forces": options.forces,
        "atoms": ATOMS,
        "rounds": options.rounds,
        "ms": {name: round(value, 1) for name, value in median.items()},
        "ranks_over_2_threads": round(ranks / median["one process, 2 threads"], 3),
        "1_thread_over_ranks": round(median["one process, 1 thread"] / ranks, 3),
        "weights_bytes": whole_bytes,
        "private_bytes_over_an_empty_process": memory,
        "largest_rank_over_weights": round(max(memory["two ranks, 1 thread each"]) / whole_bytes, 3),
    }
    print(json.dumps(report, indent=1))


def write_random_bundle(path: Path, width: int, forces: str) -> tuple[int, int]:
    """A bundle with small random weights, made one tensor at a time; its parameters, and their bytes."""
    config = ModelConfig.from_json(
        {"width": width, "forces": forces, "elements": ELEMENTS, "levels_of_theory": ("none",)}
    )
    references = References(energy=np.zeros((1, len(ELEMENTS))), scale=np.ones(1))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Potential(config, references).state_dict().items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.randn(shape) / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)

    card = write_bundle(
        path,
        name="random",
        config=config,
        references=references,
        tensors=tensors(),
        provenance={},
        metrics={},
    )
    return card.n_parameters, 4 * card.n_parameters


@contextlib.contextmanager
def subject(bundle: Path, words: dict[str, int]) -> Iterator[Connection]:
    """A process with one engine; first sends its memory, then answers seeds with time, energy, forces."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(bundle, words, theirs))
    process.start()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def serve(bundle: Path, words: dict[str, int], pipe: Connection) -> None:
    """In the process of a subject."""
    gc.collect()
    before = private_bytes(psutil.Process())
    engine = LocalEngine.load(
        bundle,
        dtype=None,
        device="cpu",
        limits=DEFAULT_LIMITS,
        threads=words["threads"],
        tensor_parallel=words["tensor_parallel"],
    )
    ranks = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    pipe.send([private_bytes(one) - before for one in ranks or [psutil.Process()]])
    while True:
        try:
            seed = pipe.recv()
        except EOFError:
            engine.close()
            return
        (graph,) = engine.prepare([structure(seed)])
        assert isinstance(graph, Graph)
        begun = time.perf_counter()
        (result,) = engine.compute([graph], forces=True, stress=False)
        seconds = time.perf_counter() - begun
        assert isinstance(result, Result)
        pipe.send((seconds, result.energy, result.forces))


def structure(seed: int) -> System:
    """A small molecular crystal's worth of atoms, a few Å from each other."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)[:ATOMS]
    return System(
        atomic_numbers=random.choice(ELEMENTS, ATOMS),
        positions=1.7 * grid + random.uniform(-0.2, 0.2, (ATOMS, 3)),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, dtype=np.bool_),
    )


def check(answers: list[tuple[float, np.ndarray]]) -> None:
    """All ways must say the same; else their times mean nothing."""
    energy, forces = answers[0]
    for other_energy, other_forces in answers[1:]:
        assert abs(other_energy - energy) <= 1e-4 * max(1.0, abs(energy)), (energy, other_energy)
        assert np.abs(other_forces - forces).max() <= 1e-4 * max(1.0, np.abs(forces).max())


def private_bytes(process: psutil.Process) -> int:
    """Memory that this process alone holds."""
    return int(process.memory_full_info().uss)


if __name__ == "__main__":
    main()
