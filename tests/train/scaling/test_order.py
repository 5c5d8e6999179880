"""The order of value, budgets, shares, and how long things are said to take."""

from __future__ import annotations

import math
from typing import Any

import pytest

from equipot.train.recipe import parse_recipe
from equipot.train.scaling.declaration import StudyError
from equipot.train.scaling.order import in_order, parse_budget, shared, within
from equipot.train.scaling.planning import Planned
from equipot.train.scaling.point import Point
from equipot.train.scaling.speed import Measured, Speed


def planned(flops: float, tier: float = 1) -> Planned:
    values: dict[str, Any] = {
        "data": {"mix": "m"},
        "optimizer": {"steps": 1},
    }
    point = Point(
        name=f"{tier:g}-{flops:g}", group=("a",), holdout=False, architecture="egnn", width=8, layers=1,
        forces="direct", residual=True, normalisation="layer", inputs="invariant", references="per-level",
        data_fraction=1.0, train_structures=10, seed=0, steps=1, structures_per_step=1, target_flops=flops,
        learning_rate=1e-3, parameters=1, ranks=1, overrides={},
    )  # fmt: skip
    return Planned(point=point, recipe=parse_recipe(values, "x"), tier=tier)


def flops_of(points: list[Planned]) -> list[float]:
    return [each.point.target_flops for each in points]


def test_tiers_come_first_then_cheap_points_and_the_largest_is_not_last() -> None:
    points = [planned(flops, tier) for tier in (2, 1) for flops in (8, 1, 4, 2, 16, 32)]
    ordered = in_order(points)
    assert [each.tier for each in ordered] == [1] * 6 + [2] * 6
    first = flops_of(ordered[:6])
    assert first[:3] == [1, 2, 4]
    assert max(first) == first[3]
    assert first[-1] < max(first)
    assert sorted(first) == [1, 2, 4, 8, 16, 32]


def test_a_budget_covers_points_in_order_and_passes_over_what_is_too_dear() -> None:
    points = [planned(flops) for flops in (1, 2, 50, 3)]
    assert flops_of(within(points, 6)) == [1, 2, 3]
    assert flops_of(within(points, 5.9)) == [1, 2]
    assert within(points, 0.5) == []


def test_shares_divide_the_points_without_rest() -> None:
    points = [planned(flops) for flops in range(1, 8)]
    parts = [shared(points, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(flops for part in parts for flops in flops_of(part)) == list(range(1, 8))
    for wrong in ("0/2", "3/2", "half", "1"):
        with pytest.raises(StudyError, match="--share"):
            shared(points, wrong)


def test_budgets_are_times_or_flops() -> None:
    assert parse_budget("15 min") == (None, 900)
    assert parse_budget("6h") == (None, 6 * 3600)
    assert parse_budget("2e14") == (2e14, None)
    assert parse_budget("3.5e13 FLOPs") == (3.5e13, None)
    for wrong in ("", "soon", "-3", "0", "3 weeks", "1.2.3"):
        with pytest.raises(StudyError, match="--budget"):
            parse_budget(wrong)


def test_seconds_follow_what_was_measured() -> None:
    usual = Speed([])
    assert not usual.is_measured
    assert 0 < usual.step_seconds(1e6, 3) < usual.step_seconds(1e6, 12) < usual.step_seconds(1e12, 3)
    slow = Measured(1e8, 3, 3 * usual.step_seconds(1e8, 3))
    busy = Measured(1e10, 3, 5 * usual.step_seconds(1e10, 3))
    speed = Speed([slow, busy, busy])
    assert speed.is_measured
    assert speed.step_seconds(1e8, 3) == pytest.approx(slow.step_seconds)
    assert speed.step_seconds(1e10, 3) == pytest.approx(busy.step_seconds)
    assert speed.step_seconds(1e9, 3) == pytest.approx(math.sqrt(15) * usual.step_seconds(1e9, 3))
    # half the FLOPs of a step that is nothing but overhead take as long; twice those of a large one, twice
    assert speed.step_seconds(1e5, 3) == pytest.approx(speed.step_seconds(5e4, 3), rel=1e-3)
    assert speed.step_seconds(2e13, 3) == pytest.approx(2 * speed.step_seconds(1e13, 3), rel=1e-2)
