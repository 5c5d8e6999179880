"""How near `Explain` comes to what is then computed: a warm server, interleaved calls, one JSON object.

For each width a server of its own is started. A round asks `Explain` and then `Predict` the same about one
request of each kind, in changing order, with other structures each time. `compute` compares the seconds in
the engine that were foretold with those that the answer reports; `total` those in the server with what the
caller measures. Errors are |foretold ÷ measured − 1| of the medians over all rounds, so that a busy machine's
moments do not count; `pairs_within_20_percent` is about single calls, which do not escape them. Kinds that
are `warm` were computed `--warm-up` times before; `strange` ones are asked about but once, at the end.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from serve_overhead import SILICON, served, write_random_bundle  # type: ignore[import-not-found]  # beside this

from equipot.serve.bench.requests import crystal, request
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

WARM = ((1, 20), (8, 64), (64, 30), (1, 1000))
"""Structures × atoms of the requests that the server knows."""

STRANGE = ((1, 60), (4, 32), (24, 40), (1, 400))
"""Of those that it does not."""

LONGEST_CALL = 600.0


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="at most")
    parser.add_argument("--seconds", type=float, default=120.0, help="for a width's rounds, at most")
    parser.add_argument("--warm-up", type=int, default=6)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "what": "explain",
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "layers": options.layers,
        "widths": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for width in options.widths:
            bundle = Path(folder) / str(width)
            write_random_bundle(bundle, width=width, layers=options.layers)
            with (
                served(bundle, threads=options.threads) as address,
                grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel,
            ):
                report["widths"].append({"width": width, **measure(PotentialServiceStub(channel), options)})
    errors = [kind["compute"]["error"] for each in report["widths"] for kind in each["warm"]]
    report["largest_error_of_compute_when_warm"] = max(errors)
    report["within_20_percent"] = max(errors) <= 0.2
    print(json.dumps(report, indent=1))


@dataclass
class Kind:
    """Requests of one shape, and what was foretold and measured of them, in seconds."""

    structures: int
    atoms: int
    compute: list[tuple[float, float]] = field(default_factory=list)
    total: list[tuple[float, float]] = field(default_factory=list)
    edges: int = 0

    def round(self, stub: PotentialServiceStub, random: np.random.Generator) -> None:
        """Asks what a request would cost, then for the answer."""
        asked = self.request(random)
        told = stub.Explain(asked, timeout=LONGEST_CALL)
        begun = time.perf_counter()
        answer = stub.Predict(asked, timeout=LONGEST_CALL)
        seconds = time.perf_counter() - begun
        self.edges = told.total_edges
        self.compute.append((told.compute_seconds, answer.timing.compute_seconds))
        self.total.append((told.total_seconds, seconds))

    def request(self, random: np.random.Generator) -> pb.PredictRequest:
        """One of its kind."""
        return request([crystal(random, self.atoms, [SILICON]) for _ in range(self.structures)])

    def report(self) -> dict[str, Any]:
        """What is left of the rounds."""
        return {
            "structures": self.structures,
            "atoms": self.atoms,
            "edges": self.edges,
            "rounds": len(self.compute),
            "compute": compared(self.compute),
            "total": compared(self.total),
        }


def measure(stub: PotentialServiceStub, options: argparse.Namespace) -> dict[str, Any]:
    """All kinds on one server."""
    random = np.random.default_rng(0)
    warm = [Kind(*shape) for shape in WARM]
    strange = [Kind(*shape) for shape in STRANGE]
    for _ in range(options.warm_up):
        for kind in warm:
            stub.Predict(kind.request(random), timeout=LONGEST_CALL)
    begun = time.perf_counter()
    for number in range(options.rounds):
        for index in random.permutation(len(warm)):
            warm[index].round(stub, random)
        if number >= 2 and time.perf_counter() - begun > options.seconds:
            break
    for kind in strange:
        # Foretold for once and for all: what is computed next is learnt from.
        asked = [kind.request(random) for _ in range(3)]
        told = [stub.Explain(one, timeout=LONGEST_CALL).compute_seconds for one in asked]
        took = [stub.Predict(one, timeout=LONGEST_CALL).timing.compute_seconds for one in asked]
        kind.compute = list(zip(told, took, strict=True))
    return {
        "warm": [kind.report() for kind in warm],
        "strange": [kind.report() for kind in strange],
    }


def compared(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of what was foretold and measured, and how far they are apart."""
    if not pairs:
        return {}
    told, took = (statistics.median(one) for one in zip(*pairs, strict=True))
    near = sum(abs(one / other - 1) <= 0.2 for one, other in pairs)
    return {
        "foretold_ms": round(1e3 * told, 3),
        "measured_ms": round(1e3 * took, 3),
        "error": round(abs(told / took - 1), 3),
        "pairs_within_20_percent": round(near / len(pairs), 2),
    }


if __name__ == "__main__":
    main()
