"""How far a point is, as its run's numbers on disk tell, a torn last line included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipot.train.metrics import COLUMNS
from equipot.train.scaling.folder import StudyFolder
from equipot.train.scaling.headway import measured_in, seconds_left, steps_made
from equipot.train.scaling.point import Point
from equipot.train.scaling.speed import Speed

from .test_order import planned


def row(step: int, speed: float | None) -> str:
    values = {"step": str(step), "epoch": "0.1", "structures_per_second": "" if speed is None else str(speed)}
    return ",".join(values.get(name, "") for name in COLUMNS)


@pytest.fixture
def point() -> Point:
    values = {**planned(4e9).point.to_json(), "steps": 400, "structures_per_step": 16, "layers": 3}
    return Point.from_json(values)


def test_a_run_that_goes_on_tells_its_step_and_its_speed(tmp_path: Path, point: Point) -> None:
    folder = StudyFolder(tmp_path)
    place = folder.point(point.name)
    place.run.mkdir(parents=True)
    assert steps_made(place) == 0
    assert measured_in(folder) == []
    place.settings.write_text(json.dumps(point.to_json()))
    rows = [row(step, 160.0) for step in range(1, 101)] + [row(100, None)]
    (place.run / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *rows, row(101, 5.0)[:7]]))
    assert steps_made(place) == 100
    (measured,) = measured_in(folder)
    assert measured.step_seconds == pytest.approx(0.1)
    assert measured.step_flops == pytest.approx(1e7)
    assert seconds_left(point, place, Speed([measured])) == pytest.approx(300 * 0.1)


def test_a_finished_point_counts_with_all_that_its_training_took(tmp_path: Path, point: Point) -> None:
    folder = StudyFolder(tmp_path)
    place = folder.point(point.name)
    place.path.mkdir(parents=True)
    place.settings.write_text(json.dumps(point.to_json()))
    result = {"point": point.to_json(), "steps": 400, "seconds": 80.0, "flops": 8e9}
    place.result.write_text(json.dumps(result))
    (measured,) = measured_in(folder)
    assert (measured.step_seconds, measured.step_flops) == (0.2, 2e7)
    place.result.write_text(json.dumps({**result, "seconds": None}))  # one that diverged
    assert measured_in(folder) == []
