"""The measurements of `equipot bench serve`, one after the other."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equipot.serve.bench.engine_speed import EngineSpeed
from equipot.serve.bench.load import OK, Outcomes, closed_load, open_load
from equipot.serve.bench.mutate import send_mutated
from equipot.serve.bench.requests import crystal, request
from equipot.serve.bench.soak import soak
from equipot.serve.bench.subject import Subject, served
from equipot.serve.dispatcher import HAND_OVER_SECONDS
from equipot.wire.v1 import potential_pb2 as pb

ROUNDS = 4
"""Engine and server are measured in turns, so that both meet the same machine."""

DIFFERENT = 32
"""Requests of a load; they come again."""

BATCHES_WAITING = 6
"""So many batches' worth of callers keep the engine busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure; see `equipot bench serve --help`."""

    bundle: Path
    atoms: int
    structures: int
    loads: Sequence[float]
    seconds: float
    deadline: float
    threads: int | None
    batch_edges: int | None
    soak_seconds: float
    mutated: int


async def run(plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    """The report, without what is said of the machine; `tell` is called before each measurement."""
    # Of the caller's threads, too: the server is to be measured, and not how late its answers are looked at.
    sys.setswitchinterval(HAND_OVER_SECONDS)
    speed = EngineSpeed(plan.bundle, threads=plan.threads, batch_edges=plan.batch_edges)
    random = np.random.default_rng(0)
    elements, level = speed.engine.card.elements, speed.engine.card.levels_of_theory[0]
    systems = [crystal(random, plan.atoms, elements) for _ in range(plan.structures * DIFFERENT)]
    edges = sum(graph.n_edges for graph in speed.graphs(systems)) / len(systems)
    requests = [
        request(systems[start : start + plan.structures], level_of_theory=level)
        for start in range(0, len(systems), plan.structures)
    ]
    words = ["--max-batch-edges", str(speed.limit.edges)]
    words += ["--threads", str(plan.threads)] if plan.threads is not None else []
    with served(plan.bundle, words) as subject:
        per_batch = max(1.0, speed.limit.edges / edges) / plan.structures
        callers = max(2, round(BATCHES_WAITING * per_batch))
        capacity = await _capacity(plan, subject, speed, requests, systems, callers, tell)
        levels = []
        for load in plan.loads:
            rate = load * capacity["structures_per_s"] / plan.structures
            tell(f"open load, {load:g} of the capacity: {rate:.1f} requests/s")
            outcomes = await open_load(
                subject.address, requests, rate=rate, seconds=plan.seconds, deadline=plan.deadline
            )
            levels.append(_level(load, rate, plan, outcomes, capacity["structures_per_s"]))
        report: dict[str, Any] = {
            "atoms": plan.atoms,
            "structures_per_request": plan.structures,
            "edges_per_structure": round(edges, 1),
            "batch_edges": speed.limit.edges,
            "callers": callers,
            "capacity": capacity,
            "levels": levels,
        }
        if plan.mutated:
            tell(f"{plan.mutated} mutated requests")
            report["mutated"] = await _mutated(plan, subject, requests)
        if plan.soak_seconds:
            tell(f"mixed load for {plan.soak_seconds:g} s")
            seen = await soak(subject, elements, seconds=plan.soak_seconds, level_of_theory=level)
            report["soak"] = {
                "seconds": plan.soak_seconds,
                "statuses": dict(seen.statuses),
                "memory_mb": round(seen.level / 1e6, 1),
                "growth_mb": round(seen.growth / 1e6, 1),
                "alive": subject.alive,
            }
    return report


async def _capacity(
    plan: Plan,
    subject: Subject,
    speed: EngineSpeed,
    requests: Sequence[pb.PredictRequest],
    systems: Sequence[Any],
    callers: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    tell(f"capacity: {callers} callers, in turns with the engine alone")
    # Whoever comes first meets a cold machine.
    await closed_load(subject.address, requests, callers=callers, seconds=1.0)
    engine, server = [], []
    for _ in range(ROUNDS):
        engine.append(speed.structures_per_second(systems[:256], seconds=plan.seconds / ROUNDS))
        outcomes = await closed_load(
            subject.address, requests, callers=callers, seconds=plan.seconds / ROUNDS
        )
        server.append(outcomes.structures / outcomes.elapsed)
    return {
        "structures_per_s": round(statistics.mean(server), 2),
        "engine_structures_per_s": round(statistics.mean(engine), 2),
        "server_over_engine": round(statistics.median(s / e for s, e in zip(server, engine, strict=True)), 3),
    }


def _level(load: float, rate: float, plan: Plan, outcomes: Outcomes, capacity: float) -> dict[str, Any]:
    goodput = outcomes.structures / max(outcomes.elapsed, 1e-9)
    return {
        "load": load,
        "requests_per_s": round(rate, 2),
        "deadline_s": plan.deadline,
        "goodput": round(goodput, 2),
        "goodput_over_capacity": round(goodput / capacity, 3),
        "answered": outcomes.statuses[OK],
        "statuses": dict(outcomes.statuses),
        "hung": outcomes.hung,
        "p50_s": round(outcomes.quantile(0.5), 4),
        "p99_s": round(outcomes.quantile(0.99), 4),
    }


async def _mutated(plan: Plan, subject: Subject, requests: Sequence[pb.PredictRequest]) -> dict[str, Any]:
    # Once before: what a server takes at its first nonsense it keeps.
    await send_mutated(subject.address, requests[:4], count=min(2_000, plan.mutated), seed=1)
    before = subject.resident_bytes()
    verdict = await send_mutated(subject.address, requests[:4], count=plan.mutated)
    return {
        "requests": plan.mutated,
        "statuses": dict(verdict.statuses),
        "slowest_s": round(verdict.slowest, 3),
        "growth_mb": round((subject.resident_bytes() - before) / 1e6, 1),
        "wrong": [(method, status, raw.hex()[:400]) for method, status, raw in verdict.wrong],
        "alive": subject.alive,
    }
