"""Intervals hold the truth as often as they say, on exchangeable and on clustered cases."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from equipot.model.conformal import effective_size, percent_of, quantiles_of, rank_of
from equipot.model.errors import BundleError


def coverage(n: int, n_groups: int, percent: int, *, shared: float, rng: np.random.Generator) -> float:
    """Of one new case, over many calibrations of n cases in groups that share a part of their scores."""
    hits, promised = 0, 0
    per_group = n // n_groups
    for _ in range(800):
        groups = np.repeat(np.arange(n_groups), per_group)
        spread = rng.uniform(0.5, 2.0, n + 1)
        common = rng.normal(size=n_groups + 1)
        noise = math.sqrt(shared) * common[np.append(groups, n_groups)] + math.sqrt(1 - shared) * rng.normal(
            size=n + 1
        )
        error = np.abs(noise * spread)
        quantiles = quantiles_of(error[:n], spread[:n], groups)
        assert quantiles is not None
        width = quantiles.half_width(spread[n:], percent / 100)[0]
        if math.isfinite(width):
            promised += 1
            hits += error[n] <= width
    assert promised > 400
    return hits / promised


@pytest.mark.parametrize("percent", [50, 90])
@pytest.mark.parametrize(("n", "n_groups", "shared"), [(40, 40, 0.0), (120, 30, 0.8)])
def test_coverage_of_new_cases_is_as_promised(percent: int, n: int, n_groups: int, shared: float) -> None:
    p = percent / 100
    found = coverage(n, n_groups, percent, shared=shared, rng=np.random.default_rng(percent + n))
    # Four standard errors of 800 draws; beyond p, split-conformal gives up to 1/(n+1), groups some more.
    error = 4 * math.sqrt(p * (1 - p) / 800)
    assert p - error <= found <= p + error + 2 / n_groups


def test_the_rank_is_that_of_the_finite_sample() -> None:
    for n in (9, 19, 100):
        for p in (0.5, 0.9, 0.95):
            expected = math.ceil(round((n + 1) * p, 9))
            assert rank_of(n, n, p) == (expected if expected <= n else None)
    assert rank_of(1000, 9, 0.95) is None


def test_few_cases_promise_little() -> None:
    errors = np.linspace(0.1, 1.0, 9)
    quantiles = quantiles_of(errors, np.zeros(9), np.arange(9))
    assert quantiles is not None
    assert quantiles.half_width(np.zeros(1), 0.9)[0] == pytest.approx(1.0)
    assert math.isnan(quantiles.half_width(np.zeros(1), 0.91)[0])
    one_group = quantiles_of(errors, np.zeros(9), np.zeros(9, dtype=np.int64))
    assert one_group is not None
    assert math.isnan(one_group.half_width(np.zeros(1), 0.51)[0])
    assert quantiles_of(np.empty(0), np.empty(0), np.empty(0, dtype=np.int64)) is None


def test_cases_that_are_alike_in_groups_count_for_less() -> None:
    rng = np.random.default_rng(1)
    groups: NDArray[np.int64] = np.repeat(np.arange(50), 10)
    assert effective_size(rng.normal(size=500), groups) > 300
    assert effective_size(rng.normal(size=50)[groups] + 1e-3 * rng.normal(size=500), groups) < 60
    assert effective_size(rng.normal(size=500), np.arange(500)) == 500


def test_coverage_in_words() -> None:
    assert percent_of(0.9) == 90
    assert percent_of(0.29) == 29
    assert percent_of(0.901) == 91
    for wrong in (0.0, -0.5, 0.995, 1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="coverage is"):
            percent_of(wrong)


def test_damaged_quantiles_are_refused() -> None:
    quantiles = quantiles_of(np.linspace(0, 1, 200), np.zeros(200), np.arange(200))
    assert quantiles is not None
    good = quantiles.to_json()
    assert type(quantiles).from_json(good) == quantiles
    falling = [*good["values"][:50], -1.0, *good["values"][51:]]
    for wrong in ({"values": good["values"][:-1]}, {"values": falling}, {"offset": -1.0}):
        with pytest.raises(BundleError, match="quantiles"):
            type(quantiles).from_json(good | wrong)
