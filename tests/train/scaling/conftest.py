"""Declarations of tiny studies on the alcohols that ship with the repository, and the real command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipot.train.scaling.declaration import Study, parse_study

ALCOHOLS = Path(__file__).parents[3] / "examples" / "data" / "ethanol-methanol.extxyz"

TINY = f"""
name = "tiny"
validations = 2
length = {{ steps = 4 }}
[sources.alcohols]
files = ["{ALCOHOLS}"]
level_of_theory = "PBE/def2-SVP"
licence = "MIT"
group_by = "block:10"
max_structures = 200
[recipe]
model.layers = 1
model.radial = 4
model.cutoff = 3.0
batch.structures = 4
"""


@pytest.fixture
def declared() -> Callable[..., Study]:
    """A study with these experiments: `declared(size={"axes": {"width": [4, 8]}})`."""

    def declare(*, top: dict[str, Any] | None = None, **experiments: dict[str, Any]) -> Study:
        values: dict[str, Any] = {
            "name": "declared",
            "length": {"steps": 10},
            "sources": {"alcohols": {"files": ["x.xyz"], "level_of_theory": "PBE", "licence": "MIT"}},
            "experiments": experiments,
        }
        return parse_study({**values, **(top or {})}, "a test")

    return declare


def command(study: Path, out: Path, *options: str) -> list[str]:
    """The real command, as a user gives it."""
    base = [sys.executable, "-m", "equipot.cli", "scaling", "run", str(study), "--out", str(out)]
    return [*base, "--workers", "1", *options]


def run(study: Path, out: Path, *options: str, code: int = 0) -> str:
    """Run it to its end; what it said."""
    done = subprocess.run(command(study, out, *options), capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
