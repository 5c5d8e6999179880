"""A process that trains one point after the other, so that torch and DeepSpeed are imported once.

Run as ``python -m equipot.train.scaling.worker`` by the runner, which writes an :class:`Assignment` to its
standard input. Workers on any number of machines find out by themselves, from the folder that they share,
which point is next.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipot.train.recipe import Recipe
from equipot.train.scaling.claims import Claim, claim, forget
from equipot.train.scaling.folder import PointFolder, StudyFolder, read_json, write_json
from equipot.train.scaling.headway import measured_in, seconds_left, steps_made
from equipot.train.scaling.point import Point
from equipot.train.scaling.speed import Speed
from equipot.train.worker import StopRequest, end_with_parent

_IDLE_SECONDS = 2.0
_MOST_POINTS = 50
RENEW = 75
"""Exit code of a process that asks for another in its place: some 10 MB a point are never given back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What workers are told."""

    folder: Path
    unseen: Mapping[str, Path]
    keep: bool
    began: float
    """When the command was begun: what failed before is tried again. Unix time, s."""
    deadline: float | None
    """When all is to be saved and ended; Unix time, s."""
    points: Sequence[tuple[Point, Recipe]]
    """In the order in which they are to be run."""

    def to_json(self) -> str:
        """As text for a worker's standard input."""
        return json.dumps(
            {
                "folder": str(self.folder),
                "unseen": {name: str(path) for name, path in self.unseen.items()},
                "keep": self.keep,
                "began": self.began,
                "deadline": self.deadline,
                "points": [
                    [point.to_json(), recipe.model_dump(mode="json")] for point, recipe in self.points
                ],
            }
        )

    @staticmethod
    def from_json(text: str) -> Assignment:
        """The inverse of :meth:`to_json`."""
        values: dict[str, Any] = json.loads(text)
        return Assignment(
            folder=Path(values["folder"]),
            unseen={name: Path(path) for name, path in values["unseen"].items()},
            keep=values["keep"],
            began=values["began"],
            deadline=values["deadline"],
            points=[
                (Point.from_json(point), Recipe.model_validate(recipe)) for point, recipe in values["points"]
            ],
        )


def is_open(folder: PointFolder, began: float) -> bool:
    """Whether a point is still to be run: it is not finished, and has not failed since then."""
    failure = None if folder.is_finished else read_json(folder.failure)
    return not folder.is_finished and (failure is None or failure["time"] < began)


class _Stop:
    """Whether to save and end: asked by a signal, at the deadline, or as another has taken the point."""

    def __init__(self, request: StopRequest, deadline: float | None) -> None:
        self._request = request
        self._deadline = deadline
        self.claim: Claim | None = None

    @property
    def ended(self) -> bool:
        return self._request.requested or (self._deadline is not None and time.time() > self._deadline)

    @property
    def requested(self) -> bool:
        return self.ended or (self.claim is not None and self.claim.is_lost)


def run(work: Assignment, request: StopRequest) -> int:
    """Train points until none is left, or until asked to stop; the exit code."""
    from equipot.train.scaling.train_point import train_point, why  # torch and deepspeed: seconds

    folder, stop = StudyFolder(work.folder), _Stop(request, work.deadline)
    for count, (point, recipe, mine) in enumerate(_next(work, folder, stop), start=1):
        place = folder.point(point.name)
        stop.claim = mine
        with mine:
            try:
                done = train_point(point, recipe, place, unseen=work.unseen, keep=work.keep, stop=stop)
            except Exception as error:
                done = False
                write_json(place.failure, why(error))
        stop.claim = None
        if done:
            place.failure.unlink(missing_ok=True)
            forget(place.path)
        if count == _MOST_POINTS:
            return RENEW
    return 0


def _next(work: Assignment, folder: StudyFolder, stop: _Stop) -> Iterator[tuple[Point, Recipe, Claim]]:
    left = list(work.points)
    while left and not stop.ended:
        left = [each for each in left if is_open(folder.point(each[0].name), work.began)]
        speed = Speed(measured_in(folder))
        for point, recipe in left:
            place = folder.point(point.name)
            if not _fits(point, place, speed, work.deadline):
                continue
            mine = claim(place.path, lambda place=place: {"step": steps_made(place)})  # type: ignore[misc]
            if mine is not None and place.is_finished:
                forget(place.path)
            elif mine is not None:
                yield point, recipe, mine
                break
        else:
            if not any(_fits(point, folder.point(point.name), speed, work.deadline) for point, _ in left):
                return
            time.sleep(_IDLE_SECONDS)  # others have the rest; one that dies is taken over


def _fits(point: Point, place: PointFolder, speed: Speed, deadline: float | None) -> bool:
    return deadline is None or time.time() + seconds_left(point, place, speed) < deadline


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry of a worker that the runner started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    request = StopRequest()
    request.listen()
    end_with_parent(options.parent)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core each
    return run(Assignment.from_json(sys.stdin.read()), request)


if __name__ == "__main__":
    sys.exit(main())
