"""A point's digest is of what decides its result, and of nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from equipot.train.recipe import Recipe, parse_recipe
from equipot.train.scaling import point
from equipot.train.scaling.point import digest, name_of

PROGRAM = """
from equipot.train.recipe import parse_recipe
from equipot.train.scaling.point import digest
print(digest(parse_recipe({"data": {"mix": "elsewhere"}, "optimizer": {"steps": 5}}, "x"), "sha256:1"))
"""


def recipe(**changes: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {"data": {"mix": "m"}, "optimizer": {"steps": 5}}
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(base, "x")


def test_it_is_the_same_in_every_process_and_wherever_the_data_lie() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(recipe(), "sha256:1")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"width": 64}},
        {"model": {"forces": "direct"}},
        {"model": {"residual": False}},
        {"data": {"subset": 0.5}},
        {"optimizer": {"steps": 6}},
        {"optimizer": {"learning_rate": 2e-3}},
        {"batch": {"structures": 4}},
        {"loss": {"energy": 2.0}},
        {"ema": {"decay": 0.5}},
        {"seed": 1},
    ],
)
def test_what_decides_a_result_changes_it(changes: dict[str, Any]) -> None:
    assert digest(recipe(**changes), "sha256:1") != digest(recipe(), "sha256:1")


def test_data_and_the_version_of_the_study_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(recipe(), "sha256:1")
    assert digest(recipe(), "sha256:2") != before
    monkeypatch.setattr(point, "STUDY_VERSION", point.STUDY_VERSION + 1)
    assert digest(recipe(), "sha256:1") != before


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": {"every_steps": 3}},
        {"watch": {"wandb": "offline"}},
        {"batch": {"workers": 2}},
        {"batch": {"cache_mib": 1}},
    ],
)
def test_how_a_run_is_kept_changes_nothing(changes: dict[str, Any]) -> None:
    assert digest(recipe(**changes), "sha256:1") == digest(recipe(), "sha256:1")


def test_names_tell_what_is_unusual() -> None:
    name = name_of(recipe(model={"normalisation": "none", "width": 24}), "shared", "0123456789")
    assert name == "egnn_w24_l3_d1_normalisation-none_references-shared_n5_s0_01234567"
