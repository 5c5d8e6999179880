"""How fast one job moves on, and how long that leaves it. Knows neither store nor queue."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from equipot.serve.jobs.records import JobRecord


@dataclass(slots=True, eq=False)
class Headway:
    """What was done of one job since it began to move here.

    Attributes:
        steps: that structures which move now have taken, by place, as far as is known.
    """

    steps: dict[int, int] = field(default_factory=dict)
    _since: tuple[float, int] | None = None
    _taken: int = 0

    def begins(self, record: JobRecord, places: Iterable[int]) -> None:
        """Notes that structures begin which have taken no step before."""
        self._since = self._since or (time.monotonic(), record.n_done)
        self.steps.update(dict.fromkeys(places, 0))

    def moved(self, place: int, steps: int) -> None:
        """Notes how many steps a structure has taken; those of one that goes on count from its first word."""
        self._taken += max(0, steps - self.steps.get(place, steps))
        self.steps[place] = steps

    def remaining_seconds(self, record: JobRecord, steps_each: int) -> float:
        """Until the job is done at the pace it has had here; 0 if that is not known yet.

        Args:
            record: as it was written last.
            steps_each: that each structure takes; 0 if that is known when it has.
        """
        if self._since is None:
            return 0.0
        begun, before = self._since
        left = record.n_structures - record.n_done
        done = record.n_done - before
        if steps_each:
            # Many structures move for long before the first of them ends.
            left, done = left * steps_each - sum(self.steps.values()), self._taken
        return left * (time.monotonic() - begun) / done if done > 0 and left > 0 else 0.0
