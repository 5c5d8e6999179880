"""What the service adds to the engine's own time, for one client and 64 atoms: interleaved calls, JSON out.

Each round computes one structure twice, through an engine in this process and through `equipot serve` on
localhost, in alternating order, so that both meet the same machine. The floor is what gRPC itself costs
there: a call with messages of the same size to a server of gRPC's own that answers by constant bytes. It is
called between two computations, as the service is, when neither finds its code in the processor's caches:
back to back the same call takes half as long. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import asyncio
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

from equipot.model.batch import System
from equipot.model.bundle import write_bundle
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.serve.config import DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result, use_threads
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import StructureArrays, decode_predictions, encode_structures
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

SILICON, LATTICE, REPEATS = 14, 5.43, 2
ATOMS = 8 * REPEATS**3
REQUEST_BYTES, REPLY_BYTES = 28 * ATOMS + 100, 24 * ATOMS + 150
BARE = "/equipot.benchmark.Bytes/Call"
DIAMOND = [(0, 0, 0), (0, 2, 2), (2, 0, 2), (2, 2, 0), (1, 1, 1), (1, 3, 3), (3, 1, 3), (3, 3, 1)]


def main() -> None:
    """Prints one JSON object: p5, p50 and p95 of both ways and of their difference round by round, in ms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--bare-server", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare_server:
        asyncio.run(serve_bytes())
        return
    use_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_random_bundle(bundle, width=options.width, layers=options.layers)
        engine = LocalEngine.load(bundle, dtype=None, device="cpu", limits=DEFAULT_LIMITS)
        with (
            served(bundle, threads=options.threads) as address,
            started([__file__, "--bare-server"]) as bare_address,
            grpc.insecure_channel(address) as channel,
            grpc.insecure_channel(bare_address) as bare_channel,
        ):
            stub, bare_call = PotentialServiceStub(channel), bare_channel.unary_unary(BARE, None, None)
            in_process, remote, compute, bare = measure(
                lambda system: by_engine(engine, system),
                lambda system: by_rpc(stub, system),
                lambda: bare_call(bytes(REQUEST_BYTES), timeout=60),
                options.rounds,
            )
    overhead = [there - here for here, there in zip(in_process, remote, strict=True)]
    added = statistics.median(remote) - statistics.median(in_process)
    report = {
        "what": "serve_overhead",
        "atoms": ATOMS,
        "model": {"width": options.width, "layers": options.layers},
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
        "engine_ms": summary(in_process),
        "rpc_ms": summary(remote),
        "server_compute_ms": summary(compute),
        "floor_ms": summary(bare),
        "overhead_ms": summary(overhead),
        "added_at_p50_ms": round(added, 3),
        "added_at_p5_ms": round(summary(remote)["p5"] - summary(in_process)["p5"], 3),
        "added_beyond_floor_at_p50_ms": round(added - statistics.median(bare), 3),
        "added_beyond_floor_at_p5_ms": round(
            summary(remote)["p5"] - summary(in_process)["p5"] - summary(bare)["p5"], 3
        ),
    }
    print(json.dumps(report, indent=1))


def write_random_bundle(path: Path, *, width: int, layers: int) -> None:
    """A bundle of trained size with random weights: speed does not depend on them."""
    config = ModelConfig(
        width=width, layers=layers, elements=(SILICON,), levels_of_theory=("none",), mean_neighbors=28.0
    )
    references = References(energy=np.zeros((1, 1)), scale=np.ones(1))
    tensors = Potential(config, references).state_dict().items()
    write_bundle(
        path, name="random", config=config, references=references, tensors=tensors, provenance={}, metrics={}
    )


def served(bundle: Path, *, threads: int) -> contextlib.AbstractContextManager[str]:
    """`equipot serve` in a process of its own; yields its address."""
    words = ["serve", str(bundle), "--port", "0", "--metrics-port", "0", "--threads", str(threads)]
    return started(["-m", "equipot.cli", *words])


async def serve_bytes() -> None:
    """Answers calls by constant bytes until the process ends."""

    async def answer(request: bytes, context: object) -> bytes:
        return bytes(REPLY_BYTES)

    _, service, method = BARE.split("/")
    server = grpc.aio.server()
    handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    print(f"serving bytes on 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


@contextlib.contextmanager
def started(words: list[str]) -> Iterator[str]:
    """A Python process that serves and says where; yields its address."""
    server = subprocess.Popen(
        [sys.executable, *words],
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
        server.wait(timeout=30)


def measure(
    engine: Callable[[System], float],
    rpc: Callable[[System], float],
    bare_rpc: Callable[[], object],
    rounds: int,
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Milliseconds each round: in this process, over the service, in its engine, a bare call."""
    random = np.random.default_rng(0)
    in_process: list[float] = []
    remote: list[float] = []
    compute: list[float] = []
    bare: list[float] = []
    warm_up = 20
    for index in range(rounds + warm_up):
        system = crystal(random)
        ways = [(engine, in_process), (rpc, remote)]
        for way, times in ways if index % 2 else reversed(ways):
            begun = time.perf_counter()
            inside = way(system)
            if index >= warm_up:
                times.append(1e3 * (time.perf_counter() - begun))
                if way is rpc:
                    compute.append(1e3 * inside)
        begun = time.perf_counter()
        bare_rpc()
        if index >= warm_up:
            bare.append(1e3 * (time.perf_counter() - begun))
    return in_process, remote, compute, bare


def crystal(random: np.random.Generator) -> System:
    """64 atoms of silicon, shaken."""
    cells = np.stack(np.meshgrid(*[np.arange(REPEATS)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    positions = LATTICE * (cells + np.array(DIAMOND) / 4).reshape(-1, 3)
    return System(
        atomic_numbers=np.full(len(positions), SILICON),
        positions=positions + random.normal(0.0, 0.05, positions.shape),
        cell=LATTICE * REPEATS * np.eye(3),
        pbc=np.ones(3, dtype=bool),
    )


def by_engine(engine: LocalEngine, system: System) -> float:
    """Energy and forces in this process."""
    (graph,) = engine.prepare([system])
    assert not hasattr(graph, "reason")
    (result,) = engine.compute([graph], forces=True, stress=False)
    assert isinstance(result, Result)
    return 0.0


def by_rpc(stub: PotentialServiceStub, system: System) -> float:
    """Energy and forces over the service, encoding and decoding included; seconds in the server's engine."""
    n_atoms = np.array([system.n_atoms])
    arrays = StructureArrays(
        n_atoms=n_atoms,
        atomic_numbers=system.atomic_numbers.astype(np.int32),
        positions=system.positions,
        cell=system.cell[None],
        pbc=system.pbc[None],
        charge=np.zeros(1, dtype=np.int32),
        spin_multiplicity=np.zeros(1, dtype=np.int32),
    )
    response = stub.Predict(pb.PredictRequest(structures=encode_structures(arrays)), timeout=60)
    predictions = decode_predictions(response, n_atoms)
    assert not predictions.failures
    return response.timing.compute_seconds


def summary(times: list[float]) -> dict[str, float]:
    """5th percentile, which other work on the machine disturbs least, median and 95th."""
    return {
        "p5": round(statistics.quantiles(times, n=20)[0], 3),
        "p50": round(statistics.median(times), 3),
        "p95": round(statistics.quantiles(times, n=20)[-1], 3),
    }


if __name__ == "__main__":
    main()
