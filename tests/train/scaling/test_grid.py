"""Products of axes, seeds that come later, and points that are held out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from equipot.train.scaling.declaration import Study, StudyError
from equipot.train.scaling.grid import wishes


def test_a_grid_is_the_product_of_its_axes_with_its_points(declared: Callable[..., Study]) -> None:
    study = declared(
        depth={
            "points": [{"width": 8, "layers": 2}, {"width": 4, "layers": 6}],
            "axes": {"seed": [0, 1, 2], "model": {"cutoff": [4.0, 5.0]}},
        },
        one={"length": {"flops": 1e9}, "ranks": 2},
    )
    found = wishes(study)
    assert len(found) == 2 * 3 * 2 + 1
    assert len({tuple(sorted(wish.axes.items())) for wish in found}) == len(found)
    assert {(wish.axes.get("width"), wish.axes.get("layers")) for wish in found[:-1]} == {(8, 2), (4, 6)}
    assert {wish.axes["model.cutoff"] for wish in found[:-1]} == {4.0, 5.0}
    assert found[-1].axes == {}
    assert (found[-1].length.flops, found[-1].ranks) == (1e9, 2)
    assert found[0].length.steps == 10


def test_later_seeds_are_of_later_tiers(declared: Callable[..., Study]) -> None:
    study = declared(
        first={"axes": {"seed": [5, 6]}}, second={"priority": 2, "axes": {"width": [4], "seed": [5]}}
    )
    tiers = {(wish.experiment, wish.axes["seed"]): wish.tier for wish in wishes(study)}
    assert tiers == {("first", 5): 1, ("first", 6): 2, ("second", 5): 2}


def test_held_out_points_are_those_that_match_a_pattern(declared: Callable[..., Study]) -> None:
    study = declared(
        size={
            "axes": {"width": [4, 8], "seed": [0, 1], "data_fraction": [0.5, 1.0]},
            "holdout": [{"width": 8, "data_fraction": 0.5}],
        }
    )
    held = [wish.axes for wish in wishes(study) if wish.holdout]
    assert len(held) == 2
    assert all((axes["width"], axes["data_fraction"]) == (8, 0.5) for axes in held)


def test_only_chooses_experiments(declared: Callable[..., Study]) -> None:
    study = declared(size={"axes": {"width": [4]}}, data={"axes": {"data_fraction": [0.5]}})
    assert [wish.experiment for wish in wishes(study, ["data"])] == ["data"]
    with pytest.raises(StudyError, match="no such experiment; one of size, data"):
        wishes(study, ["date"])
