"""How long a job is said to take, and what is remembered of jobs that are gone."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry

from equipot.serve.jobs.headway import Headway
from equipot.serve.jobs.metrics import JobMetrics
from equipot.serve.jobs.records import JobRecord, JobState


def record(*, n_done: int = 0, n_structures: int = 10, key: int = 1) -> JobRecord:
    return JobRecord(
        key=key, identity="", id="a", label="", kind="simulate", request=b"", model=b"",
        state=JobState.OPEN, reason="", created=0.0, changed=0.0, ended=0.0, size=0,
        n_structures=n_structures, n_atoms=10, n_done=n_done, n_failed=0, n_results=0, n_steps=0,
    )  # fmt: skip


def test_dynamics_are_foretold_from_steps_and_relaxations_from_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    way = Headway()
    assert way.remaining_seconds(record(), 1_000) == 0.0
    # Two begin, one goes on from its step 500: that was not done now.
    way.begins(record(), [0, 1])
    now[0] += 10.0
    assert way.remaining_seconds(record(), 1_000) == 0.0
    for place, steps in ((2, 500), (0, 60), (1, 60), (2, 580)):
        way.moved(place, steps)
    # 200 steps in 10 s; 10,000 less 700 are left.
    assert way.remaining_seconds(record(), 1_000) == pytest.approx(9_300 * 10 / 200)
    # Of relaxations nobody knows before the first has ended.
    assert way.remaining_seconds(record(), 0) == 0.0
    assert way.remaining_seconds(record(n_done=2), 0) == pytest.approx(8 * 10 / 2)
    assert way.remaining_seconds(record(n_done=10), 0) == 0.0


def test_nothing_is_remembered_of_jobs_that_are_gone() -> None:
    metrics = JobMetrics(CollectorRegistry())
    for key in range(5):
        metrics.begin(record(key=key))
        metrics.written(record(key=key, n_done=3))
        metrics.gone(key)
    assert not metrics._seen
