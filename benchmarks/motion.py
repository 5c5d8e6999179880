"""What moving structures costs over a server: interleaved rounds, one JSON object.

`step`: one step of 64 atoms through a session, over the same step by an engine in this process that keeps its
neighbour list, too. The floor is what gRPC takes there: messages of the same size through a stream to a
server of gRPC's own that answers by constant bytes, called between two computations as the session is.

`relax`: structure-steps a second of many relaxations by several clients, three ways: the server moves them;
each client moves its own one by one with ASE and a calculator; one process moves all by the engine, in
batches, by turns with the algorithms.

Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from ase import Atoms
from ase.optimize import FIRE
from serve_overhead import (  # type: ignore[import-not-found]  # beside this file
    crystal,
    served,
    started,
    summary,
    write_random_bundle,
)

from equipot.client import Client, EquipotCalculator
from equipot.model.batch import Graph, System
from equipot.model.skin import SkinnedNeighbors
from equipot.serve.config import CPU_BUDGET, DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result, use_threads
from equipot.serve.motion.progress import Given
from equipot.serve.motion.relaxation import Telling, advance, begun
from equipot.serve.motion.relaxing import Relaxing
from equipot.serve.sessions import SKIN
from equipot.wire.v1.codec import FloatArray

BARE = "/equipot.benchmark.Bytes/Stream"
NEVER = 1e-9
"""eV/Å that no relaxation reaches: all take the same number of steps."""


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="steps of a session that are measured")
    parser.add_argument("--relax-rounds", type=int, default=3)
    parser.add_argument("--structures", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=60, help="of these, how many are moved one by one")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4, help="that clients which step are spread over")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--bare-server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step-alone", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare_server:
        asyncio.run(serve_bytes())
        return
    if options.step_alone:
        address, *numbers = options.step_alone
        step_alone(address, *map(int, numbers))
        return
    use_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_random_bundle(bundle, width=options.width, layers=3)
        engine = LocalEngine.load(bundle, dtype=None, device="cpu", limits=DEFAULT_LIMITS)
        with served(bundle, threads=1) as address, started([__file__, "--bare-server"]) as bare:
            report = {
                "what": "motion",
                "width": options.width,
                "step": measure_step(engine, address, bare, options.rounds),
                "relax": measure_relaxations(engine, address, options),
            }
    print(json.dumps(report, indent=1))


def measure_step(engine: LocalEngine, address: str, bare_address: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, three ways by turns."""
    random = np.random.default_rng(0)
    system = crystal(random)
    velocity = random.normal(0.0, 0.002, system.positions.shape)
    neighbors = [SkinnedNeighbors(engine.card.cutoff or 0.0, skin=SKIN)]
    here: list[float] = []
    there: list[float] = []
    floor: list[float] = []
    n_atoms, warm_up = len(system.positions), 30
    with (
        Client(address) as client,
        client.session(as_atoms(system)) as session,
        grpc.insecure_channel(bare_address) as channel,
    ):
        outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        replies: Any = channel.stream_stream(BARE, None, None)(iter(outbox.get, None))

        def ping(positions: FloatArray) -> None:
            outbox.put(bytes(24 * n_atoms + 40))
            next(replies)

        ways: list[tuple[Callable[[FloatArray], object], list[float]]] = [
            (lambda positions: compute(engine, [moved(system, positions)], neighbors), here),
            (session.predict, there),
            (ping, floor),
        ]
        for index in range(rounds + warm_up):
            # To and fro, as atoms do.
            positions = system.positions + velocity * 40 * np.sin(index / 40)
            for way, times in ways if index % 2 else [ways[1], ways[0], ways[2]]:
                begun = time.perf_counter()
                way(positions)
                if index >= warm_up:
                    times.append(1e3 * (time.perf_counter() - begun))
        replies.cancel()
    over = summary(there)["p50"] - summary(here)["p50"]
    return {
        "atoms": n_atoms,
        "rounds": rounds,
        "engine_ms": summary(here),
        "session_ms": summary(there),
        "floor_ms": summary(floor),
        "over_engine_at_p50_ms": round(over, 3),
        "over_engine_and_floor_at_p50_ms": round(over - summary(floor)["p50"], 3),
    }


def measure_relaxations(engine: LocalEngine, address: str, options: argparse.Namespace) -> dict[str, Any]:
    """Structure-steps a second, three ways by turns."""
    systems = [cluster(seed) for seed in range(options.structures)]
    rates: dict[str, list[float]] = {"server": [], "one_by_one": [], "engine": []}
    ways: dict[str, Callable[[], tuple[int, float]]] = {
        "server": lambda: by_server(address, systems, options.clients, options.steps),
        "one_by_one": lambda: one_by_one(address, options),
        "engine": lambda: by_engine(engine, systems, options.steps),
    }
    for index in range(options.relax_rounds + 1):
        for name in list(ways)[index % 3 :] + list(ways)[: index % 3]:
            steps, seconds = ways[name]()
            if index:
                rates[name].append(steps / seconds)
    median = {name: float(np.median(found)) for name, found in rates.items()}
    return {
        "structures": options.structures,
        "atoms": len(systems[0].positions),
        "steps": options.steps,
        "clients": options.clients,
        "structure_steps_per_second": {
            name: [round(rate, 1) for rate in found] for name, found in rates.items()
        },
        "server_over_one_by_one": round(median["server"] / median["one_by_one"], 2),
        "server_over_engine": round(median["server"] / median["engine"], 3),
    }


def by_server(address: str, systems: list[System], clients: int, steps: int) -> tuple[int, float]:
    """Each client has its share moved by the server; the steps that were taken, and seconds."""

    def relax(share: list[System]) -> int:
        with Client(address) as client:
            relaxed = client.relax([as_atoms(one) for one in share], fmax=NEVER, steps=steps)
        assert all(one.failure is None for one in relaxed)
        return sum(one.steps for one in relaxed)

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        taken = sum(pool.map(relax, [systems[place::clients] for place in range(clients)]))
    return taken, time.perf_counter() - begun


def one_by_one(address: str, options: argparse.Namespace) -> tuple[int, float]:
    """Each client moves its share itself; the steps that were taken, and seconds once all are there."""
    threads = options.clients // options.processes
    count = options.alone // options.clients
    words = [__file__, "--step-alone", address, str(threads), str(count), str(options.steps)]
    workers = [
        subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(options.processes)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    begun = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    taken = 0
    for worker in workers:
        assert worker.stdout is not None
        taken += int(worker.stdout.readline())
    seconds = time.perf_counter() - begun
    for worker in workers:
        worker.wait(timeout=60)
    return taken, seconds


def step_alone(address: str, clients: int, count: int, steps: int) -> None:
    """In a process of its own: so many clients step so many structures each; says how many steps it took."""
    taken = [0] * clients
    ready, go = threading.Barrier(clients + 1), threading.Event()

    def relax(place: int) -> None:
        with EquipotCalculator(address) as calculator:
            atoms = as_atoms(cluster(place))
            atoms.calc = calculator
            atoms.get_forces()
            ready.wait()
            go.wait()
            for number in range(count):
                atoms = as_atoms(cluster(place * count + number))
                atoms.calc = calculator
                optimizer = FIRE(atoms, logfile=None, maxstep=0.2)
                optimizer.run(fmax=NEVER, steps=steps)
                taken[place] += optimizer.nsteps

    threads = [threading.Thread(target=relax, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    go.set()
    for thread in threads:
        thread.join()
    print(sum(taken), flush=True)


def by_engine(engine: LocalEngine, systems: list[System], steps: int) -> tuple[int, float]:
    """All structures in this process, in batches as large as the server's; the steps, and seconds."""
    started = time.perf_counter()
    how = Relaxing(fmax=NEVER, steps=steps)
    per_structure = compute(engine, systems[:1], None)[1]
    size = max(1, CPU_BUDGET.batch_edges // per_structure)
    taken = 0
    for start in range(0, len(systems), size):
        batch = systems[start : start + size]
        some = [begun(how, one.positions, one.cell, np.zeros(len(one.positions), bool)) for one in batch]
        neighbors = [SkinnedNeighbors(engine.card.cutoff or 0.0) for _ in batch]
        while all(one.goes_on for one in some):
            now = [moved(system, one.positions) for system, one in zip(batch, some, strict=True)]
            results, _ = compute(engine, now, neighbors)
            for one, result in zip(some, results, strict=True):
                assert result.forces is not None
                one.progress.last = Given(result.energy, result.forces, None)
            advance(some, how, Telling())
        assert not any(one.goes_on for one in some)
        taken += sum(one.progress.steps for one in some)
    return taken, time.perf_counter() - started


def compute(
    engine: LocalEngine, systems: list[System], neighbors: list[SkinnedNeighbors] | None
) -> tuple[list[Result], int]:
    """Energies and forces, and the edges of all of them."""
    graphs = [graph for graph in engine.prepare(systems, neighbors=neighbors) if isinstance(graph, Graph)]
    results = [one for one in engine.compute(graphs, forces=True, stress=False) if isinstance(one, Result)]
    assert len(results) == len(systems)
    return results, sum(graph.n_edges for graph in graphs)


def cluster(seed: int) -> System:
    """Eight atoms of silicon, shaken, in no cell."""
    whole = crystal(np.random.default_rng(seed))
    return System(whole.atomic_numbers[:8], whole.positions[:8], np.zeros((3, 3)), np.zeros(3, dtype=bool))


def moved(system: System, positions: FloatArray) -> System:
    """The system with other positions."""
    return System(system.atomic_numbers, positions, system.cell, system.pbc)


def as_atoms(system: System) -> Atoms:
    """The system as ASE has it."""
    return Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)


async def serve_bytes() -> None:
    """Answers each message of a stream by constant bytes until the process ends."""

    async def answer(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield bytes(len(request) + 80)

    _, service, method = BARE.split("/")
    server = grpc.aio.server()
    behaviour: Any = answer
    handlers = {method: grpc.stream_stream_rpc_method_handler(behaviour)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    print(f"serving bytes on 127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
