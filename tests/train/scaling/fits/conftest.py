"""A study's directory of known laws, fitted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipot.train.scaling.fit import Fits, fit_study
from equipot.train.scaling.rows import StudyResults, read_study

from .synthetic import Synthetic, Truth


@pytest.fixture(scope="session")
def truth() -> Truth:
    return Truth()


@pytest.fixture(scope="session")
def study(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "known-laws"
    Synthetic(path, truth).whole(seeds=2)
    return path


@pytest.fixture(scope="session")
def results(study: Path) -> StudyResults:
    return read_study(study)


@pytest.fixture(scope="session")
def fits(results: StudyResults) -> Fits:
    return fit_study(results, budgets=(1e11, 1e12), replicates=60)
