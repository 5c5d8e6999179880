"""What is counted of jobs. Knows neither store nor gRPC."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from equipot.serve.jobs.records import JobRecord, JobState


class JobMetrics:
    """Jobs by their state, and what came of their structures."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._jobs = Gauge("equipot_jobs", "Jobs that are kept, by state", ["state"], registry=registry)
        self._structures = Counter(
            "equipot_job_structures",
            "Structures of jobs that came to their end",
            ["outcome"],
            registry=registry,
        )
        self._seen: dict[int, tuple[int, int]] = {}
        for state in JobState:
            self._jobs.labels(state)
        for outcome in ("ok", "failed"):
            self._structures.labels(outcome)

    def count(self, counts: Mapping[JobState, int]) -> None:
        """Notes how many there are."""
        for state in JobState:
            self._jobs.labels(state).set(counts.get(state, 0))

    def begin(self, record: JobRecord) -> None:
        """Counts what comes of a job from here on."""
        self._seen[record.key] = (record.n_done, record.n_failed)

    def gone(self, key: int) -> None:
        """Nothing more comes of a job that is forgotten."""
        self._seen.pop(key, None)

    def written(self, record: JobRecord) -> None:
        """Notes how far a job has come."""
        done, failed = self._seen.get(record.key, (record.n_done, record.n_failed))
        self._structures.labels("failed").inc(record.n_failed - failed)
        self._structures.labels("ok").inc((record.n_done - record.n_failed) - (done - failed))
        if record.state.ended:
            self._seen.pop(record.key, None)
        else:
            self._seen[record.key] = (record.n_done, record.n_failed)
