"""How far points are and how long their steps take, from what their runs leave behind. Knows no processes."""

from __future__ import annotations

from statistics import median

from equipot.train.metrics import COLUMNS
from equipot.train.scaling.folder import PointFolder, StudyFolder, read_json
from equipot.train.scaling.point import Point
from equipot.train.scaling.speed import Measured, Speed

_TAIL_BYTES = 8000
_SPEED = COLUMNS.index("structures_per_second")


def steps_made(folder: PointFolder) -> int:
    """The steps that a point's run has made so far, as far as they are on disk."""
    rows = _last_rows(folder)
    return int(rows[-1][0]) if rows else 0


def seconds_left(point: Point, folder: PointFolder, speed: Speed) -> float:
    """What the training of a point is going to take from where it stands."""
    steps = point.steps - steps_made(folder)
    return max(0, steps) * speed.step_seconds(point.target_flops / point.steps, point.layers)


def measured_in(folder: StudyFolder) -> list[Measured]:
    """How long the steps of finished points took, and those that are being made now."""
    found = []
    for path in folder.points.glob("*/point.json"):
        place = PointFolder(path.parent)
        result = read_json(place.result)
        each = _of_result(result) if result is not None else _of_run(place)
        if each is not None:
            found.append(each)
    return found


def _of_result(result: dict[str, object]) -> Measured | None:
    point, steps, seconds, flops = (result.get(key) for key in ("point", "steps", "seconds", "flops"))
    if not (isinstance(point, dict) and isinstance(steps, int) and isinstance(seconds, float)):
        return None
    if not (steps and seconds and isinstance(flops, float) and flops):
        return None
    return Measured(flops / steps, int(point["layers"]), seconds / steps)


def _of_run(folder: PointFolder) -> Measured | None:
    speeds = [float(row[_SPEED]) for row in _last_rows(folder) if row[_SPEED]]
    values = read_json(folder.settings) if speeds else None
    if values is None:
        return None
    point = Point.from_json(values)
    seconds = point.structures_per_step / median(speeds)
    return Measured(point.target_flops / point.steps, point.layers, seconds)


def _last_rows(folder: PointFolder) -> list[list[str]]:
    path = folder.run / "metrics.csv"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode().splitlines()[1:]  # the first is the header, or torn
    except (OSError, UnicodeDecodeError):
        return []
    rows = [line.split(",") for line in lines]
    return [row for row in rows if len(row) == len(COLUMNS) and row[0].isdecimal()]
