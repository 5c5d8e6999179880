"""The paper's memory experiment by prediction, over widths of a real recipe."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from equipot.train.recipe import Recipe
from equipot.train.scaling.memory_baseline import memory_baseline


@pytest.mark.slow
def test_widths_and_settings_are_predicted_relative_to_the_plain_form(recipe: Callable[..., Recipe]) -> None:
    said: list[str] = []
    runs = memory_baseline(recipe("model.messages=fast"), [64, 256], 2, said.append)["runs"]
    settings = ["as it is", "checkpointing", "checkpointing, ZeRO 2"]
    names = [f"{form}: {setting}" for form in ("plain", "fast") for setting in settings]
    assert [run["setting"] for run in runs] == 2 * names
    assert [run["width"] for run in runs] == [64] * 6 + [256] * 6
    for first in (0, 6):
        assert runs[first]["relative_memory"] == runs[first]["relative_time"] == 1
        assert runs[first + 1]["relative_time"] > 1  # checkpointing computes the layers twice
        assert runs[first + 1]["bytes"] <= runs[first]["bytes"]
        assert runs[first]["bytes"] >= 2 * sum(runs[first]["parts_of_a_rank"].values()) * 0.99
    assert runs[6]["bytes"] > runs[0]["bytes"]
    assert "width 256, fast: as it is" in said
