"""A model spread over two ranks against one process: time of a call and private memory, as JSON.

    python benchmarks/tensor_parallel.py --width 2048
    python benchmarks/tensor_parallel.py --bundle DIR

writes a bundle of random weights, or takes one that there is, and loads it twice: in one process, that
computes with one thread and with two, and on two ranks with a thread each. All are called in turn with equal
structures, so that they meet the same machine. At a billion parameters it needs 10 GiB of memory.
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
from equipot.model.bundle import load_potential, read_card, write_bundle
from equipot.model.config import ModelConfig
from equipot.model.ensemble import Ensemble
from equipot.model.inference import FrozenPotential
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.serve.config import DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result

ELEMENTS = (1, 6, 8)
ATOMS = 20
WAYS = {
    "one process, 1 thread": ("whole", 1),
    "one process, 2 threads": ("whole", 2),
    "two ranks, 1 thread each": ("spread", 2),
}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--bundle", type=Path, help="one of `equipot export`, in the place of random weights")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--forces", choices=["conservative", "direct"], default="conservative")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle
        if bundle is None:
            bundle = Path(folder) / "bundle"
            write_random_bundle(bundle, options.width, options.forces)
        card = read_card(bundle)
        whole_bytes = 4 * card.n_parameters
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        memory = {}
        with contextlib.ExitStack() as stack:
            pipes = {kind: stack.enter_context(subject(bundle, kind)) for kind in ("whole", "spread")}
            for kind, pipe in pipes.items():
                memory[kind] = pipe.recv()
            for seed in range(options.rounds + 1):
                answers = []
                for name, (kind, threads) in WAYS.items():
                    pipes[kind].send((seed, threads))
                    seconds, energy, forces = pipes[kind].recv()
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
        "parameters": card.n_parameters,
        "width": card.config.width,
        "forces": card.config.forces,
        "atoms": ATOMS,
        "rounds": options.rounds,
        "ms": {name: round(value, 1) for name, value in median.items()},
        "ranks_over_2_threads": round(ranks / median["one process, 2 threads"], 3),
        "1_thread_over_ranks": round(median["one process, 1 thread"] / ranks, 3),
        "weights_bytes": whole_bytes,
        "private_bytes_over_an_empty_process": memory,
        "largest_rank_over_weights": round(max(memory["spread"]) / whole_bytes, 3),
    }
    print(json.dumps(report, indent=1))


def write_random_bundle(path: Path, width: int, forces: str) -> None:
    """A bundle with small random weights, made one tensor at a time."""
    config = ModelConfig.from_json(
        {"width": width, "forces": forces, "elements": ELEMENTS, "levels_of_theory": ("none",)}
    )
    references = References(energy=np.zeros((1, len(ELEMENTS))), scale=np.ones(1))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Potential(config, references).state_dict().items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.randn(shape) / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)

    write_bundle(
        path,
        name="random",
        config=config,
        references=references,
        tensors=tensors(),
        provenance={},
        metrics={},
    )


@contextlib.contextmanager
def subject(bundle: Path, kind: str) -> Iterator[Connection]:
    """A process that first sends its memory, then answers (seed, threads) with time, energy, forces."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(bundle, kind, theirs))
    process.start()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def serve(bundle: Path, kind: str, pipe: Connection) -> None:
    """In the process of a subject."""
    gc.collect()
    before = private_bytes(psutil.Process())
    engines = spread(bundle) if kind == "spread" else whole(bundle)
    ranks = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    pipe.send([private_bytes(one) - before for one in ranks or [psutil.Process()]])
    while True:
        try:
            seed, threads = pipe.recv()
        except EOFError:
            for engine in engines.values():
                engine.close()
            return
        engine = engines[threads]
        (graph,) = engine.prepare([structure(seed)])
        assert isinstance(graph, Graph)
        begun = time.perf_counter()
        (result,) = engine.compute([graph], forces=True, stress=False)
        seconds = time.perf_counter() - begun
        assert isinstance(result, Result)
        pipe.send((seconds, result.energy, result.forces))


def whole(bundle: Path) -> dict[int, LocalEngine]:
    """Engines by their number of threads, of the same weights."""
    potential, card = load_potential(bundle)
    frozen = Ensemble([FrozenPotential(potential)])
    return {
        threads: LocalEngine(
            frozen, card, dtype=card.dtype, device="cpu", limits=DEFAULT_LIMITS, threads=threads
        )
        for threads in (1, 2)
    }


def spread(bundle: Path) -> dict[int, LocalEngine]:
    """The engine of two ranks, which have two threads together."""
    engine = LocalEngine.load(
        bundle, dtype=None, device="cpu", limits=DEFAULT_LIMITS, threads=2, tensor_parallel=2
    )
    return {2: engine}


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
