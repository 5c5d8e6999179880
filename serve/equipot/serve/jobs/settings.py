"""What the operator decides about jobs. Knows nothing of gRPC or torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from equipot.serve.errors import ServeError

GIB = 2**30
DAY = 86_400.0
LEAST_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """How jobs are kept.

    Attributes:
        folder: where; one server's alone, on a disk of its machine.
        keep_days: after which a job that has ended is forgotten, and one that cannot go on is given up.
        most_bytes: of all jobs together. The oldest that have ended go before their time to make room.
        identity_jobs: most jobs that one identity keeps, ended or not.
        identity_bytes: of one identity's jobs together.
        moving_atoms: about how many atoms all jobs move at once.
        save_seconds: of work that are lost at most when the server is killed.

    Raises:
        ServeError: a value out of range, with its bounds.
    """

    folder: Path
    keep_days: float = 7.0
    most_bytes: int = 16 * GIB
    identity_jobs: int = 1_000
    identity_bytes: int = 8 * GIB
    moving_atoms: int = 200_000
    save_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, low in (
            ("most_bytes", LEAST_BYTES),
            ("identity_bytes", 1),
            ("identity_jobs", 1),
            ("moving_atoms", 1),
        ):
            if getattr(self, name) < low:
                raise ServeError(f"jobs.{name} is {getattr(self, name)}, allowed are {low} or more")
        for name, high in (("keep_days", 3_650.0), ("save_seconds", 3_600.0)):
            if not 0 < getattr(self, name) <= high:
                raise ServeError(
                    f"jobs.{name} is {getattr(self, name):g}, allowed are above 0 up to {high:g}"
                )

    @property
    def keep_seconds(self) -> float:
        """`keep_days` in seconds."""
        return self.keep_days * DAY
