"""What Ray Serve adds to a call, beside a server alone: one client, 64 atoms; interleaved calls, JSON out.

Each round computes one structure three times, through an engine in this process, through `equipot serve` and
through `equipot serve --ray`, in turning order, so that all meet the same machine. An empty call on each
connection is the reference for what the way there costs by itself. Run it while nothing else runs, from the
repository: python -m benchmarks.ray_serve
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import torch
from benchmarks.serve_overhead import by_engine, by_rpc, crystal, summary, write_random_bundle
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from equipot.model.batch import System
from equipot.serve.config import DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, use_threads
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

WARM_UP = 20
WAYS = {"standalone": (), "ray": ("--ray",)}


def main() -> None:
    """Prints one JSON object: p5, p50 and p95 in ms of each way, and what each adds to the engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    use_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bundle = Path(folder) / "bundle"
        write_random_bundle(bundle, width=options.width, layers=options.layers)
        engine = LocalEngine.load(bundle, dtype=None, device="cpu", limits=DEFAULT_LIMITS)
        calls: dict[str, Callable[[System], object]] = {"engine": lambda system: by_engine(engine, system)}
        empty: dict[str, Callable[[], object]] = {}
        for name, words in WAYS.items():
            address = stack.enter_context(served(bundle, *words))
            channel = stack.enter_context(grpc.insecure_channel(address))
            stub, health = PotentialServiceStub(channel), HealthStub(channel)
            calls[name] = lambda system, stub=stub: by_rpc(stub, system)  # type: ignore[misc]  # a default binds it
            empty[name] = lambda health=health: health.Check(HealthCheckRequest())  # type: ignore[misc]  # as above
        times, bare = measure(calls, empty, options.rounds)
    report = {
        "what": "ray_serve",
        "atoms": 64,
        "model": {"width": options.width, "layers": options.layers},
        "rounds": options.rounds,
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
        "call_ms": {name: summary(each) for name, each in times.items()},
        "empty_call_ms": {name: summary(each) for name, each in bare.items()},
        "added_to_engine_at_p50_ms": {name: round(added(times, name), 3) for name in WAYS},
        "added_to_engine_at_p5_ms": {
            name: round(summary(times[name])["p5"] - summary(times["engine"])["p5"], 3) for name in WAYS
        },
        "ray_over_standalone_added": round(added(times, "ray") / added(times, "standalone"), 2),
    }
    print(json.dumps(report, indent=1))


def added(times: dict[str, list[float]], way: str) -> float:
    """Milliseconds over the engine, at the median."""
    return statistics.median(times[way]) - statistics.median(times["engine"])


def measure(
    calls: dict[str, Callable[[System], object]], empty: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of each way each round, and of an empty call on each connection."""
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    bare: dict[str, list[float]] = {name: [] for name in empty}
    order = list(calls)
    for index in range(rounds + WARM_UP):
        system = crystal(random)
        turn = index % len(order)
        for name in order[turn:] + order[:turn]:
            begun = time.perf_counter()
            calls[name](system)
            if index >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begun))
        for name, call in empty.items():
            begun = time.perf_counter()
            call()
            if index >= WARM_UP:
                bare[name].append(1e3 * (time.perf_counter() - begun))
    return times, bare


@contextlib.contextmanager
def served(bundle: Path, *words: str) -> Iterator[str]:
    """`equipot serve` in a process of its own; yields its address."""
    command = ["serve", str(bundle), *words, "--port", "0", "--no-metrics", "--threads", "1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "equipot.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if line.startswith("serving "):
                yield line.split(" on ")[1].strip()
                return
        sys.exit("the server did not start")
    finally:
        server.terminate()
        server.communicate(timeout=90)


if __name__ == "__main__":
    main()
